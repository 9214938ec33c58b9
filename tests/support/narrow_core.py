"""Makes ComfyUI's CogVideoX VAE and T5-XXL as narrow as the tests' weights, and its optical flow a constant. Other code is the core's.

This is a custom node of the tests' ComfyUI. The core has both sizes in its code, and a real T5-XXL and VAE are 10 GB. The
number of layers (24) and the feed-forward width (10240) are unchanged, because the core recognizes a T5-XXL by them. A ComfyUI
without CogVideoX (0.3.64) cannot import this file; the tests that need it are skipped there.
"""

import sys
from functools import partial

import comfy.ldm.cogvideo.vae as cogvideo
import torch
from comfy.text_encoders import sd3_clip

NODE_CLASS_MAPPINGS = {}

cogvideo.AutoencoderKLCogVideoX = partial(
    cogvideo.AutoencoderKLCogVideoX, block_out_channels=(16, 16, 32, 32), layers_per_block=1, groups=8
)
of_full_width = sd3_clip.T5XXLModel.__init__


def narrow(self, *args, model_options, **options):
    """T5-XXL with the widths of tests/support/core_files.py."""
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4}
    of_full_width(self, *args, model_options={**model_options, "t5xxl_model_config": sizes}, **options)


sd3_clip.T5XXLModel.__init__ = narrow


class Flow(torch.nn.Module):
    """In place of RAFT, which takes a second a frame: everything moves by one pixel and a half to the right."""

    def __init__(self, **options):
        super().__init__()
        for part in ("feature_encoder", "context_encoder", "update_block"):  # by which the core recognizes RAFT
            setattr(self, part, torch.nn.Linear(1, 1))

    def forward(self, one, other):
        return [torch.cat([torch.full_like(one[:, :1], 1.5), torch.zeros_like(one[:, :1])], dim=1)]


for module in [*sys.modules.values()]:
    if "OpticalFlowLoader" in getattr(module, "__dict__", {}):
        module.raft_large = Flow
