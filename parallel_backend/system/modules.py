"""Looks for modules and packages without importing them."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def has_module(name: str) -> bool:
    """Returns whether a module can be imported, importing at most its parent package.

    Other packs put stand-ins into ``sys.modules``. One without a specification is not the package.
    """
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def version_of(package: str) -> str:
    """Returns the version of a package; ``unknown`` if it was built from its repository."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
