"""The base class of the pack's nodes. It checks their inputs before they run."""

import inspect
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

from comfy_api.latest import io

from ..parallel_backend.errors import Failure, RequestError
from .comfy import errors
from .inputs import check_video_size, checked


def schema(*, aliases: str, **fields: Any) -> io.Schema:
    """Returns a node's schema.

    Args:
        aliases: other words that users search for, with commas between. ComfyUI 0.3.64 does not know them.
        fields: of the schema.
    """
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        fields["search_aliases"] = aliases.split(", ")
    return io.Schema(**fields)


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """Hides a widget among the node's advanced ones. ComfyUI 0.3.64 lacks the argument ``advanced``."""
    widget.extra_dict["advanced"] = True
    return widget


class CogVideoXNode(io.ComfyNode):
    """A node that checks and converts its inputs as its schema declares, whether ComfyUI or a script calls it."""

    hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    """Used if a script calls the node. ComfyUI sets its own values."""

    own_checks: frozenset[str] = frozenset()
    """Inputs that the node checks itself."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in ("execute", "check_lazy_status"):
            method = cls.__dict__.get(name)
            if method and not hasattr(method.__func__, "__wrapped__"):  # ComfyUI's clone of a class has the checks already
                setattr(cls, name, classmethod(with_checks(method.__func__)))


def with_checks(method: Callable) -> Callable:
    """Returns a node's method that checks its inputs first, and shows an error of the pack in the node before it is raised.

    For an optional input None means the default. In ``check_lazy_status`` it means an input that is not computed yet.
    """
    signature = inspect.signature(method)
    lazy = method.__name__ == "check_lazy_status"

    def check_and_run(cls, *args, **kwargs):
        bound = signature.bind(cls, *args, **kwargs)
        given = bound.arguments
        for declared in (cls.SCHEMA or cls.define_schema()).inputs:
            value = given.get(declared.id)
            if declared.id not in given or declared.id in cls.own_checks:
                continue
            if value is None and declared.optional:
                del given[declared.id]  # use the default
            elif value is not None or not lazy:
                given[declared.id] = checked(value, declared)
        check_video_size(given)
        return method(*bound.args, **bound.kwargs)

    @wraps(method)
    def run(cls, *args, **kwargs):
        try:
            return check_and_run(cls, *args, **kwargs)
        except (RequestError, Failure) as error:
            errors.show(error, cls.hidden.unique_id)
            raise
        except RuntimeError as error:
            if not (full := errors.out_of_memory(error)):
                raise
            errors.show(full, cls.hidden.unique_id)
            raise full from error

    return run
