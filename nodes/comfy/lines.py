"""The status lines of nodes. They accumulate while a prompt runs, and are kept until the node runs again.

The front end alone would replace each line with the next, and forget the last one when the page is loaded again.
"""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from .events import send_event, send_text

KEPT_WORKFLOWS = 64
"""Workflows whose lines are kept."""


@dataclass(frozen=True)
class Execution:
    """What ComfyUI executes; a part that is unknown is None."""

    prompt_id: str | None = None
    node_id: str | None = None
    workflow: str | None = None
    """The id in the workflow's file, which is the same after a reload."""


@dataclass
class NodeLines:
    """The lines of one node from one prompt."""

    prompt_id: str | None
    levels: dict[str, int] = field(default_factory=dict)
    """The logging level of each line."""

    def in_order(self) -> list[tuple[str, int]]:
        """Returns lines and levels, warnings first."""
        return sorted(self.levels.items(), key=lambda item: item[1], reverse=True)


class Lines:
    """The lines of each node of each workflow, from the last prompt that ran the node."""

    def __init__(self):
        self._lock = threading.Lock()
        self._last_prompt: str | None = None
        self._workflows: OrderedDict[str | None, dict[str, NodeLines]] = OrderedDict()

    def add(self, line: str, level: int, node_id: str, execution: Execution) -> str:
        """Adds a line to a node. Returns all lines of the node, warnings first.

        A new prompt drops the lines that the node has from the previous one. Without a prompt id only the new line is kept.
        """
        with self._lock:
            self._last_prompt = execution.prompt_id
            nodes = self._workflows.setdefault(execution.workflow, {})
            self._workflows.move_to_end(execution.workflow)
            while len(self._workflows) > KEPT_WORKFLOWS:
                self._workflows.popitem(last=False)
            found = nodes.get(node_id)
            if found is None or found.prompt_id is None or found.prompt_id != execution.prompt_id:
                found = nodes[node_id] = NodeLines(execution.prompt_id)
            found.levels[line] = max(level, found.levels.get(line, level))
        return self.of(node_id, execution)

    def of(self, node_id: str, execution: Execution) -> str:
        """Returns all lines of a node from the prompt that runs, warnings first."""
        with self._lock:
            found = self._workflows.get(execution.workflow, {}).get(node_id)
            if found is None or found.prompt_id != execution.prompt_id:
                return ""
            return "\n".join(line for line, _ in found.in_order())

    def of_workflow(self, workflow: str) -> dict[str, list[dict[str, str]]]:
        """Returns the lines of each node of a workflow as plain values, warnings first."""
        with self._lock:
            nodes = self._workflows.get(workflow, {})
            return {
                node_id: [{"text": line, "level": logging.getLevelName(level).lower()} for line, level in found.in_order()]
                for node_id, found in nodes.items()
            }

    def warnings(self) -> list[str]:
        """Returns the warnings and errors of the prompt that ran last, in whichever node."""
        with self._lock:
            nodes = next(reversed(self._workflows.values()), {})
            return [
                line
                for found in nodes.values()
                if found.prompt_id == self._last_prompt
                for line, level in found.in_order()
                if level >= logging.WARNING
            ]


def executing() -> Execution:
    """Returns what ComfyUI executes."""
    prompt_id, node_id = _executing_ids()
    return Execution(prompt_id, node_id, _workflow_of(prompt_id))


def _executing_ids() -> tuple[str | None, str | None]:
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


def _workflow_of(prompt_id: str | None) -> str | None:
    """Returns the id of the workflow from which a running prompt was queued; None for a prompt from a script."""
    try:
        from server import PromptServer

        running = list(PromptServer.instance.prompt_queue.currently_running.values())
        (options,) = [item[3] for item in running if item[1] == prompt_id]
        return options["extra_pnginfo"]["workflow"]["id"]
    except (ImportError, AttributeError, KeyError, TypeError, IndexError, ValueError):
        return None


kept = Lines()


def show(line: str, level: int = logging.INFO, node_id: str | None = None) -> None:
    """Adds a line to those that a node shows, by default the node that is executing."""
    execution = executing()
    node_id = node_id or execution.node_id
    if node_id is not None:
        send_text(kept.add(line, level, node_id, execution), node_id)
        if level >= logging.WARNING:
            send_event("line", {"node": node_id, "text": line, "level": logging.getLevelName(level).lower()})


def show_for_now(line: str, node_id: str | None) -> None:
    """Shows a line below those of a node until the next line is shown."""
    if node_id is not None:
        send_text("\n".join(filter(None, [kept.of(node_id, executing()), line])), node_id)
