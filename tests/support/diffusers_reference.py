"""Reference latents from diffusers' own pipelines, for the tests' prompts."""

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from ..conftest import NEGATIVE, PROMPT

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


def reference(pipeline, *, size, batch=1, steps=8, seed=3, cfg=6.0, scheduler, dynamic_cfg=False, **given) -> torch.Tensor:
    """Returns diffusers' latents in ComfyUI's layout. The arguments are those of the fixture ``make_job``."""
    width, height, frames = size
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    latents = pipeline(
        prompt=[PROMPT] * batch,
        negative_prompt=[NEGATIVE] * batch,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=cfg,
        use_dynamic_cfg=dynamic_cfg,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        output_type="latent",
        **given,
    ).frames
    latents = latents[:, -((frames - 1) // 4 + 1) :]  # CogVideoX 1.5 keeps its padding here
    return latents.permute(0, 2, 1, 3, 4) / pipeline.vae.config.scaling_factor
