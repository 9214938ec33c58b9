"""A checkpoint is run as it was trained, the user can choose otherwise, and is told what was concluded from what."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.description import conclusions
from parallel_backend.errors import RequestError
from parallel_backend.group.job_fields import join_fields, split_fields
from parallel_backend.model import Model

from .conftest import TOLERANCE


def trained_alphas(shift: float) -> torch.Tensor:
    """Cumulative alphas of CogVideoX's noise: square roots of beta in equal steps, the ratio of signal to noise divided by
    ``shift``, and no signal at the end."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
    ratio = alphas / (1 - alphas) / shift
    signal = (ratio / (1 + ratio)).sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2


@pytest.mark.parametrize(
    "like, asked, shift, at_300",
    [
        ("2b", "auto", 3.0, 0.305),
        ("2b", "off", 1.0, 0.565),
        ("2b-inp", "auto", 1.0, 0.565),
        ("2b-control", "auto", 1.0, 0.565),
        ("2b-inp", "on", 3.0, 0.305),
        ("2b-i2v", "auto", 3.0, 0.305),
        ("5b", "auto", 1.0, 0.565),
        ("5b-inp", "on", 1.0, 0.565),
    ],
)
def test_the_noise_is_what_the_model_was_trained_with_or_what_the_user_says(like, asked, shift, at_300, checkpoints):
    checkpoint = Checkpoint.of(Model(str(checkpoints[like]), snr_shift=asked))
    for name in ("ddim", "dpm"):
        found = checkpoint.make_scheduler(name).alphas_cumprod
        assert found[300].item() == pytest.approx(at_300, abs=1e-3)
        assert (found - trained_alphas(shift)).abs().max() <= 1e-6


def test_a_choice_reaches_the_sampler_and_a_cached_model_follows_it(make_job, local):
    mask = {"masked_video": torch.randn(1, 16, 2, 6, 6), "mask": torch.rand(1, 1, 2, 6, 6)}
    job = make_job("2b-inp", size=(48, 48, 5), steps=2, scheduler="ddim", **mask)
    shifted = replace(job, model=replace(job.model, snr_shift="on"))
    plain, loads = local.sample(job).tensor, local.engine.cache.loads
    assert (local.sample(shifted).tensor - plain).abs().max() > 0.01
    assert torch.equal(local.sample(job).tensor, plain)
    assert local.engine.cache.loads == loads


def test_object_removal_says_how_it_was_made_to_be_run(checkpoints):
    (line,) = conclusions(Checkpoint.open(checkpoints["1.5-5b-void"]))
    assert line == "made for cfg 1 and windows of 21 frames; its authors run a second pass, of the same shape, with cfg 6"


def test_a_task_that_the_user_sets_is_the_one_of_a_model_of_that_task(make_job, local, checkpoints):
    """A start-image finetune of 2b is taken for a control model where its file says nothing of the pipeline."""
    model, image = Model(str(checkpoints["2b-control"]), task="image"), torch.randn(1, 16, 1, 6, 6)
    job = partial(make_job, size=(48, 48, 5), steps=2, image=image)
    found = local.sample(job("2b-control", model=model)).tensor
    assert (found - local.sample(job("2b-i2v")).tensor).abs().max() <= TOLERANCE  # of the same weights
    refused = make_job("2b-control", size=(48, 48, 5), model=model, control=torch.zeros(1, 16, 2, 6, 6))
    with pytest.raises(
        RequestError,
        match="makes videos from a start image; for a control video .*; if 2b-control is one, set task to control$",
    ):
        local.sample(refused)


@pytest.mark.parametrize("task, allowed", [("text", "image or control or auto"), ("inpaint", "image or control or auto")])
def test_a_task_that_the_channels_do_not_allow_is_refused(task, allowed, checkpoints):
    with pytest.raises(RequestError, match=f"task is '{task}', but 5b-i2v has 32 channels in: use {allowed}"):
        Checkpoint.of(Model(str(checkpoints["5b-i2v"]), task=task))
    with pytest.raises(RequestError, match="task is 'video'; use one of auto, text"):
        Model(str(checkpoints["5b-i2v"]), task="video")


def test_choices_go_over_the_socket(make_job, checkpoints):
    job = make_job("5b-i2v", model=Model(str(checkpoints["5b-i2v"]), task="control", snr_shift="off"))
    assert join_fields(job.kind, *split_fields(job)).model == job.model


@pytest.mark.parametrize(
    "like, choices, lines",
    [
        ("5b", {}, []),
        ("2b", {"snr_shift": "off"}, ["noise schedule without its configuration's SNR shift of 3, as asked"]),
        ("5b-i2v", {}, ["task image, as it has 32 channels in and learned positions; if that is wrong, set task to control"]),
        (
            "5b-i2v",
            {"task": "control"},
            ["task control, as asked; without that it would be image, as it has 32 channels in and learned positions"],
        ),
        (
            "2b-i2v",
            {"task": "image"},
            [
                "task image, as it has 32 channels in and CogVideoXImageToVideoPipeline in model_index.json; "
                "if that is wrong, set task to control"
            ],
        ),
        (
            "anisora-i2v",
            {},
            [
                "task image, as it has 32 channels in and CogVideoXImageToVideoPipeline in model_index.json; "
                "if that is wrong, set task to control",
                "taken for AniSora V1, as 1280x720 is in its configuration: positions count from the corner at every size",
            ],
        ),
        (
            "2b-control",
            {},
            [
                "task control, as it has 32 channels in with neither learned positions nor an ofs embedding; "
                "if that is wrong, set task to image",
                "noise schedule without its configuration's SNR shift of 3, as VideoX-Fun trained its models",
                "at other sizes the positions of 96x64 are resized, as VideoX-Fun trained its 2b models",
            ],
        ),
    ],
)
def test_the_user_is_told_what_was_concluded_from_what(like, choices, lines, checkpoints):
    assert conclusions(Checkpoint.of(Model(str(checkpoints[like]), **choices))) == lines


def test_a_start_image_model_without_the_learned_positions_of_its_configuration_is_told_what_to_change(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["5b-i2v"], tmp_path / "finetune")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    del weights["patch_embed.pos_embedding"]
    save_file(weights, file)
    with pytest.raises(
        RequestError, match="set use_learned_positional_embeddings to false in transformer/config.json, and task to image"
    ):
        Checkpoint.open(folder).load_transformer(torch.float32)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_learned_positional_embeddings": False}))
    found = Checkpoint.of(Model(str(folder), task="image"))
    assert found.task == "image" and found.load_transformer(torch.float32) is not None
