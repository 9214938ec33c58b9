"""What the installed libraries have and can do."""

from importlib import import_module
from threading import Lock
from typing import Any

READING = Lock()
"""Held while transformers reads a model. It changes its own classes meanwhile, and two threads would leave them changed for good."""
_importing = Lock()


def member(library: str, name: str) -> Any:
    """Returns a class of diffusers or transformers. Threads import one after the other.

    Both libraries replace themselves at the end of their import, so an ``import`` statement would give a thread the unfinished one
    while another thread imports it. Two threads that import different parts of a library may find modules unfinished, too.
    """
    with _importing:
        return getattr(import_module(library), name)


def dtype_argument(cls) -> str:
    """Returns the name of the dtype argument of ``cls.from_pretrained``: diffusers and transformers both renamed it."""
    from importlib.metadata import version

    from packaging.version import Version

    library = cls.__module__.partition(".")[0]
    renamed = {"diffusers": "0.42", "transformers": "4.56"}[library]
    return "dtype" if Version(version(library)) >= Version(renamed) else "torch_dtype"
