"""The prompt that ComfyUI checks at the moment.

A node's check is given only the inputs that its arguments name, and what it refuses is reported once for each of them. So a check of
several inputs has one argument, and reads the others here.
"""

from contextvars import ContextVar
from typing import Any

_submitted: ContextVar[dict[str, Any]] = ContextVar("submitted")


def watch() -> None:
    """Has ComfyUI pass on each prompt before it is checked. A script has no server, and checks nothing."""
    try:
        from server import PromptServer

        PromptServer.instance.add_on_prompt_handler(remember)
    except (ImportError, AttributeError):
        pass


def remember(submitted: dict[str, Any]) -> dict[str, Any]:
    """Remembers a prompt for the task that checks it. Returns it unchanged."""
    _submitted.set(submitted)
    return submitted


def value_of(node_id: str | None, name: str) -> Any:
    """Returns the value of a node's input; None if it comes from another node, or is not known."""
    try:
        value = _submitted.get({})["prompt"][node_id]["inputs"][name]
    except (KeyError, TypeError):
        return None
    return None if isinstance(value, list) else value


def client_id() -> str | None:
    """Returns the client that submitted the prompt; None if it is not known."""
    return _submitted.get({}).get("client_id")
