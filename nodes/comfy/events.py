"""Sends messages to ComfyUI's front end. A script has none; there they are dropped."""

from typing import Any

PREFIX = "cogvideox-xdit"
"""First part of the pack's events and routes."""
LINE_BREAK = "  \n"
"""The end of a line in a node. Vue nodes show Markdown, where a line goes on after a line feed alone; the classic ones show plain text."""


def send_event(name: str, data: dict[str, Any], client_id: str | None = None) -> None:
    """Sends an event to one client, or to all of them. Any thread may call it."""
    try:
        from server import PromptServer

        PromptServer.instance.send_sync(f"{PREFIX}.{name}", data, client_id)
    except (ImportError, AttributeError, TypeError):
        pass


def send_text(text: str, node_id: str) -> None:
    """Shows a text in a node, line by line."""
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text.replace("\n", LINE_BREAK), node_id)
    except (ImportError, AttributeError, TypeError):
        pass
