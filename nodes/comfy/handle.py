"""Base classes of the pack's ``CLIP`` and ``VAE`` objects."""

from copy import copy
from types import SimpleNamespace

import torch

from ...parallel_backend.errors import RequestError


class NotHere(RequestError, AttributeError):
    """The core's ``CLIP`` or ``VAE`` has this attribute and the pack's does not. ``hasattr`` returns False for it."""


class Handle:
    """Refuses attributes that only the core's object has, with one sentence that names an alternative."""

    kind: str
    """The core's name for the object."""
    loader: str
    """The core's node that loads the core's own object."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # Python looks these up itself, as copy() does
            raise AttributeError(name)
        raise NotHere(
            f"this node needs '{name}', which the {self.kind} of Load CogVideoX does not have; use the core's {self.loader} here"
        )


class Placement(Handle):
    """The device of a model, where the core's Select CLIP Device and Select VAE Device read and set it on a model patcher."""

    def __init__(self, of: Handle, device: torch.device):
        self.kind, self.loader = of.kind, of.loader
        self.load_device, self.offload_device = device, torch.device("cpu")
        self.model = SimpleNamespace()
        """The core's nodes store the original device here."""

    def is_dynamic(self) -> bool:
        """Returns False: no part of the model is loaded on demand."""
        return False

    def clone(self, disable_dynamic: bool = False) -> "Placement":
        """Returns a copy whose device can be set separately."""
        return copy(self)

    def deepclone_multigpu(self, new_load_device: torch.device) -> "Placement":
        """Returns a copy for another device."""
        clone = self.clone()
        clone.load_device = new_load_device
        return clone
