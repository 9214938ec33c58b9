"""The cache folder of the pack, for compiled kernels and measured rates."""

import logging
import os
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "cogvideox-xdit"


def preferred_cache() -> Path:
    """Returns the pack's folder in the user's cache, or :func:`temporary_cache` for a user without a home. Not created."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / NAME if os.path.isabs(base) else temporary_cache()


def temporary_cache() -> Path:
    """Returns the fallback in the system's temporary folder."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"{NAME}-cache-{user}"


@cache
def writable_cache() -> Path:
    """Returns the first of the two that is writable, creating it. Logs a warning if that is not the preferred one."""
    preferred = preferred_cache()
    for folder in (preferred, temporary_cache()):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder != preferred and hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
                raise OSError(None, f"{folder} belongs to another user")  # whose kernels this process would run
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**16))
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        if folder != preferred:
            logger.warning("compiled kernels are kept in %s, as %s cannot be used: %s", folder, preferred, reason)
        return folder
    logger.warning("compiled kernels cannot be kept: %s: %s", preferred, reason)
    return preferred
