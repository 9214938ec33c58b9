"""Our layers make of latents and frames what diffusers' own make of them; with kernels too, which Triton interprets here."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from benchmarks.random_weights import fill, vae_config
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.kernels import vae_torch
from parallel_backend.cogvideox.vae import codec, layers, tiling
from parallel_backend.cogvideox.vae.codec import outputs
from parallel_backend.cogvideox.vae.frames import Assembly
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob, EncodeJob
from parallel_backend.model import Model

from .conftest import REPO, TOLERANCE

SIZES = [(1, 4, 6), (2, 4, 6), (3, 6, 5), (4, 3, 4), (5, 4, 4)]
"""Latent frames, rows and columns."""


def make_vae(dtype: torch.dtype = torch.float32):
    """A small VAE with random weights, the same every time."""
    module = AutoencoderKLCogVideoX(**vae_config("5b", full_size=False)).eval()
    fill(module, torch.Generator().manual_seed(0))
    return module.to(dtype)


@pytest.fixture(scope="module")
def diffusers_vae():
    return make_vae()


@pytest.fixture(scope="module")
def our_vae():
    module = make_vae()
    layers.use(module)
    return module


def with_vae_of(module, frames: int, rows: int, columns: int) -> list[torch.Tensor]:
    """What it decodes and encodes of random numbers."""
    generator = torch.Generator().manual_seed(frames)
    latent = torch.randn(1, 16, frames, rows, columns, generator=generator)
    pixels = torch.rand(4 * frames - 3, 8 * rows, 8 * columns, 3, generator=generator)
    return [codec.decode(module, latent), codec.encode(module, pixels)]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.slow
def test_frames_and_latents_equal_those_of_diffusers(size, tiled, last, our_vae, diffusers_vae):
    layers.set_memory_format(our_vae, last=last)
    for module in (our_vae, diffusers_vae):
        tiling.set_tiling(module, tiled=tiled, tile=32, overlap=8)
    for ours, expected in zip(with_vae_of(our_vae, *size), with_vae_of(diffusers_vae, *size)):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_frames_are_handed_over_while_the_next_ones_are_decoded(size, tiled, our_vae, diffusers_vae):
    frames, rows, columns = size
    layers.set_memory_format(our_vae, last=False)
    for module in (our_vae, diffusers_vae):
        tiling.set_tiling(module, tiled=tiled, tile=32, overlap=8)
    latent = torch.randn(2, 16, frames, rows, columns, generator=torch.Generator().manual_seed(frames))
    parts, decoded = [], []
    whole = Assembly(latent, lambda video, start, part: parts.append((video, start, part, len(decoded))))
    with outputs(our_vae.decoder, decoded.append):
        assert codec.decode(our_vae, latent, on_frames=whole.add).shape == (0,)
    expected = torch.cat([codec.decode(diffusers_vae, one) for one in latent.split(1)])
    assert (whole.videos - expected).abs().max() <= TOLERANCE
    for number in (0, 1):
        own = [(start, part) for video, start, part, _ in parts if video == number]
        assert len(own) == (1 if tiled else max(1, frames // 2))
        assert [start for start, _ in own] == [0, *accumulate(len(part) for _, part in own)][: len(own)]
        assert torch.equal(torch.cat([part for _, part in own]), whole.videos[number])
    if not tiled:  # the hook of the test runs first
        assert [done for *_, done in parts] == list(range(1, 1 + len(parts)))


@pytest.mark.parametrize("tile, overlap", [(96, 40), (101, 43)])
def test_tiles_are_joined_where_they_were_cut(tile, overlap, our_vae):
    """In floats 12 latents without 40 of 96 pixels are 6.99, and a tile size by a script need be no multiple of 8."""
    layers.set_memory_format(our_vae, last=False)
    latent = torch.randn(1, 16, 1, 19, 12, generator=torch.Generator().manual_seed(1))
    tiling.set_tiling(our_vae, tiled=False, tile=tile, overlap=overlap)
    upper, lower = (codec.decode(our_vae, part)[0, 0] for part in (latent[..., :12, :], latent[..., 7:, :]))
    tiling.set_tiling(our_vae, tiled=True, tile=tile, overlap=overlap)
    found = codec.decode(our_vae, latent)
    assert found.shape == (1, 1, 152, 96, 3)
    assert (found[0, 0, :56, :56] - upper[:56, :56]).abs().max() <= TOLERANCE
    assert (found[0, 0, 96:112, :56] - lower[40:56, :56]).abs().max() <= TOLERANCE
    assert codec.encode(our_vae, found[0]).shape == latent.shape


def test_many_frames_are_convolved_in_parts_where_numbers_are_too_many(our_vae, diffusers_vae, monkeypatch):
    monkeypatch.setattr(vae_torch, "MOST", 5000)
    layers.set_memory_format(our_vae, last=False)
    for module in (our_vae, diffusers_vae):
        tiling.set_tiling(module, tiled=False, tile=64, overlap=0)
    for ours, expected in zip(with_vae_of(our_vae, 3, 2, 2), with_vae_of(diffusers_vae, 3, 2, 2)):
        assert (ours - expected).abs().max() <= TOLERANCE


def test_rounding_to_bfloat16_is_not_above_that_of_diffusers(diffusers_vae):
    ours, theirs = make_vae(torch.bfloat16), make_vae(torch.bfloat16)
    layers.use(ours)
    tiling.set_tiling(diffusers_vae, tiled=False, tile=64, overlap=0)
    latent = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    exact = diffusers_vae.decode(latent).sample.detach()
    distances = [(module.decode(latent.bfloat16()).sample.detach() - exact).norm() / exact.norm() for module in (ours, theirs)]
    assert 1e-3 < distances[0] <= 0.9 * distances[1]


def test_moments_lose_nothing_to_a_large_mean():
    states = torch.randn(2, 32, 3, 4, 5, dtype=torch.float64) * 0.1 + 100
    mean, variance = vae_torch.TorchVaeOps().moments(states.float(), None, 8)
    grouped = states.float().double().unflatten(1, (8, -1)).flatten(2)
    assert (mean - grouped.mean(2)).abs().max() <= 1e-4
    assert (variance / grouped.var(2, correction=0) - 1).abs().max() <= 1e-3


def test_a_vae_asked_to_be_compiled_where_it_cannot_says_so(checkpoints):
    executor, latent = LocalExecutor(torch.device("cpu")), torch.randn(1, 16, 2, 4, 4)
    job = DecodeJob(Model(str(checkpoints["5b"])), latent)
    expected = executor.decode(job)
    result = executor.decode(replace(job, model=replace(job.model, compile="on")))
    assert not expected.report.notes
    assert result.report.notes == ("VAE not compiled, so slower: its kernels are for GPUs",)
    assert torch.equal(result.tensor, expected.tensor) and executor.engine.cache.loads == 1
    encode = EncodeJob(replace(job.model, compile="off"), expected.tensor[0])
    assert not executor.encode(encode).report.notes


def test_a_loaded_vae_is_on_the_way_to_its_layers_unchanged(checkpoints):
    module = Checkpoint.open(checkpoints["5b"]).load_vae(torch.float32)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    layers.use(module)
    layers.set_memory_format(module, last=True)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("loaded_in_it", [False, True])
def test_layers_may_be_set_in_inference_mode_and_outside(loaded_in_it):
    latent, found = torch.randn(1, 16, 2, 2, 2), []
    with torch.inference_mode(loaded_in_it):
        module = make_vae()
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            layers.use(module)
            for last in (True, False):
                layers.set_memory_format(module, last=last)
                found.append(codec.decode(module, latent))
    assert all((one - found[0]).abs().max() <= TOLERANCE for one in found)


INTERPRETED = """
import torch
from parallel_backend.cogvideox.kernels import vae_triton
from parallel_backend.cogvideox.kernels.vae_torch import TorchVaeOps
from parallel_backend.cogvideox.vae.layers import use, set_memory_format, triton_kernels
from tests.test_vae import make_vae, with_vae_of

