"""Finds a model by what a person calls it."""

from pathlib import Path

from .errors import RequestError

DEMO = "demo"
SHIPPED = Path(__file__).parent / "checkpoints"
"""The models that come with the pack; how they were made is in ``training/``."""


def demo_folder() -> Path:
    """The small trained model that comes with the pack."""
    return SHIPPED / DEMO


def find(name: str) -> Path:
    """The checkpoint for ``demo`` or a path, which may be a transformer's single file.

    Raises:
        RequestError: when there is none.
    """
    if name == DEMO:
        return demo_folder()
    path = Path(name).expanduser()
    if not path.exists():
        raise RequestError(f"there is no checkpoint folder {path}; give a folder in diffusers layout, or '{DEMO}'")
    return path.resolve()
