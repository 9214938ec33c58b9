"""Finds a model by what a person calls it."""

import logging
import os
from pathlib import Path

from .errors import RequestError

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_LIKE = "5b"


def cache_folder() -> Path:
    """Where the pack keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cogvideox-xdit"


def demo_folder() -> Path:
    """The demo model: small, with seeded random weights, made at its first use."""
    folder = cache_folder() / f"{DEMO}-{DEMO_LIKE}-3"
    if not folder.is_dir():
        from .cogvideox.random_weights import build

        logger.info("making the demo model in %s", folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        build(folder, like=DEMO_LIKE)
    logger.warning("the demo model has random weights: its videos are noise")
    return folder


def find(name: str) -> Path:
    """The checkpoint folder for ``demo`` or a path.

    Raises:
        RequestError: when there is no such folder.
    """
    if name == DEMO:
        return demo_folder()
    path = Path(name).expanduser()
    if not path.is_dir():
        raise RequestError(f"there is no checkpoint folder {path}; give a folder in diffusers layout, or '{DEMO}'")
    return path.resolve()
