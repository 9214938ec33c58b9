"""ComfyUI's entry point of the pack. Nothing slow is imported before a node runs."""

import json
import os
from pathlib import Path

WEB_DIRECTORY = "./web"
SETTINGS = {
    "CogVideoX-xDiT.Processes.IdleMinutes": "XDIT_IDLE_MINUTES",
    "CogVideoX-xDiT.Processes.MemoryGiB": "XDIT_MEMORY_GIB",
    "CogVideoX-xDiT.Processes.Python": "XDIT_PYTHON",
    "CogVideoX-xDiT.Processes.Preload": "XDIT_PRELOAD",
}
"""The variable that each setting of ``web/js/settings.js`` stands for."""
NONE = {"XDIT_MEMORY_GIB": 0, "XDIT_PYTHON": ""}
"""Values that mean that a variable is not set."""


def use_settings(file: Path) -> None:
    """Sets the variables of the settings that the user has changed, unless they are set already.

    Args:
        file: ComfyUI's settings of the user. One that is missing or broken is ignored, as ComfyUI does.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
        values = {variable: found[name] for name, variable in SETTINGS.items() if name in found}
    except (OSError, ValueError, TypeError):
        return
    for variable, value in values.items():
        if value is not None and value != NONE.get(variable):
            os.environ.setdefault(variable, str(int(value) if isinstance(value, bool) else value))


async def comfy_entrypoint():
    """Returns the pack's extension. ComfyUI looks for this name."""
    import folder_paths

    use_settings(
        Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    )  # before the pack reads the variables
    from .nodes import CogVideoXExtension

    return CogVideoXExtension()
