"""The video that some shipped workflows start from."""

import logging
import shutil
from pathlib import Path

import folder_paths

logger = logging.getLogger(__name__)

EXAMPLE = Path(__file__).resolve().parents[2] / "workflows" / "example.mp4"


def offer() -> None:
    """Copies the example video into ComfyUI's input folder, unless there is a file of that name.

    Load Video finds files only there, so a workflow that is dropped into the page could not run without it.
    """
    target = Path(folder_paths.get_input_directory()) / EXAMPLE.name
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(EXAMPLE, target)
    except OSError as error:
        logger.warning("%s cannot be written, so the workflow v2v needs another video: %s", target, error)
