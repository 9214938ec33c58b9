"""What a VAE computes between its convolutions, in Triton: each one pass over memory, for states with channels last.

A program takes a row of one frame. So the position in the latent is found once a row, and within it by a shift: the general
kernels of torch's compiler would divide by sizes that they do not know, five times for every number.
"""

import torch
import triton
import triton.language as tl

TILE = 4096
"""Numbers that a program holds at a time."""


@triton.jit
def _place(row, frames, rows):
    """Batch, frame and row within the frame, wide enough for the offsets of the largest tensors."""
    row = row.to(tl.int64)
    return row // (frames * rows), row // rows % frames, row % rows


@triton.jit
def _moments(
    states, bias, found, frames, rows, columns, s_batch, s_frame, s_row,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each channel of a row, to ``found`` ``[2, batch * frames * rows, channels]``."""
    row = tl.program_id(0)
    batch, frame, line = _place(row, frames, rows)
    channel = tl.arange(0, CHANNELS)
    source = states + batch * s_batch + frame * s_frame + line * s_row
    near = tl.load(source + channel).to(tl.float32)  # sums of differences from it lose nothing to a large mean
    total = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    squares = tl.zeros([COLUMNS, CHANNELS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < columns)[:, None]
        value = tl.load(source + column[:, None] * CHANNELS + channel[None, :], mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value - near[None, :], 0)
        total += value
        squares += value * value
    mean = tl.sum(total, 0) / columns
    variance = tl.sum(squares, 0) / columns - mean * mean
    mean += near
    if BIASED:
        mean += tl.load(bias + channel).to(tl.float32)
    target = found + row.to(tl.int64) * CHANNELS + channel
    tl.store(target, mean)
    tl.store(target + tl.num_programs(0).to(tl.int64) * CHANNELS, variance)


@triton.jit
def _normalise(
    states, out, mean, variance, weight, shift, bias, gain, offset, frames, rows, columns, eps,
    s_batch, s_frame, s_row, o_batch, o_frame, o_row, g_batch, g_frame, g_row, first, times,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """SiLU of a normalised row; ``SCALE`` pixels a number of gain and offset in each direction, or 0 without them."""
    batch, frame, line = _place(tl.program_id(0), frames, rows)
    channel = tl.arange(0, CHANNELS)
    group = batch * GROUPS + channel // (CHANNELS // GROUPS)
    middle = tl.load(mean + group)
    scale = tl.rsqrt(tl.load(variance + group) + eps) * tl.load(weight + channel).to(tl.float32)
    added = tl.load(shift + channel).to(tl.float32)
    if BIASED:
        middle -= tl.load(bias + channel).to(tl.float32)
    source = states + batch * s_batch + frame * s_frame + line * s_row
    target = out + batch * o_batch + frame * o_frame + line * o_row
    if SCALE:
        latent_frame = tl.where(frame < first, 0, first + (frame - first) // times)
        conditions = batch * g_batch + latent_frame * g_frame + line // SCALE * g_row
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < columns)[:, None]
        place = column[:, None] * CHANNELS + channel[None, :]
        value = tl.load(source + place, mask=inside, other=0).to(tl.float32)
        value = (value - middle[None, :]) * scale[None, :] + added[None, :]
        if SCALE:
            latent = conditions + (column // SCALE)[:, None] * CHANNELS + channel[None, :]
            value = value * tl.load(gain + latent, mask=inside, other=0).to(tl.float32)
            value += tl.load(offset + latent, mask=inside, other=0).to(tl.float32)
        value = value / (1 + tl.exp(-value))
        tl.store(target + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add(states, bias, others, count, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    number = tl.arange(0, TILE)  # a tile has whole pixels
    place = tl.program_id(0).to(tl.int64) * TILE + number
    inside = place < count
    total = tl.load(states + place, mask=inside, other=0).to(tl.float32)
    total += tl.load(bias + number % CHANNELS).to(tl.float32)
    total += tl.load(others + place, mask=inside, other=0).to(tl.float32)
    tl.store(states + place, total.to(states.dtype.element_ty), mask=inside)


def channels_last(states: torch.Tensor) -> torch.Tensor:
    """The states, a copy where a row's numbers do not lie as the kernels expect: columns, and the channels of each."""
    if states.stride(1) == 1 and states.stride(4) == states.shape[1]:
        return states
    return torch.empty_like(states, memory_format=torch.channels_last_3d).copy_(states)


class Triton:
    """See :class:`parallel_backend.cogvideox.vae_kernels.Plain`. Channels are a power of two, as in CogVideoX's VAE."""

    def moments(self, states, bias, groups):
        """A pass for the moments of each row and channel; few enough to be taken together by torch."""
        states = channels_last(states)
        batch, channels, frames, rows, columns = states.shape
        found = states.new_empty((2, batch * frames * rows, channels), dtype=torch.float32)
        _moments[(batch * frames * rows,)](
            states, bias, found, frames, rows, columns, states.stride(0), states.stride(2), states.stride(3),
            CHANNELS=channels, COLUMNS=max(TILE // channels, 1), BIASED=bias is not None,
        )  # fmt: skip
        means, variances = found.unflatten(2, (groups, -1)).unflatten(1, (batch, -1))
        between, mean = torch.var_mean(means, dim=(1, 3), correction=0)
        return mean, variances.mean((1, 3)) + between

    def normalise(self, states, bias, mean, variance, norm, gain, offset, out):
        """One pass."""
        states = channels_last(states)
        batch, channels, frames, rows, columns = states.shape
        g_strides, first, times, scale = (0, 0, 0), 0, 1, 0
        if gain is not None:
            gain, offset = channels_last(gain), channels_last(offset)
            g_strides = gain.stride(0), gain.stride(2), gain.stride(3)
            first = frames % 2 if frames > 1 else 0
            times, scale = (frames - first) // (gain.shape[2] - first), columns // gain.shape[4]
        _normalise[(batch * frames * rows,)](
            states, out, mean, variance, norm.weight, norm.bias, bias, gain, offset, frames, rows, columns, norm.eps,
            states.stride(0), states.stride(2), states.stride(3), out.stride(0), out.stride(2), out.stride(3), *g_strides,
            first, times, CHANNELS=channels, GROUPS=norm.num_groups, COLUMNS=max(TILE // channels, 1),
            BIASED=bias is not None, SCALE=scale,
        )  # fmt: skip

    def add(self, states, bias, others):
        """One pass, over the first."""
        others = channels_last(others)
        if states.stride() != others.stride() or not states.is_contiguous(memory_format=torch.channels_last_3d):
            return states.add_(bias[:, None, None, None]).add_(others)
        count = states.numel()
        _add[(triton.cdiv(count, TILE),)](states, bias, others, count, CHANNELS=states.shape[1], TILE=TILE)
        return states
