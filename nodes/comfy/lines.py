"""The lines that a node shows of its execution: they stay together, where ComfyUI would replace each by the next."""

import logging


class Lines:
    """The lines of each node of the prompt that runs."""

    def __init__(self):
        self._prompt_id: str | None = None
        self._lines: dict[str, dict[str, int]] = {}
        """By node: each line's level."""

    def add(self, line: str, level: int, node_id: str, prompt_id: str | None) -> str:
        """Adds a line to a node. Returns all of the node's lines, warnings first.

        Lines of an earlier prompt are dropped; without a prompt a line stands alone.
        """
        if prompt_id is None or prompt_id != self._prompt_id:
            self._prompt_id, self._lines = prompt_id, {}
        levels = self._lines.setdefault(node_id, {})
        levels[line] = max(level, levels.get(line, level))
        return "\n".join(sorted(levels, key=levels.get, reverse=True))


def executing() -> tuple[str | None, str | None]:
    """The prompt and the node that ComfyUI executes; None where there is none."""
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
    """Shows a line in a node, by default the one that is executing, with the lines that it shows already."""
    prompt_id, current = executing()
    node_id = node_id or current
    if node_id is None:
        return
    text = _lines.add(line, level, node_id, prompt_id)
    try:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)
    except (ImportError, AttributeError, TypeError):  # a script has no front end
        pass
