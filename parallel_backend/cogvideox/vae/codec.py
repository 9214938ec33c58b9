"""Decodes latents to frames and encodes frames to latents, in ComfyUI's layouts."""

import torch
from einops import rearrange

from ..checkpoint.facts import TEMPORAL

STAGED_BYTES = 2**25
"""Size of the buffer for copying a video from a GPU."""


def stops(vae) -> list[torch.nn.Module]:
    """Returns the modules before which decoding and encoding can be cancelled.

    On a GPU that is before each batch of frames of a tile, at most a second apart. On other devices a batch may take half a
    minute, so it is before each residual block.
    """
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

    if vae.device.type == "cuda":
        return [vae.encoder, vae.decoder]
    return [module for module in vae.modules() if isinstance(module, CogVideoXResnetBlock3D)]


@torch.inference_mode()
def decode(vae, latent: torch.Tensor, strips=None) -> torch.Tensor:
    """Decodes ``[batch, 16, T, h, w]`` to ``[batch, 4T-3, 8h, 8w, 3]``, float32 in 0..1 on the CPU.

    An even T decodes to 4T frames, as the first latent frame gives four instead of one; the first three are dropped.

    Args:
        vae: on its device.
        latent: unscaled.
        strips: this rank's rows, if several ranks decode together; rank 0 gets the result. See
            :mod:`parallel_backend.parallel.vae_rows`.
    """
    frames = (latent.shape[2] - 1) * TEMPORAL + 1
    videos = []
    for one in latent.split(1):
        one = one if strips is None else strips.mine(one, dim=3)
        video = vae.decode(one.to(device=vae.device, dtype=vae.dtype)).sample[:, :, -frames:]
        video = video if strips is None else strips.join(video, dim=3)
        videos.append(to_pixels(rearrange(video, "1 colours frames height width -> frames height width colours")))
    return torch.stack(videos) if len(videos) > 1 else videos[0][None]


def brightness(video: torch.Tensor) -> torch.Tensor:
    """Converts values in -1..1 to float32 in 0..1."""
    return (video.float() / 2 + 0.5).clamp_(0, 1)


def to_pixels(video: torch.Tensor) -> torch.Tensor:
    """Converts values in -1..1 to float32 in 0..1 on the CPU.

    From a GPU it copies a few frames at a time, on CUDA through pinned memory, which torch caches for the next video.
    """
    if video.device.type == "cpu":
        return brightness(video)
    pixels = torch.empty(video.shape)
    some = max(STAGED_BYTES * len(video) // max(pixels.nbytes, 1), 1)
    staged = torch.empty(video[:some].shape, pin_memory=video.is_cuda)
    for part, target in zip(video.split(some), pixels.split(some)):
        target.copy_(staged[: len(part)].copy_(brightness(part)))
    return pixels


@torch.inference_mode()
def encode(vae, pixels: torch.Tensor, strips=None) -> torch.Tensor:
    """Encodes ``[frames, height, width, 3]`` in 0..1 to the mean latent ``[1, 16, T, h, w]``, float32 on the CPU.

    Args:
        vae: on its device.
        pixels: 4k+1 frames.
        strips: see :func:`decode`.
    """
    pixels = pixels if strips is None else strips.mine(pixels, dim=1)
    video = (pixels.to(vae.device) * 2 - 1).to(vae.dtype)
    latent = vae.encode(rearrange(video, "frames height width colours -> 1 colours frames height width")).latent_dist.mode()
    return (latent if strips is None else strips.join(latent, dim=3)).float().cpu()
