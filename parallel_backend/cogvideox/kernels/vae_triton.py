"""A VAE's operations between its convolutions, in Triton, each in one pass over memory; for states in channels-last format.

A program processes a row of one frame, or several rows. So the position in the latent is computed once per row, and within it
by a shift. The generic kernels of torch's compiler would divide by unknown sizes, five times per element.
"""

import torch
import triton
import triton.language as tl

TILE = 4096
"""Elements that a program holds at a time."""
WARPS = 4
"""Warps per program."""
PROGRAMS = 800
"""Programs that keep a GPU busy; with more rows, a program computes the moments of several."""


SIZES = ["frames", "rows", "columns", "lines", "first", "times", "scale", "biased", "pixels"]
"""Arguments that kernels are not specialised for, so that a few kernels, compiled in seconds, serve every image size."""


@triton.jit
def _place(row, frames, rows):
    """Returns batch, frame, and row within the frame, in 64 bits for offsets in large tensors."""
    row = row.to(tl.int64)
    return row // (frames * rows), row // rows % frames, row % rows


@triton.jit
def _made_of(frame, first, times):
    """Returns the source frame of a frame: the ``first`` (0 or 1) frames have their own, then ``times`` frames share one."""
    return tl.where(frame < first, 0, first + (frame - first) // times)


@triton.jit(do_not_specialize=SIZES)
def _moments(
    states, bias, found, frames, rows, columns, lines, biased, s_batch, s_frame, s_row,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes each channel's mean and variance over ``lines`` rows.

    The results are in ``found`` ``[2, batch * frames * rows / lines, channels]``.
    """
    program = tl.program_id(0)
    batch, frame, line = _place(program, frames, rows // lines)
    channel = tl.arange(0, WIDTH)
    there = channel < CHANNELS
    source = states + batch * s_batch + frame * s_frame + line * lines * s_row
    # Sums of differences from a value nearby stay precise with a large mean.
    near = tl.load(source + channel, mask=there, other=0).to(tl.float32)
    total = tl.zeros([COLUMNS, WIDTH], tl.float32)
    squares = tl.zeros([COLUMNS, WIDTH], tl.float32)
    for _ in range(0, lines):
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (column < columns)[:, None] & there[None, :]
            value = tl.load(source + column[:, None] * CHANNELS + channel[None, :], mask=inside, other=0).to(tl.float32)
            value = tl.where(inside, value - near[None, :], 0)
            total += value
            squares += value * value
        source += s_row
    mean = tl.sum(total, 0) / (lines * columns)
    variance = tl.sum(squares, 0) / (lines * columns) - mean * mean
    mean += near + tl.load(bias + channel, mask=channel < biased * CHANNELS, other=0).to(tl.float32)
    target = found + program.to(tl.int64) * CHANNELS + channel
    tl.store(target, mean, mask=there)
    tl.store(target + tl.num_programs(0).to(tl.int64) * CHANNELS, variance, mask=there)


@triton.jit(do_not_specialize=SIZES)
def _normalise(
    states, out, mean, variance, weight, shift, bias, gain, offset, frames, rows, columns, eps, biased, first, times, scale,
    s_batch, s_frame, s_row, o_batch, o_frame, o_row, g_batch, g_frame, g_row,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, CONDITIONED: tl.constexpr,
):  # fmt: skip
    """Normalises a row and applies SiLU; if conditioned, with gain and offset.

    Each element of gain and offset applies to ``scale`` pixels.
    """
    batch, frame, line = _place(tl.program_id(0), frames, rows)
    channel = tl.arange(0, WIDTH)
    there = channel < CHANNELS
    group = batch * GROUPS + channel // (CHANNELS // GROUPS)
    middle = tl.load(mean + group, mask=there, other=0)
    slope = tl.rsqrt(tl.load(variance + group, mask=there, other=1) + eps)
    slope *= tl.load(weight + channel, mask=there, other=0).to(tl.float32)
    added = tl.load(shift + channel, mask=there, other=0).to(tl.float32)
    middle -= tl.load(bias + channel, mask=channel < biased * CHANNELS, other=0).to(tl.float32)
    source = states + batch * s_batch + frame * s_frame + line * s_row
    target = out + batch * o_batch + frame * o_frame + line * o_row
    if CONDITIONED:
        conditions = batch * g_batch + _made_of(frame, first, times) * g_frame + line // scale * g_row
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < columns)[:, None] & there[None, :]
        place = column[:, None] * CHANNELS + channel[None, :]
        value = tl.load(source + place, mask=inside, other=0).to(tl.float32)
        value = (value - middle[None, :]) * slope[None, :] + added[None, :]
        if CONDITIONED:
            latent = conditions + (column // scale)[:, None] * CHANNELS + channel[None, :]
            value = value * tl.load(gain + latent, mask=inside, other=0).to(tl.float32)
            value += tl.load(offset + latent, mask=inside, other=0).to(tl.float32)
        value = value / (1 + tl.exp(-value))
        tl.store(target + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _add(states, bias, others, pixels, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    channel = tl.arange(0, WIDTH)[None, :]
    there = channel < CHANNELS
    pixel = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    place, inside = pixel * CHANNELS + channel, (pixel < pixels) & there
    total = tl.load(states + place, mask=inside, other=0).to(tl.float32)
    total += tl.load(bias + channel, mask=there, other=0).to(tl.float32)
    total += tl.load(others + place, mask=inside, other=0).to(tl.float32)
    tl.store(states + place, total.to(states.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _enlarge(
    states, out, frames, rows, columns, first, times, scale, s_batch, s_frame, s_row, o_batch, o_frame, o_row,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, frame, line = _place(tl.program_id(0), frames, rows)
    channel = tl.arange(0, WIDTH)[None, :]
    source = states + batch * s_batch + _made_of(frame, first, times) * s_frame + line // scale * s_row
    target = out + batch * o_batch + frame * o_frame + line * o_row
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[:, None]
        inside = (column < columns) & (channel < CHANNELS)
        value = tl.load(source + column // scale * CHANNELS + channel, mask=inside, other=0)
        tl.store(target + column * CHANNELS + channel, value, mask=inside)


def strides(states: torch.Tensor) -> tuple[int, int, int]:
    """Returns the strides of batch, frame and row."""
    return states.stride(0), states.stride(2), states.stride(3)


def times_of(frames: int, latent_frames: int) -> tuple[int, int]:
    """Returns the arguments of :func:`_made_of`; see :func:`parallel_backend.cogvideox.kernels.vae_torch.frame_indices`."""
    first = frames % 2 if frames > 1 else 0
    return first, (frames - first) // (latent_frames - first)


def tile_of(channels: int) -> dict[str, int]:
    """Returns the size of a program's tile: channels, their next power of two, and columns."""
    width = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "WIDTH": width, "COLUMNS": max(TILE // width, 1)}


def channels_last(states: torch.Tensor) -> torch.Tensor:
    """Returns the states, copied unless rows have the layout that kernels expect: columns, then channels."""
    if states.stride(1) == 1 and states.stride(4) == states.shape[1]:
        return states
    return torch.empty_like(states, memory_format=torch.channels_last_3d).copy_(states)


class TritonVaeOps:
    """See :class:`.vae_torch.TorchVaeOps`."""

    def moments(self, states, bias, groups):
        """One pass computes the moments of each channel per group of rows; torch combines them."""
        states = channels_last(states)
        batch, channels, frames, rows, columns = states.shape
        lines = 1
        while rows % (2 * lines) == 0 and batch * frames * rows >= 2 * lines * PROGRAMS:
            lines *= 2
        programs = batch * frames * rows // lines
        found = states.new_empty((2, programs, channels), dtype=torch.float32)
        _moments[(programs,)](
            states, states if bias is None else bias, found, frames, rows, columns, lines, int(bias is not None),
            *strides(states), **tile_of(channels), num_warps=WARPS,
        )  # fmt: skip
        means, variances = found.unflatten(2, (groups, -1)).unflatten(1, (batch, -1))
        between, mean = torch.var_mean(means, dim=(1, 3), correction=0)
        return mean, variances.mean((1, 3)) + between

    def normalise(self, states, bias, mean, variance, norm, gain, offset, out):
        states, g_strides, times, scale = channels_last(states), (0, 0, 0), (0, 1), 1
        batch, channels, frames, rows, columns = states.shape
        if gain is not None:
            gain, offset = channels_last(gain), channels_last(offset)
            g_strides, times, scale = strides(gain), times_of(frames, gain.shape[2]), columns // gain.shape[4]
        _normalise[(batch * frames * rows,)](
            states, out, mean, variance, norm.weight, norm.bias, states if bias is None else bias, gain, offset,
            frames, rows, columns, norm.eps, int(bias is not None), *times, scale,
            *strides(states), *strides(out), *g_strides, **tile_of(channels), GROUPS=norm.num_groups,
            CONDITIONED=gain is not None, num_warps=WARPS,
        )  # fmt: skip

    def enlarge(self, states, out):
        states = channels_last(states)
        batch, channels, frames, rows, columns = out.shape
        _enlarge[(batch * frames * rows,)](
            states, out, frames, rows, columns, *times_of(frames, states.shape[2]), columns // states.shape[4],
            *strides(states), *strides(out), **tile_of(channels), num_warps=WARPS,
        )  # fmt: skip

    def add(self, states, bias, others):
        """Overwrites ``states``."""
        others = channels_last(others)
        if not all(part.is_contiguous(memory_format=torch.channels_last_3d) for part in (states, others)):
            return states.add_(bias[:, None, None, None]).add_(others)
        pixels, tile = states.numel() // states.shape[1], tile_of(states.shape[1])
        _add[(triton.cdiv(pixels, tile["COLUMNS"]),)](states, bias, others, pixels, **tile, num_warps=WARPS)
        return states
