"""Finds a model by what a person calls it."""

from pathlib import Path

from .errors import RequestError

DEMO, DEMO_I2V = "demo", "demo-i2v"
"""The small trained models that come with the pack: text to video, and image to video, which borrows VAE and text from it."""
SHIPPED = Path(__file__).parent / "checkpoints"
"""Where they lie; how they were made is in ``training/``."""


def shipped() -> dict[str, Path]:
    """The models that come with the pack, by name."""
    return {name: SHIPPED / name for name in (DEMO, DEMO_I2V)}


def find(name: str) -> Path:
    """The checkpoint for the name of a model that comes with the pack, or for a path, which may be a transformer's single file.

    Raises:
        RequestError: when there is none.
    """
    if name in shipped():
        return shipped()[name]
    path = Path(name).expanduser()
    if not path.exists():
        names = " or ".join(f"'{known}'" for known in shipped())
        raise RequestError(f"there is no checkpoint folder {path}; give a folder in diffusers layout, or {names}")
    return path.resolve()