def last(*size):
    return torch.randn(size).to(memory_format=torch.channels_last_3d)

# 48 channels, as one of the demo's layers has: no power of two, which those of make_vae() are.
kernels, plain, norm = triton_kernels(), TorchVaeOps(), torch.nn.GroupNorm(8, 48)
torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
for frames, latent_frames, bias in ((5, 3, torch.randn(48)), (4, 2, None), (1, 1, torch.randn(48))):
    states, others = last(2, 48, frames, 4, 90) + 50, last(2, 48, frames, 4, 90)
    moments = plain.moments(states, bias, 8)
    for programs in (800, 2):  # a row each, and several
        vae_triton.PROGRAMS = programs
        for one, other in zip(kernels.moments(states, bias, 8), moments):
            assert (one - other).abs().max() <= 1e-4
    for conditions in ((None, None), (last(2, 48, latent_frames, 2, 45), last(2, 48, latent_frames, 2, 45))):
        results = [torch.zeros(2, 48, frames + 2, 6, 90).to(memory_format=torch.channels_last_3d) for _ in range(2)]
        for kind, result in zip((kernels, plain), results):
            kind.normalise(states, bias, *moments, norm, *conditions, result[:, :, 2:, 1:-1])
        assert (results[0] - results[1]).abs().max() <= 1e-4 and (results[0][:, :, :2] == 0).all()
    doubled = [torch.zeros(2, 48, 2 * frames - frames % 2, 10, 180).to(memory_format=torch.channels_last_3d) for _ in range(2)]
    for kind, result in zip((kernels, plain), doubled):
        kind.enlarge(states, result[..., 1:-1, :])
    assert torch.equal(*doubled)
    bias = torch.randn(48)
    assert (kernels.add(states.clone(), bias, others) - plain.add(states.clone(), bias, others)).abs().max() <= 1e-5

ours, theirs = make_vae(), make_vae()
use(ours, compiled=True)
set_memory_format(ours, last=True)
for one, other in zip(with_vae_of(ours, 3, 1, 2), with_vae_of(theirs, 3, 1, 2)):  # the interpreter runs row by row
    assert (one - other).abs().max() <= 1e-4
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_kernels_compute_what_torch_does():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
