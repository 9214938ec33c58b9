"""The pack's routes on ComfyUI's server. Its own checks, such as that of the origin, apply to them."""

from . import lines
from .events import PREFIX


def register() -> None:
    """Adds the routes. A script has no server, and nothing is added."""
    try:
        from aiohttp import web
        from server import PromptServer

        routes = PromptServer.instance.routes
    except (ImportError, AttributeError):
        return

    @routes.get(f"/{PREFIX}/lines")
    async def lines_of_workflow(request: web.Request) -> web.Response:
        return web.json_response(lines.kept.of_workflow(request.query.get("workflow", "")))
