"""Sends messages to ComfyUI's front end. A script has none; there they are dropped."""

import re
from typing import Any

from ...parallel_backend.errors import readable

PREFIX = "cogvideox-xdit"
"""First part of the pack's events and routes."""
LINE_BREAK = "  \n"
"""The end of a line in a node. Vue nodes show Markdown, where a line goes on after a line feed alone; the classic ones show plain text."""
MARKUP = re.compile(r"[\\`*~\[<&]|(?<![a-zA-Z\d])_|_(?![a-zA-Z\d])|^[ \t#+=>-]|^\d(?=\d*[.)])", re.MULTILINE | re.ASCII)
"""Where Markdown or HTML starts or ends anything but a link: some characters anywhere, others around a word, or before a line."""


def send_event(name: str, data: dict[str, Any], client_id: str | None = None) -> None:
    """Sends an event to one client, or to all of them. Any thread may call it."""
    try:
        from server import PromptServer

        PromptServer.instance.send_sync(f"{PREFIX}.{name}", data, client_id)
    except (ImportError, AttributeError, TypeError):
        pass


def send_text(text: str, node_id: str) -> None:
    """Shows a text in a node, line by line and as it is."""
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(escaped(text).replace("\n", LINE_BREAK), node_id)
    except (ImportError, AttributeError, TypeError):
        pass


def escaped(text: str) -> str:
    """Returns a text with its markup as character references, which both renderers of ComfyUI show as the characters."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", readable(text))
