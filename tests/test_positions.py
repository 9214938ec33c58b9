"""Positions of tokens are those that each family of models was trained with, written down again with numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.transformer.positions import rotary_tables, token_positions

from .support import videox_fun

CPU = torch.device("cpu")
FRAMES = 3


def published(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the published size of CogVideoX 1.0."""
    return replace(checkpoint, transformer=checkpoint.transformer | {"sample_width": 90, "sample_height": 60})


@pytest.mark.parametrize("size", [(384, 672), (512, 512), (672, 384), (720, 480), (16, 16), (1344, 768)], ids=str)
@pytest.mark.parametrize("like", ["5b-inp", "5b-control"])
def test_videox_fun_divides_the_crop_of_its_grid_into_equal_steps(like, size, checkpoints):
    checkpoint = published(Checkpoint.open(checkpoints[like]))
    width, height = size
    found = token_positions(checkpoint, FRAMES, height // 8, width // 8)
    for ours, expected in zip(found, [np.arange(FRAMES), *videox_fun.positions(*size, (45, 30))]):
        assert np.abs(ours.numpy() - expected).max() <= 1e-5
    tables = rotary_tables(checkpoint, FRAMES, height // 8, width // 8, CPU)
    for ours, expected in zip(tables, videox_fun.rotary_tables(*size, FRAMES, (45, 30), checkpoint.head_dim)):
        assert ours.shape == expected.shape and (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("size, last", [((384, 672), 0.58), ((512, 512), 0.25), ((720, 480), 0)])
def test_the_last_column_of_diffusers_is_nearer_by_part_of_a_patch(size, last, checkpoints):
    """The distance that this pack had from VideoX-Fun; CogVideoX's own 5b keeps diffusers' positions."""
    fun, base = (published(Checkpoint.open(checkpoints[like])) for like in ("5b-inp", "5b"))
    ours, theirs = (token_positions(each, FRAMES, size[1] // 8, size[0] // 8)[2][-1].item() for each in (fun, base))
    assert ours - theirs == pytest.approx(last, abs=0.01)


@pytest.mark.parametrize("like", ["5b", "1.5-5b"])
def test_cogvideox_s_own_models_have_the_positions_of_diffusers(like, checkpoints):
    checkpoint, pipeline = Checkpoint.open(checkpoints[like]), CogVideoXPipeline.from_pretrained(checkpoints[like])
    for width, height in ((96, 64), (48, 64), (80, 48)):
        expected = pipeline._prepare_rotary_positional_embeddings(height, width, 4, CPU)
        for ours, theirs in zip(rotary_tables(checkpoint, 4, height // 8, width // 8, CPU), expected):
            assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5
