"""A start image or a video gives what diffusers' own image- and video-to-video pipelines, run here, make of it."""

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
)
from PIL import Image

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline import validation
from parallel_backend.cogvideox.pipeline.image import cover
from parallel_backend.errors import RequestError
from parallel_backend.jobs import EncodeJob
from parallel_backend.model import Model
from parallel_backend.notes import is_warning

from .conftest import TOLERANCE
from .support.diffusers_reference import reference

CLASSES = {
    "5b-i2v": CogVideoXImageToVideoPipeline,
    "1.5-5b-i2v": CogVideoXImageToVideoPipeline,
    "2b": CogVideoXVideoToVideoPipeline,
    "5b": CogVideoXVideoToVideoPipeline,
    "1.5-5b": CogVideoXVideoToVideoPipeline,
}


@pytest.fixture(scope="module")
def pipelines(checkpoints):
    found = {like: cls.from_pretrained(checkpoints[like]) for like, cls in CLASSES.items()}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


def pictures(count: int, *, width: int, height: int, seed: int = 1) -> list[Image.Image]:
    """Coloured squares."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST) for picture in small]


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    """``[frames, height, width, 3]`` in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255


def encode(local, path, images: list[Image.Image]) -> torch.Tensor:
    return local.encode(EncodeJob(Model(str(path)), pixels_of(images))).tensor


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (96, 64, 17)},  # five latent frames: CogVideoX 1.5 pads; the size of the learned positions
        {"size": (96, 64, 13), "cfg": 1.0},  # four: it does not
        {"size": (96, 64, 9), "batch": 2, "dynamic_cfg": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("like", ["5b-i2v", "1.5-5b-i2v"])
def test_a_start_image_gives_the_latents_of_diffusers(like, scheduler, settings, pipelines, make_job, local, checkpoints):
    images = pictures(settings.get("batch", 1), width=96, height=64)
    frames = settings["size"][2]
    expected = reference(pipelines[like], steps=6, scheduler=scheduler, image=images, num_frames=frames, **settings)
    image = torch.cat([encode(local, checkpoints[like], [one]) for one in images])
    latents = local.sample(make_job(like, steps=6, scheduler=scheduler, image=image, **settings)).tensor
    assert latents.shape == expected.shape
    assert (latents - expected).abs().max() <= TOLERANCE


class Interpolation(CogVideoXImageToVideoPipeline):
    """diffusers' pipeline with its images as CogvideoX-Interpolation has them: both encoded alone, and zeros between them."""

    last: Image.Image

    def prepare_latents(self, image, batch, channels, frames, height, width, dtype, device, generator, latents=None):
        last = self.video_processor.preprocess(self.last, height=height, width=width)
        first, last = (
            self.vae.encode(pixels[:, :, None]).latent_dist.sample(generator).transpose(1, 2) * self.vae.config.scaling_factor
            for pixels in (image, last)
        )
        shape = (batch, (frames - 1) // 4 + 1, *first.shape[2:])
        between = torch.zeros(batch, shape[1] - 2, *shape[2:])
        return torch.randn(shape, generator=generator) * self.scheduler.init_noise_sigma, torch.cat([first, between, last], 1)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_two_images_give_the_latents_of_cogvideox_interpolation(scheduler, pipelines, make_job, local, checkpoints):
    images, size = pictures(2, width=96, height=64), (96, 64, 17)
    pipeline = Interpolation(**pipelines["5b-i2v"].components)
    pipeline.last = images[1]
    pipeline.set_progress_bar_config(disable=True)
    expected = reference(pipeline, size=size, steps=6, scheduler=scheduler, image=images[0], num_frames=17)
    image, end = (encode(local, checkpoints["5b-i2v"], [one]) for one in images)
    result = local.sample(make_job("5b-i2v", size=size, steps=6, scheduler=scheduler, image=image, end_image=end))
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    assert note.startswith("5b-i2v is shown the end image in the last latent frame, as CogvideoX-Interpolation's weights were")
    assert is_warning(note)


def anisora_rotary(pipeline, height: int, width: int, frames: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of AniSora V1 (``Rotary3DPositionEmbeddingMixin``): whole numbers from the corner, with frequencies for each axis."""
    features = pipeline.transformer.config.attention_head_dim
    lengths, angles = (frames, height // 16, width // 16), []
    for axis, size in enumerate((features // 4, features // 8 * 3, features // 8 * 3)):
        turns = torch.arange(lengths[axis])[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
        place = [length if own == axis else 1 for own, length in enumerate(lengths)]
        angles.append(turns.repeat_interleave(2, dim=1).view(*place, size).expand(*lengths, size))
    whole = torch.cat(angles, dim=-1).flatten(0, 2)
    return whole.cos(), whole.sin()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_anisora_takes_two_images_at_any_size(scheduler, make_job, local, checkpoints, monkeypatch):
    monkeypatch.setattr(Interpolation, "_prepare_rotary_positional_embeddings", anisora_rotary)
    pipeline = Interpolation.from_pretrained(checkpoints["anisora-i2v"])
    images, given = pictures(2, width=48, height=112), {"size": (48, 112, 13), "steps": 4, "scheduler": scheduler}
    pipeline.last = images[1]
    pipeline.set_progress_bar_config(disable=True)
    expected = reference(pipeline, image=images[0], num_frames=13, dynamic_cfg=True, **given)
    image, end = (encode(local, checkpoints["anisora-i2v"], [one]) for one in images)
    result = local.sample(make_job("anisora-i2v", image=image, end_image=end, dynamic_cfg=True, **given))
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    assert note == "anisora-i2v is shown the end image in the last latent frame, as AniSora V1 was trained" and not is_warning(
        note
    )


def test_cogvideox_1_5_takes_an_image_at_any_size_up_to_its_positions(pipelines, make_job, local, checkpoints):
    (image,) = pictures(1, width=80, height=48)
    size = (80, 48, 17)
    expected = reference(pipelines["1.5-5b-i2v"], size=size, steps=6, scheduler="dpm", image=image, num_frames=17)
    image = encode(local, checkpoints["1.5-5b-i2v"], [image])
    job = make_job("1.5-5b-i2v", size=size, steps=6, scheduler="dpm", image=image)
    assert (local.sample(job).tensor - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("like", ["5b-i2v", "1.5-5b-i2v"])
def test_another_image_gives_another_video_and_one_image_serves_a_batch(like, make_job, local, checkpoints):
    one, other = (encode(local, checkpoints[like], [image]) for image in pictures(2, width=96, height=64))
    first = local.sample(make_job(like, steps=4, image=one, size=(96, 64, 9))).tensor
    assert (first - local.sample(make_job(like, steps=4, image=other, size=(96, 64, 9))).tensor).abs().max() > 0.01
    shared = local.sample(make_job(like, steps=4, image=one, size=(96, 64, 9), batch=2)).tensor
    apart = local.sample(make_job(like, steps=4, image=one.repeat(2, 1, 1, 1, 1), size=(96, 64, 9), batch=2)).tensor
    assert shared.shape == (2, 16, 3, 8, 12)
    assert torch.equal(shared, apart)


def test_a_start_image_and_a_part_of_the_steps_go_together(make_job, local, checkpoints):
    (image,) = pictures(1, width=96, height=64)
    given = {"image": encode(local, checkpoints["5b-i2v"], [image]), "latent": torch.ones(1, 16, 3, 8, 12)}
    result = local.sample(make_job("5b-i2v", steps=4, denoise=0.5, **given))
    assert len(result.report.step_seconds) == 2 and result.tensor.shape == (1, 16, 3, 8, 12)


@pytest.mark.parametrize(
    "like, frames, settings",
    [
        ("2b", 9, {"scheduler": "ddim", "denoise": 0.5}),
        ("5b", 9, {"scheduler": "dpm", "denoise": 0.8, "batch": 2}),
        ("5b", 9, {"scheduler": "ddim", "denoise": 0.3, "cfg": 1.0}),
        ("5b", 9, {"scheduler": "dpm", "denoise": 0.6, "dynamic_cfg": True}),
        ("5b", 9, {"scheduler": "ddim", "denoise": 0.6, "dynamic_cfg": True}),
        ("1.5-5b", 13, {"scheduler": "dpm", "denoise": 0.8}),
        ("1.5-5b", 5, {"scheduler": "ddim", "denoise": 0.6, "cfg": 1.0}),
    ],
    ids=str,
)
def test_a_video_gives_the_latents_of_diffusers(like, frames, settings, pipelines, make_job, local, checkpoints):
    batch, size = settings.get("batch", 1), (80, 48, frames)
    videos = [pictures(frames, width=80, height=48, seed=seed) for seed in range(batch)]
    given = {key: value for key, value in settings.items() if key != "denoise"}
    expected = reference(pipelines[like], size=size, steps=10, video=videos if batch > 1 else videos[0],
                         strength=settings["denoise"], **given)  # fmt: skip
    latent = torch.cat([encode(local, checkpoints[like], video) for video in videos])
    result = local.sample(make_job(like, steps=10, latent=latent, **settings))
    assert len(result.report.step_seconds) == int(10 * settings["denoise"])
    assert (result.tensor - expected).abs().max() <= TOLERANCE


def test_a_video_that_cogvideox_1_5_would_have_to_pad_is_refused_by_diffusers_and_by_us(pipelines, make_job, checkpoints):
    with pytest.raises(ValueError, match="divisible"):
        reference(pipelines["1.5-5b"], size=(80, 48, 9), scheduler="dpm", video=pictures(9, width=80, height=48), strength=0.6)
    job = make_job("1.5-5b", latent=torch.ones(1, 16, 3, 6, 10), denoise=0.6)
    with pytest.raises(RequestError, match="needs a multiple of 2 latent frames and the video has 3: use 13 frames"):
        validation.check(Checkpoint.open(checkpoints["1.5-5b"]), job)


@pytest.mark.parametrize("rows, columns", [(64, 96), (128, 192), (64, 200), (300, 96), (31, 47), (1, 1), (1000, 7)])
def test_a_picture_covers_the_video_and_loses_the_same_on_both_sides(rows, columns):
    red = torch.linspace(0, 1, columns).expand(1, rows, columns)
    green = torch.linspace(0, 1, rows)[None, :, None].expand(1, rows, columns)
    picture = torch.stack([red, green, torch.full_like(red, 0.25), torch.ones_like(red)], dim=-1)  # with an alpha channel
    covered = cover(picture, width=96, height=64)
    assert covered.shape == (1, 64, 96, 3)
    assert 0 <= covered.min() and covered.max() <= 1
    assert torch.allclose(covered[..., 2], torch.tensor(0.25), atol=1e-4)
    if min(rows, columns) == 1:
        return
    shown = min(1, columns / rows * 64 / 96), min(1, rows / columns * 96 / 64)  # of the height, of the width
    for colours, kept in ((covered[0, 32, :, 0], shown[1]), (covered[0, :, 48, 1], shown[0])):
        assert (colours[0] + colours[-1]).item() == pytest.approx(1, abs=0.03)  # as much is cut off left as right
        assert (colours[-1] - colours[0]).item() == pytest.approx(kept, abs=0.05)


def test_a_picture_of_the_right_size_is_left_as_it_is():
    picture = torch.rand(3, 64, 96, 3)
    assert torch.equal(cover(picture, width=96, height=64), picture)
