"""The images and the video that some shipped workflows start from."""

import logging
import shutil
from pathlib import Path

import folder_paths

logger = logging.getLogger(__name__)

EXAMPLES = Path(__file__).resolve().parents[2] / "workflows" / "input"


def offer() -> None:
    """Copies the examples into ComfyUI's input folder, except those whose name is taken.

    Load Image and Load Video find files only there, so a workflow that is dropped into the page could not run without them.
    """
    folder = Path(folder_paths.get_input_directory())
    for example in sorted(EXAMPLES.iterdir()):
        target = folder / example.name
        if target.exists():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(example, target)
        except OSError as error:
            logger.warning("%s cannot be written, so some shipped workflows need another file: %s", target, error)
            return
