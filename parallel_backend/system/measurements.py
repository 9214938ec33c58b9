"""Files of measurements: JSON objects of named parts, in the user's cache folder.

A file that is broken, or from another version of this pack, is ignored with a warning and replaced.
"""

import json
import logging
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from ..errors import WriteFailure
from .files import whole_file

logger = logging.getLogger(__name__)


def today() -> str:
    """Returns today's date as it is saved."""
    return date.today().isoformat()


def read(
    file: Path, *, version: int, parts: tuple[str, ...], is_valid: Callable[[dict], bool] | None = None
) -> dict[str, dict]:
    """Reads a file's parts; all are empty if there is no usable file.

    Args:
        file: the file.
        version: of its layout.
        parts: names of the objects in it.
        is_valid: checks the contents further.
    """
    nothing: dict[str, dict] = {part: {} for part in parts}
    try:
        kept: Any = json.loads(file.read_text())
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError) as error:
        logger.warning("the measurements in %s cannot be read and are made again: %s", file, error)
        return nothing
    if not isinstance(kept, dict) or kept.get("version") != version:
        logger.warning("the measurements in %s are from another version and are made again", file)
        return nothing
    if not all(isinstance(kept.get(part), dict) for part in parts) or (is_valid and not is_valid(kept)):
        logger.warning("the measurements in %s are broken and are made again", file)
        return nothing
    return kept


def save(file: Path, kept: dict[str, dict], *, version: int, what: str) -> None:
    """Writes the parts of a file. If two processes do so at once, one change may be lost and is measured again.

    Args:
        file: the file; its folder is created.
        kept: all parts.
        version: of its layout.
        what: names the change, for the log.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            partial.write_text(json.dumps({**kept, "version": version}, indent=1))
    except (OSError, WriteFailure) as error:
        logger.info("%s are not saved: %s", what, error)
