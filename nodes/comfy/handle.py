"""What this pack's objects under the core's ``CLIP`` and ``VAE`` have in common."""

from copy import copy
from types import SimpleNamespace

import torch

from ...parallel_backend.errors import RequestError


class NotHere(RequestError, AttributeError):
    """An attribute of the core's ``CLIP`` or ``VAE`` that this pack's has not. ``hasattr`` is False for it."""


class Handle:
    """Refuses in one sentence what a core object has and this pack's has not."""

    kind: str
    """The core's name of it."""
    loader: str
    """The core's node that gives the core's own."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # Python asks for these, not a node
            raise AttributeError(name)
        raise NotHere(
            f"this node needs '{name}', which the {self.kind} of Load CogVideoX does not have; use the core's {self.loader} here"
        )


class Placement(Handle):
    """Where a model runs, as the core's Select CLIP Device and Select VAE Device read and set it on a model patcher."""

    def __init__(self, of: Handle, device: torch.device):
        self.kind, self.loader = of.kind, of.loader
        self.load_device, self.offload_device = device, torch.device("cpu")
        self.model = SimpleNamespace()
        """The core's nodes note here where it ran at first."""

    def is_dynamic(self) -> bool:
        """No part of the model is loaded on demand."""
        return False

    def clone(self, disable_dynamic: bool = False) -> "Placement":
        """Returns another that can be set apart."""
        return copy(self)

    def deepclone_multigpu(self, new_load_device: torch.device) -> "Placement":
        """Returns another for a device."""
        clone = self.clone()
        clone.load_device = new_load_device
        return clone
