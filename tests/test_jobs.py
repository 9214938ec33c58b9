"""A job is checked when it is made, in words that say what to change."""

import json

import pytest
import torch

from parallel_backend.errors import RequestError
from parallel_backend.group.job_fields import join_fields, split_fields
from parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob, empty_latent
from parallel_backend.model import Lora, Model, Windows

MODEL = Model("/nowhere")


def sample(**changes) -> SampleJob:
    text = torch.ones(1, 8, 4)
    values = {"model": MODEL, "positive": text, "latent": empty_latent(width=32, height=32, frames=5), "negative": text}
    return SampleJob(**{**values, **changes})


@pytest.mark.parametrize(
    "size, words",
    [
        ({"width": 100, "height": 64, "frames": 9}, "width is 100.*such as 96"),
        ({"width": 96, "height": 8, "frames": 9}, "height is 8.*such as 16"),
        ({"width": 96, "height": 64, "frames": 10}, "frames is 10.*4k\\+1, such as 9"),
        ({"width": 96, "height": 64, "frames": 0}, "frames is 0"),
        ({"width": 96, "height": 64, "frames": 9, "batch": 0}, "batch is 0"),
    ],
)
def test_a_size_that_no_cogvideox_makes_is_refused_with_the_nearest(size, words):
    with pytest.raises(RequestError, match=words):
        empty_latent(**size)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scheduler": "euler"}, "scheduler is 'euler'; use one of auto, ddim, dpm"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"negative": None}, "no negative conditioning"),
        ({"denoise": 0.5}, "the latent is empty"),
        ({"denoise": 0.001}, "leaves no step"),
        ({"positive": torch.ones(3, 8, 4)}, "positive conditioning is \\(3, 8, 4\\)"),
        ({"latent": torch.ones(1, 16, 8, 8)}, "a video latent is"),
        ({"latent": torch.ones(1, 16, 2, 5, 4)}, "multiples of 16"),
        ({"latent": torch.ones(1, 2, 16, 4, 4)}, "CogVideoX wrapper"),
        ({"image": torch.ones(1, 16, 4, 4)}, "start image's latent is \\(1, 16, 4, 4\\); it must be \\[1 or 1, 16, 1"),
        ({"image": torch.ones(1, 16, 2, 4, 4)}, "start image's latent is .*use CogVideoX Image To Video"),
        ({"image": torch.ones(3, 16, 1, 4, 4)}, "start image's latent is"),
        ({"image": torch.ones(1, 16, 1, 6, 4)}, "encoded for 32x48 and the video is 32x32; use the same size"),
        ({"image_scale": "half"}, "image_scale is 'half'; use one of auto, inverse, raw, scaled"),
        ({"control": torch.ones(1, 16, 4, 4)}, "control video's latent is \\(1, 16, 4, 4\\); .*use CogVideoX Control To Video"),
        ({"control": torch.ones(3, 16, 2, 4, 4)}, "must be \\[1 or 1, 16, frames"),
        ({"control": torch.ones(1, 17, 2, 4, 4)}, "control video's latent is"),
        ({"control": torch.ones(1, 16, 1, 4, 4)}, "latent is 32x32 with 1 latent frames and the video is 32x32 with 2"),
        ({"control": torch.ones(1, 16, 2, 6, 4)}, "latent is 32x48 with 2 latent frames"),
        ({"control_strength": -0.1}, "control_strength is -0.1; use 0.0 to 10.0"),
        ({"control_start": 1.5}, "control_start is 1.5; use 0.0 to 1.0"),
        ({"end_image": torch.ones(1, 16, 1, 4, 4)}, "an end image goes with a start image and at least 5 frames"),
        ({"image": torch.ones(1, 16, 1, 4, 4), "end_image": torch.ones(1, 16, 2, 4, 4)}, "the end image's latent is"),
        ({"kept": torch.ones(1, 16, 3, 4, 4)}, "first frames is 32x32 with 3 latent frames and the video is 32x32 with 2"),
        ({"image_strength": 10.5}, "image_strength is 10.5; use 0.0 to 10.0"),
        ({"image_start": 0.5, "image_end": 0.4}, "image_end is 0.4; use 0.5 to 1.0"),
        ({"control_start": 0.5, "control_end": 0.4}, "control_end is 0.4; use 0.5 to 1.0"),
        ({"mask": torch.ones(1, 1, 2, 4, 4)}, "a masked video and its mask go together"),
        ({"masked_video": torch.ones(1, 16, 2, 4, 4)}, "a masked video and its mask go together"),
        ({"masked_video": torch.ones(1, 16, 2, 4, 4), "mask": torch.ones(1, 1, 1, 4, 4)}, "the mask is 32x32 with 1 latent"),
        ({"masked_video": torch.ones(1, 16, 2, 4, 4), "mask": torch.ones(1, 2, 2, 4, 4)}, "the mask is \\(1, 2, 2, 4, 4\\)"),
        ({"masked_video": torch.ones(1, 1, 2, 4, 4), "mask": torch.ones(1, 1, 2, 4, 4)}, "masked video's latent is"),
        ({"positive": torch.ones(1, 2, 8, 4)}, "positive conditioning is \\(1, 2, 8, 4\\); it must be \\[1 or 1, tokens"),
        ({"positive_starts": (0, 0.5)}, "positive conditioning is \\(.*\\); it must be \\[1 or 1, prompts, tokens"),
        *(
            ({"negative": torch.ones(1, 2, 8, 4), "negative_starts": starts}, "negative_starts is .* it must be 2 ascending")
            for starts in ((0,), (0, 0.2, 0.5), (0.1, 0.5), (0, 0), (0, -1), (0, 1.0), (0, float("nan")))
        ),
    ],
)
def test_a_sampling_job_that_makes_no_sense_is_refused_in_one_line(changes, words):
    with pytest.raises(RequestError, match=words) as error:
        sample(**changes)
    assert "\n" not in str(error.value)


