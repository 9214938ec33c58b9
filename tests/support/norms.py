"""Group norms off, for ComfyUI's VAE and for diffusers': read in both interpreters, so only torch is imported."""

import torch


def without_norms(module: torch.nn.Module) -> None:
    """Lets every group norm of a module hand on what it is given."""
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = lambda values: values
