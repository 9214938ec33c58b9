"""Decodes latents to frames and encodes frames to latents, in ComfyUI's layouts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from einops import rearrange

from ..checkpoint.compression import TEMPORAL
from .frames import Assembly, FrameCopier, FramesListener


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
def decode(vae, latent: torch.Tensor, strips=None, on_frames: FramesListener | None = None) -> torch.Tensor:
    """Decodes ``[batch, 16, T, h, w]`` to ``[batch, 4T-3, 8h, 8w, 3]``, float32 in 0..1 on the CPU.

    An even T decodes to 4T frames, as the first latent frame gives four instead of one; the first three are dropped.

    Args:
        vae: on its device.
        latent: unscaled.
        strips: this rank's rows, if several ranks decode together; rank 0 gets the result. See
            :mod:`parallel_backend.parallel.vae_rows`.
        on_frames: receives the result instead, on rank 0, a few frames at a time; those of a video in tiles all at once.
    """
    whole = Assembly(latent)
    with FrameCopier(vae.device, on_frames or whole.add) as copier:

        def take(video: torch.Tensor) -> None:
            copier.add(video if strips is None else strips.join(video, dim=3))

        for one in latent.split(1):
            copier.begin(skipped=0 if latent.shape[2] % 2 else TEMPORAL - 1)
            one = one if strips is None else strips.mine(one, dim=3)
            with outputs(vae.decoder, take) if not vae.use_tiling else nullcontext():
                video = vae.decode(one.to(device=vae.device, dtype=vae.dtype)).sample
            if vae.use_tiling:
                take(video)
    return torch.empty(0) if whole.videos is None else whole.videos


@contextmanager
def outputs(decoder: torch.nn.Module, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within the context, the frames of each call of a VAE's decoder are taken."""
    hook = decoder.register_forward_hook(lambda module, inputs, output: take(output[0]))
    try:
        yield
    finally:
        hook.remove()


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