def test_the_largest_seed_of_comfyui_and_cfg_1_without_negative_are_fine():
    assert sample(seed=2**64 - 1).guided
    assert not sample(cfg=1.0, negative=None).guided


def test_prompts_take_turns_by_the_share_of_the_steps_that_is_done():
    settings = {
        "positive": torch.ones(1, 3, 8, 4),
        "positive_starts": (0, 0.3, 0.5),
        "steps": 10,
        "latent": torch.ones(1, 16, 2, 4, 4),
    }
    whole, half = sample(**settings), sample(**settings, denoise=0.6)
    assert [whole.prompts_of(step) for step in range(10)] == [(0, 0)] * 3 + [(0, 1)] * 2 + [(0, 2)] * 5
    assert [half.prompts_of(step) for step in range(6)] == [(0, 1)] + [(0, 2)] * 5  # from the fifth of ten on
    assert sample(steps=10, denoise=0.6, latent=torch.ones(1, 16, 2, 4, 4)).prompts_of(5) == (0, 0)


def test_a_video_to_encode_must_be_frames_of_three_channels():
    EncodeJob(MODEL, torch.zeros(5, 32, 48, 3))
    for shape in ((5, 32, 48, 4), (5, 32, 48), (6, 32, 48, 3), (5, 30, 48, 3)):
        with pytest.raises(RequestError):
            EncodeJob(MODEL, torch.zeros(shape))


@pytest.mark.parametrize(
    "job",
    [
        sample(seed=5),
        sample(cfg=1.0, negative=None),
        sample(image=torch.rand(1, 16, 1, 4, 4)),
        sample(model=Model("/nowhere", loras=(Lora("/a.safetensors", -0.5), Lora("/b.safetensors")))),
        sample(model=Model("/nowhere", dtype="bf16", offload="none", compile="off", fp8="all")),
        sample(model=Model("/nowhere", quantize="int8")),
        sample(windows=Windows(17, 4, "uniform", False, "on")),
        sample(control=torch.rand(1, 16, 2, 4, 4), control_strength=0.5, control_start=0.1, control_end=0.9),
        sample(image=torch.rand(1, 16, 1, 4, 4), image_strength=0.5, image_start=0.1, image_end=0.9),
        sample(masked_video=torch.rand(1, 16, 2, 4, 4), mask=torch.rand(1, 1, 2, 4, 4), image_scale="raw"),
        sample(positive=torch.rand(1, 2, 8, 4), positive_starts=(0, 0.5)),
        DecodeJob(MODEL, torch.rand(1, 16, 2, 4, 4), "on", 128, 32),
    ],
)
def test_a_job_survives_being_taken_apart(job):
    plain, tensors = split_fields(job)
    again = join_fields(job.kind, json.loads(json.dumps(plain)), tensors)
    assert again.model == job.model
    assert split_fields(again)[0] == plain
    assert all(torch.equal(tensors[name], getattr(again, name)) for name in tensors)
    assert again.model == job.model
    assert all(getattr(again, name, None) == getattr(job, name, None) for name in ("windows", "positive_starts"))


def test_sides_that_know_no_conditions_understand_a_job_without_them():
    plain, tensors = split_fields(sample(steps=7))
    assert (set(plain), set(tensors)) == ({"model", "steps"}, {"positive", "negative", "latent"})
    again = join_fields("sample", plain, tensors)
    assert (again.steps, again.cfg, again.image, again.control, again.control_strength) == (7, 6.0, None, None, 1.0)


def test_sides_that_know_only_paths_understand_a_model_without_more():
    plain, tensors = split_fields(sample())
    assert plain["model"] == {"path": MODEL.path}
    assert join_fields("sample", plain, tensors).model == MODEL


NO_LORAS = [5, [{"strength": 1.0}], ["/x.safetensors"], [{"path": "/x.safetensors", "strength": "strong"}]]


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"model": None},
        {"model": "x"},
        {"model": {"path": "/x", "code": "y"}},
        {"positive_starts": ["a", 0.5]},
        {"positive_starts": 5},
        *({"model": {"path": "/x", "loras": loras}} for loras in NO_LORAS),
    ],
)
def test_fields_that_no_job_has_are_refused(change):
    plain, tensors = split_fields(sample())
    with pytest.raises(RequestError):
        join_fields("sample", {**plain, **change}, tensors)
    with pytest.raises(RequestError, match="job kind"):
        join_fields("shell", plain, tensors)
