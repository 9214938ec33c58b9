"""The status lines of a node. They accumulate while a prompt runs; ComfyUI alone would replace each line with the next."""

import logging


class Lines:
    """The lines of each node in the current prompt."""

    def __init__(self):
        self._prompt_id: str | None = None
        self._lines: dict[str, dict[str, int]] = {}
        """The logging level of each line, by node."""

    def add(self, line: str, level: int, node_id: str, prompt_id: str | None) -> str:
        """Adds a line to a node. Returns all lines of the node, warnings first.

        A new prompt drops the lines of the previous one. Without a prompt id only the new line is kept.
        """
        if prompt_id is None or prompt_id != self._prompt_id:
            self._prompt_id, self._lines = prompt_id, {}
        levels = self._lines.setdefault(node_id, {})
        levels[line] = max(level, levels.get(line, level))
        return self.of(node_id)

    def of(self, node_id: str) -> str:
        """Returns all lines of a node, warnings first."""
        levels = self._lines.get(node_id, {})
        return "\n".join(sorted(levels, key=levels.get, reverse=True))


def executing() -> tuple[str | None, str | None]:
    """Returns the ids of the prompt and the node that ComfyUI executes, or None if there is none."""
    try:
        from comfy_execution.utils import get_executing_context

        if context := get_executing_context():
            return context.prompt_id, context.node_id
    except ImportError:
        pass
    try:
        from server import PromptServer

        return PromptServer.instance.last_prompt_id, PromptServer.instance.last_node_id
    except (ImportError, AttributeError):
        return None, None


_lines = Lines()


def show(line: str, level: int = logging.INFO, node_id: str | None = None) -> None:
    """Adds a line to those that a node shows, by default the node that is executing."""
    prompt_id, current = executing()
    node_id = node_id or current
    if node_id is not None:
        _send(_lines.add(line, level, node_id, prompt_id), node_id)


def show_for_now(line: str, node_id: str | None) -> None:
    """Shows a line below those of a node until the next line is shown."""
    if node_id is not None:
        _send("\n".join(filter(None, [_lines.of(node_id), line])), node_id)


def _send(text: str, node_id: str) -> None:
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)
    except (ImportError, AttributeError, TypeError):  # a script has no front end
        pass
