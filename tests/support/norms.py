"""Turns group norms off in ComfyUI's VAE and in diffusers'. Both interpreters import it, so it needs only torch."""

import torch


def without_norms(module: torch.nn.Module) -> None:
    """Makes every group norm of a module return its input."""
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = lambda values: values
