"""The pack's routes on ComfyUI's server. Its own checks, such as that of the origin, apply to them."""

import asyncio
from collections.abc import Callable
from typing import Any

from ...parallel_backend.errors import Failure, RequestError
from . import lines, plan_table, state
from .errors import sentence
from .events import PREFIX


def register() -> None:
    """Adds the routes. A script has no server, and nothing is added."""
    try:
        from aiohttp import web
        from server import PromptServer

        routes = PromptServer.instance.routes
    except (ImportError, AttributeError):
        return

    async def answer(work: Callable[..., Any], *args: Any) -> web.Response:
        """Runs work in a thread, as it may wait for a group. What it refuses is answered with status 409 and its sentence."""
        try:
            return web.json_response(await asyncio.to_thread(work, *args))
        except (RequestError, Failure) as error:
            return web.json_response({"error": state.without_folders(sentence(error))}, status=409)

    @routes.get(f"/{PREFIX}/lines")
    async def lines_of_workflow(request: web.Request) -> web.Response:
        return web.json_response(lines.kept.of_workflow(request.query.get("workflow", "")))

    @routes.get(f"/{PREFIX}/status")
    async def status(request: web.Request) -> web.Response:
        return await answer(state.status)

    @routes.get(f"/{PREFIX}/plans")
    async def plans(request: web.Request) -> web.Response:
        return await answer(plan_table.of_query, dict(request.query))

    @routes.get(f"/{PREFIX}/choices")
    async def choices(request: web.Request) -> web.Response:
        return await answer(plan_table.choices_of_query, dict(request.query))

    @routes.get(f"/{PREFIX}/log/{{rank:\\d+}}")
    async def log(request: web.Request) -> web.Response:
        try:
            return web.Response(text=await asyncio.to_thread(state.log_of, int(request.match_info["rank"])))
        except (RequestError, OSError) as error:
            return web.Response(text=sentence(error), status=404)

    for name, action in (("free", state.free), ("stop", state.stop), ("restart", state.restart)):

        async def act(request: web.Request, action: Callable[[], str] = action) -> web.Response:
            return await answer(lambda: {"done": action()})

        routes.post(f"/{PREFIX}/{name}")(act)
