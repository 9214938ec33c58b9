"""The same folder, seed and prompt give the latents and frames of diffusers' own pipeline, run here."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.scheduler_step import Noise, Step, ddim_step, dpm_step
from parallel_backend.cogvideox.transformer.positions import centred_region
from parallel_backend.cogvideox.vae.codec import encode
from parallel_backend.errors import RequestError
from parallel_backend.executor.batch import cut
from parallel_backend.group.job_fields import join_fields, split_fields
from parallel_backend.jobs import DecodeJob, EncodeJob
from parallel_backend.model import Model

from .conftest import TOLERANCE
from .support.diffusers_reference import reference


@pytest.fixture(scope="module")
def pipelines(checkpoints):
    found = {like: CogVideoXPipeline.from_pretrained(checkpoints[like]) for like in ("2b", "5b", "1.5-5b")}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (96, 64, 17)},
        {"size": (96, 64, 17), "cfg": 1.0},
        {"size": (80, 48, 13), "dynamic_cfg": True},
        {"size": (96, 64, 9), "batch": 2, "seed": 2**63 + 5},
        {"size": (48, 64, 13), "steps": 11, "cfg": 3.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("like", ["2b", "5b", "1.5-5b"])
@pytest.mark.slow
def test_latents_equal_those_of_diffusers(like, scheduler, settings, pipelines, make_job, local):
    expected = reference(pipelines[like], scheduler=scheduler, num_frames=settings["size"][2], **settings)
    latents = local.sample(make_job(like, scheduler=scheduler, **settings)).tensor
    assert latents.shape == expected.shape
    assert (latents - expected).abs().max() <= TOLERANCE


def test_the_region_of_the_rotary_grid_is_that_of_diffusers():
    """For every grid up to twice the size of the base grid, which is that of 480 x 720."""
    grids = list(product(range(1, 61), range(1, 91)))
    expected = [get_resize_crop_region_for_grid(grid, 45, 30) for grid in grids]
    assert [centred_region(grid, 30, 45) for grid in grids] == expected


def test_prompts_in_turn_are_diffusers_with_other_prompts_from_a_step_on(pipelines, make_job, local):
    def other_prompts(pipeline, step, timestep, tensors):
        negative, positive = tensors["prompt_embeds"].chunk(2)
        return {"prompt_embeds": torch.cat([negative / (2 if step == 5 else 1), positive / (2 if step == 2 else 1)])}

    settings = {"size": (80, 48, 9), "scheduler": "dpm"}
    hook = {"callback_on_step_end": other_prompts, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = reference(pipelines["5b"], **settings, num_frames=9, **hook)
    found = local.sample(make_job("5b", positive_starts=(0, 3 / 8), negative_starts=(0, 0.7), **settings)).tensor
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - local.sample(make_job("5b", **settings)).tensor).abs().max() > 0.01


@pytest.mark.parametrize("drawn", [(1, slice(0, 1)), (3, slice(1, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dpm_step_is_that_of_diffusers_to_the_last_bit(dtype, drawn):
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler.set_timesteps(7)
    ours, theirs, inputs = (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    batch, own = drawn
    shape = (batch, 3, 16, 4, 6)
    latents, history = torch.randn(shape, generator=inputs).to(dtype)[own], None
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(latents.shape, generator=inputs)
        before = scheduler.timesteps[index - 1] if index else None
        whole = latents.expand(shape)
        expected, remembered = scheduler.step(velocity, history, timestep, before, whole, generator=theirs, return_dict=False)
        step = Step.of(scheduler, scheduler.timesteps, index, by_hand=False)
        latents, history = dpm_step(scheduler, velocity, history, step, latents, Noise(ours, drawn))
        assert torch.equal(latents, expected[own])
        assert torch.equal(history, remembered[own])
        latents = latents.to(dtype)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_ddim_step_is_that_of_diffusers_to_the_last_bit(dtype):
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    scheduler.set_timesteps(7)
    inputs = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 3, 16, 4, 6, generator=inputs).to(dtype)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(latents.shape, generator=inputs)
        expected = scheduler.step(velocity, timestep, latents)
        latents, clean = ddim_step(scheduler, velocity, Step.of(scheduler, scheduler.timesteps, index, by_hand=False), latents)
        assert torch.equal(latents, expected.prev_sample) and torch.equal(clean, expected.pred_original_sample)
        latents = latents.to(dtype)


def test_a_step_by_hand_goes_from_its_noise_to_that_of_the_next_timestep():
    """The clean latents and the noise that a velocity is made of, mixed again."""
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0)
    by_hand, share = torch.tensor([999, 856, 665, 399]), scheduler.alphas_cumprod
    clean, noise = torch.randn(2, 1, 2, 16, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def mixed(at: float) -> torch.Tensor:
        return at**0.5 * clean + (1 - at) ** 0.5 * noise

    for index, (start, end) in enumerate(zip(by_hand, [*share[by_hand[1:]], torch.tensor(1.0)])):
        velocity = share[start] ** 0.5 * noise - (1 - share[start]) ** 0.5 * clean
        step = Step.of(scheduler, by_hand, index, by_hand=True)
        found, predicted = ddim_step(scheduler, velocity, step, mixed(share[start]))
        assert (found - mixed(end)).abs().max() < 1e-6 and (predicted - clean).abs().max() < 1e-6


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_the_scheduler_s_own_timesteps_by_hand_are_the_same_video_and_others_another(scheduler, make_job, local):
    job = make_job("2b", size=(48, 48, 5), steps=4, scheduler=scheduler)
    same, other = (replace(job, timesteps=each) for each in ((999, 749, 499, 249), (999, 856, 665, 399)))
    found = local.sample(job).tensor
    assert torch.equal(local.sample(same).tensor, found)
    assert (local.sample(other).tensor - found).abs().max() > 0.01
    assert join_fields(other.kind, *split_fields(other)).timesteps == other.timesteps


@pytest.mark.parametrize(
    "timesteps, steps, words",
    [
        ((999, 856), 4, "steps is 4, but there are 2 timesteps; set steps to 2"),
        ((1000, 500), 2, "timesteps are 1000, 500; they must descend from at most 999 to at least 0"),
        ((500, 500), 2, "must descend"),
        ((500, -1), 2, "must descend"),
    ],
)
def test_timesteps_that_make_no_sense_are_refused(timesteps, steps, words, make_job):
    with pytest.raises(RequestError, match=words):
        make_job("2b", steps=steps, timesteps=timesteps)


@pytest.mark.parametrize("like, size", [("5b", (48, 48, 9)), ("1.5-5b", (48, 48, 9))])  # 1.5 pads, with noise from the seed
def test_the_noise_of_a_seed_given_as_noise_is_the_same_video(like, size, make_job, local):
    job = make_job(like, size=size, steps=2, batch=2, scheduler="dpm", seed=5)
    frames, padding = job.latent.shape[2], job.latent.shape[2] % 2 if like == "1.5-5b" else 0
    drawn = torch.randn(2, frames + padding, 16, 6, 6, generator=torch.Generator().manual_seed(5))
    given = replace(job, noise=drawn[:, padding:].transpose(1, 2).contiguous())
    expected = local.sample(job).tensor
    assert torch.equal(local.sample(given).tensor, expected)
    for index, part in enumerate(cut(given)):
        assert (local.sample(part).tensor - expected[index]).abs().max() <= TOLERANCE
    assert (local.sample(replace(job, noise=given.noise.flip(0))).tensor - expected).abs().max() > 0.01
    assert torch.equal(join_fields(given.kind, *split_fields(given)).noise, given.noise)
    with pytest.raises(RequestError, match="the noise is 48x48 with 2 latent frames and the video is 48x48 with 3"):
        replace(job, noise=given.noise[:, :, :2])


def test_the_prompt_and_the_seed_change_the_latents(make_job, local, texts):
    job = make_job("5b")
    one = local.sample(job).tensor
    assert torch.equal(one, local.sample(job).tensor)
    assert (one - local.sample(make_job("5b", seed=4)).tensor).abs().max() > 0.1
    swapped = type(job)(job.model, job.negative, job.latent, job.positive, seed=job.seed, steps=job.steps)
    assert (one - local.sample(swapped).tensor).abs().max() > 0.1


def test_tiles_without_overlap_do_not_depend_on_the_job_before(local, make_job):
    model = make_job("5b").model
    latent = torch.randn(1, 16, 1, 12, 20, generator=torch.Generator().manual_seed(6))
    alone = DecodeJob(model, latent, "on", 64, 0)
    first = local.decode(alone).tensor
    overlapping = local.decode(DecodeJob(model, latent, "on", 64, 32)).tensor
    assert torch.equal(local.decode(alone).tensor, first)
    assert not torch.equal(overlapping, first)


@pytest.mark.parametrize("like", ["2b", "5b"])
def test_frames_equal_those_of_diffusers(like, pipelines, make_job, local):
    latents = local.sample(make_job(like, size=(64, 48, 9), batch=2)).tensor
    video = local.decode(DecodeJob(make_job(like).model, latents, "off")).tensor
    pipeline = pipelines[like]
    with torch.no_grad():
        expected = pipeline.decode_latents(latents.permute(0, 2, 1, 3, 4) * pipeline.vae.config.scaling_factor)
    expected = pipeline.video_processor.postprocess_video(expected, output_type="pt").permute(0, 1, 3, 4, 2)
    assert video.shape == (2, 9, 48, 64, 3)
    assert (video - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_a_video_has_exactly_as_many_frames_as_were_asked_for(frames, local, checkpoints):
    model = Model(str(checkpoints["5b"]))
    pixels = torch.rand(frames, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    latent = local.encode(EncodeJob(model, pixels)).tensor
    assert latent.shape == (1, 16, (frames - 1) // 4 + 1, 4, 6)
    assert local.decode(DecodeJob(model, latent)).tensor.shape == (1, frames, 32, 48, 3)


def test_encoding_equals_that_of_diffusers(pipelines, local, checkpoints):
    pixels = torch.rand(9, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    vae = Checkpoint.open(checkpoints["5b"]).load_vae(torch.float32)
    with torch.no_grad():
        expected = pipelines["5b"].vae.encode(pixels.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()
    assert (encode(vae, pixels) - expected).abs().max() <= TOLERANCE
    assert (local.encode(EncodeJob(Model(str(checkpoints["5b"])), pixels)).tensor - expected).abs().max() <= TOLERANCE


def test_tiles_cover_the_whole_frame(local, make_job):
    latents = local.sample(make_job("5b", size=(160, 96, 5), steps=2)).tensor
    model = make_job("5b").model
    whole = local.decode(DecodeJob(model, latents, "off")).tensor
    tiled = local.decode(DecodeJob(model, latents, "on", 64, 32)).tensor
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < 0.1  # tiles see less of their surroundings, and were really used
