"""diffusers' VAE with fewer passes over memory, on the full image or on one rank's strip of rows.

Modules, weights and the loops over blocks and frames are diffusers'. The differences:

- A norm, its condition on the latent, and SiLU are one pass. It writes into the next convolution's padded input, after the
  cached previous frames and, in a strip, between the neighbours' rows.
- The condition is two 1x1 convolutions of the latent, upsampled to the image. They are computed before upsampling: the same
  values for a hundredth of the work.
- Frames are duplicated in time after the upsampling convolution of each, not before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.block_torch import keep_kernels
from ..kernels.probe import once
from ..kernels.vae_torch import TorchVaeOps, convolve

CHANNELS_LAST = True
"""Whether GPUs use the channels-last memory format, which cuDNN's 16-bit convolutions and the kernels prefer."""
SEARCH = False
"""Whether cuDNN benchmarks its convolutions for each new size on a GPU, instead of choosing by heuristics."""

WORTH_COMPILING = 2**30
"""Working memory of a job in bytes, from which on the one or two seconds of the first compilation are worth it."""


@contextmanager
def searching() -> Iterator[None]:
    """Within the context, cuDNN chooses convolutions as ``SEARCH`` says."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = SEARCH
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Whole:
    """The rows of an image that one rank has entirely.

    See :class:`parallel_backend.parallel.vae_rows.Strips` for several ranks.
    """

    border = 0
    """Rows above and below that are part of a convolution's input, instead of its zero padding."""

    def fill(self, states: torch.Tensor, *, above: int, below: int) -> None:
        """Fills the border rows of ``[…, height, width]`` in place: zeros, or the neighbours' rows.

        Args:
            states: with border rows.
            above, below: number of border rows, 0 or 1.
        """
        for row in [0] * above + [-1] * below:
            states[..., row, :] = 0

    def moments(self, mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and variance ``[batch, groups]`` of the full image, given those of this rank's rows."""
        return mean, variance


class Layers:
    """The layers of one ``AutoencoderKLCogVideoX``, whose forwards they replace. Created once per VAE by :func:`use`."""

    def __init__(self, vae):
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXResnetBlock3D
        from diffusers.models.downsampling import CogVideoXDownsample3D
        from diffusers.models.upsampling import CogVideoXUpsample3D

        self.kernels = TorchVaeOps()
        self.rows = Whole()
        self.memory_format = torch.contiguous_format
        forwards = {
            CogVideoXResnetBlock3D: self.resnet,
            CogVideoXCausalConv3d: self.causal,
            CogVideoXUpsample3D: self.upsample,
            CogVideoXDownsample3D: self.downsample,
        }
        for module in vae.modules():
            if type(module) in forwards:
                module.forward = partial(forwards[type(module)], module)
        for coder in (vae.encoder, vae.decoder):
            coder.conv_act.forward = lambda states: states  # fused into the norm
        vae.encoder.norm_out.forward = lambda states: self.norm(vae.encoder.norm_out, states)
        vae.decoder.norm_out.forward = lambda states, zq, conv_cache=None: (self.norm(vae.decoder.norm_out, states, zq), None)

    def empty(self, states: torch.Tensor, *sizes: int) -> torch.Tensor:
        """Returns an uninitialised tensor ``[batch, *sizes]`` with the dtype and device of ``states``."""
        size = (states.shape[0], *sizes)
        return torch.empty(size, dtype=states.dtype, device=states.device, memory_format=self.memory_format)

    def padded_input(self, states: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocates a convolution's input, with ``depth`` frames in front and border rows.

        Also returns the view without them.
        """
        _, channels, frames, rows, columns = states.shape
        padded = self.empty(states, channels, frames + depth, rows + 2 * self.rows.border, columns)
        return padded, padded[:, :, depth:].narrow(3, self.rows.border, rows)

    def convolve_causal(self, layer, padded: torch.Tensor, kept: torch.Tensor | None, bias: torch.Tensor | None = None):
        """Runs a causal convolution on an input from :meth:`padded_input`.

        Args:
            layer: a ``CogVideoXCausalConv3d``.
            padded: input ``[batch, channels, frames, height, width]``.
            kept: last frames of the previous call; None repeats the first frame.
            bias: added by the convolution; None leaves it to the next operation.
        Returns:
            The output, and the last frames for the next call.
        """
        depth = layer.time_kernel_size - 1
        self.rows.fill(padded[:, :, depth:], above=self.rows.border, below=self.rows.border)
        padded[:, :, :depth] = padded[:, :, depth : depth + 1] if kept is None else kept
        return convolve(layer.conv, padded, self.rows.border, bias), padded[:, :, -depth:].clone()

    def causal(self, layer, inputs: torch.Tensor, conv_cache: torch.Tensor | None = None):
        """The forward of a ``CogVideoXCausalConv3d`` with a temporal kernel size of three."""
        padded, inside = self.padded_input(inputs, layer.time_kernel_size - 1)
        inside.copy_(inputs)
        return self.convolve_causal(layer, padded, conv_cache, layer.conv.bias)

    def norm(self, norm, states, zq=None, *, bias=None, out=None) -> torch.Tensor:
        """Normalises, applies the condition on the latent ``zq``, if any, and SiLU."""
        group_norm = norm if zq is None else norm.norm_layer
        mean, variance = self.rows.moments(*self.kernels.moments(states, bias, group_norm.num_groups))
        gain, offset = (None, None) if zq is None else (self.pointwise(layer.conv, zq) for layer in (norm.conv_y, norm.conv_b))
        out = self.empty(states, *states.shape[1:]) if out is None else out
        self.kernels.normalise(states, bias, mean, variance, group_norm, gain, offset, out)
        return out

    @staticmethod
    def pointwise(convolution: nn.Conv3d, latent: torch.Tensor) -> torch.Tensor:
        """Runs a 1x1x1 convolution in float32.

        It is cheap at the latent's size, and avoids a fifth of the rounding error of 16 bits.
        """
        weight, bias = convolution.weight.flatten(1).float(), convolution.bias.float()
        return F.linear(latent.movedim(1, -1).float(), weight, bias).movedim(-1, 1)

    def resnet(self, block, inputs: torch.Tensor, temb=None, zq: torch.Tensor | None = None, conv_cache: dict | None = None):
        """The forward of a ``CogVideoXResnetBlock3D``; this VAE has no ``temb``."""
        conv_cache, new_cache, states, bias = conv_cache or {}, {}, inputs, None
        for norm, name in ((block.norm1, "conv1"), (block.norm2, "conv2")):
            layer = getattr(block, name)
            padded, inside = self.padded_input(states, layer.time_kernel_size - 1)
            self.norm(norm, states, zq, bias=bias, out=inside)
            states, new_cache[name] = self.convolve_causal(layer, padded, conv_cache.get(name))
            bias = layer.conv.bias
            del padded, inside  # frees memory before the next allocation
        if block.in_channels != block.out_channels:
            inputs = block.conv_shortcut(inputs)
        return self.kernels.add(states, bias, inputs), new_cache

    def frame_by_frame(self, convolution: nn.Conv2d, states: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
        """Runs a 2D convolution on each frame of ``[batch, channels, frames, height, width]``."""
        flat = states.transpose(1, 2).flatten(0, 1)
        flat = F.conv2d(flat, convolution.weight, convolution.bias, convolution.stride, padding)
        return flat.unflatten(0, (states.shape[0], -1)).transpose(1, 2)

    def upsample(self, layer, inputs: torch.Tensor) -> torch.Tensor:
        """The forward of a ``CogVideoXUpsample3D``."""
        _, channels, frames, rows, columns = inputs.shape
        border = self.rows.border
        padded = self.empty(inputs, channels, frames, 2 * rows + 2 * border, 2 * columns)
        self.kernels.enlarge(inputs, padded.narrow(3, border, 2 * rows))
        self.rows.fill(padded, above=border, below=border)
        states = self.frame_by_frame(layer.conv, padded, (1 - border, 1))
        if not layer.compress_time or frames == 1:
            return states
        doubled = self.empty(states, states.shape[1], 2 * frames - frames % 2, *states.shape[3:])
        self.kernels.enlarge(states, doubled)
        return doubled

    def downsample(self, layer, states: torch.Tensor) -> torch.Tensor:
        """The forward of a ``CogVideoXDownsample3D``."""
        _, channels, frames, rows, columns = states.shape
        first = frames % 2
        halved = layer.compress_time and frames > 1
        padded = self.empty(states, channels, (frames + first) // 2 if halved else frames, rows + 1, columns + 1)
        inside = padded[..., :-1, :-1]
        if halved:
            inside[:, :, :first] = states[:, :, :first]
            inside[:, :, first:] = states[:, :, first:].unflatten(2, (-1, 2)).mean(3)
        else:
            inside.copy_(states)
        padded[..., -1] = 0
        self.rows.fill(padded, above=0, below=1)
        return self.frame_by_frame(layer.conv, padded, (0, 0))


def triton_kernels():
    """Returns the fused kernels. Imports Triton, which is not available everywhere."""
    from ..kernels.vae_triton import TritonVaeOps

    return TritonVaeOps()


@once
def why_not_compiled(device: torch.device) -> str | None:
    """Returns why a VAE's kernels cannot be compiled for a device, in one line, or None. Tested once with the smallest one."""
    if device.type != "cuda":
        return "its kernels are for GPUs"
    keep_kernels()
    triton_kernels().moments(torch.ones(1, 16, 1, 1, 1, device=device), None, 4)
    return None


def use(vae, *, compiled: bool = False) -> Layers:
    """Attaches this module's layers to a VAE, with compiled kernels or torch's.

    Call it when the VAE is on the device where it will run.
    """
    if not hasattr(vae, "layers"):
        vae.layers = Layers(vae)
    vae.layers.kernels = triton_kernels() if compiled else TorchVaeOps()
    set_memory_format(vae, last=vae.device.type == "cuda" and (CHANNELS_LAST or compiled))
    return vae.layers


def set_memory_format(vae, *, last: bool) -> None:
    """Sets the memory format of a VAE with :class:`Layers` to channels last or contiguous."""
    formats = {5: torch.channels_last_3d, 4: torch.channels_last} if last else {}
    vae.layers.memory_format = formats.get(5, torch.contiguous_format)
    for weight in vae.parameters():
        if weight.ndim >= 4:
            with torch.inference_mode(weight.is_inference()):  # ComfyUI's thread is in inference mode; weights may not be
                weight.data = weight.data.contiguous(memory_format=formats.get(weight.ndim, torch.contiguous_format))
