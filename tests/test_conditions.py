"""Control and inpaint models give what diffusers' control pipeline, and VideoX-Fun's formula over diffusers' parts, make."""

from functools import partial

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXFunControlPipeline, CogVideoXPipeline, DDIMScheduler

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline import conditions
from parallel_backend.jobs import EncodeJob
from parallel_backend.model import Model

from .conftest import TOLERANCE
from .support import videox_fun
from .support.diffusers_reference import SCHEDULERS, reference
from .test_image_and_video_input import encode, pictures, pixels_of

SIZES = {
    "5b-control": (48, 48, 9),
    "1.5-5b-control": (64, 48, 5),
    "5b-inp": (64, 48, 9),
    "1.5-5b-inp": (48, 64, 5),
    "2b-inp": (64, 48, 9),
    "2b-control": (48, 48, 9),
}


class OneStepDPM(CogVideoXDPMScheduler):
    """DPM as diffusers' control pipeline calls any scheduler: it hands on no history, so this one keeps its own."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.before = None, None

    def step(self, model_output, timestep, sample, generator=None, return_dict=False):
        history, earlier = self.before
        sample, history = super().step(model_output, history, timestep, earlier, sample, generator=generator, return_dict=False)
        self.before = history, timestep
        return (sample,)


@pytest.fixture(scope="module")
def pipelines(checkpoints):
    """diffusers' pipeline of a like, made when it is asked for; text to video's for the parts of an inpaint model."""
    found = {}

    def get(like: str):
        if like not in found:
            cls = CogVideoXFunControlPipeline if like.endswith("control") else CogVideoXPipeline
            found[like] = cls.from_pretrained(checkpoints[like])
            found[like].set_progress_bar_config(disable=True)
            found[like]._prepare_rotary_positional_embeddings = partial(videox_fun.rotary_of, found[like])
            found[like].scheduler = videox_fun.unshifted(found[like].scheduler.config, "dpm")
            if like.startswith("2b"):
                videox_fun.resize_positions(found[like].transformer)
        return found[like]

    return get


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.parametrize(
    "scheduler, settings",
    [
        ("ddim", {}),
        ("dpm", {}),
        ("ddim", {"cfg": 1.0, "batch": 2}),
        ("dpm", {"batch": 2, "dynamic_cfg": True, "seed": 2**40}),
    ],
    ids=str,
)
@pytest.mark.parametrize("like", ["2b-control", "5b-control", "1.5-5b-control"])
def test_a_control_video_gives_the_latents_of_diffusers(
    like, scheduler, settings, pipelines, make_job, local, checkpoints, monkeypatch
):
    size, batch = SIZES[like], settings.get("batch", 1)
    videos = [pictures(size[2], width=size[0], height=size[1], seed=seed) for seed in range(batch)]
    given = {"steps": 3, "scheduler": scheduler, "size": size, **settings}
    for name, cls in {"ddim": DDIMScheduler, "dpm": OneStepDPM}.items():
        monkeypatch.setitem(SCHEDULERS, name, cls)
    expected = reference(pipelines(like), control_video=videos if batch > 1 else videos[0], **given)
    control = torch.cat([encode(local, checkpoints[like], video) for video in videos])
    assert difference(local.sample(make_job(like, control=control, **given)).tensor, expected) <= TOLERANCE


def test_diffusers_refuses_the_frames_that_we_refuse(pipelines):
    """Ours is tests/test_checkpoint.py's."""
    with pytest.raises(ValueError, match="divisible"):
        reference(
            pipelines("1.5-5b-control"), size=(80, 48, 9), scheduler="dpm", control_video=pictures(9, width=80, height=48)
        )


def masks(kind: str, frames: int, height: int, width: int) -> torch.Tensor:
    """``[frames, height, width]``: what is made anew is the middle of the picture, all but the ends, or all but one."""
    mask = torch.zeros(frames, height, width)
    if kind == "box":
        mask[:, height // 4 : height // 2 + 3, width // 3 : width - 5] = 1
    elif kind == "start and end":
        mask[1:-1] = 1
    elif kind == "end":
        mask[:-1] = 1
    else:
        mask[:] = 1
    return mask


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("box", {"scheduler": "ddim"}),
        ("start and end", {"scheduler": "dpm", "batch": 2}),
        ("end", {"scheduler": "ddim", "cfg": 1.0}),
        ("everything", {"scheduler": "dpm"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("like", ["2b-inp", "5b-inp", "1.5-5b-inp"])
def test_a_masked_video_gives_the_latents_of_videox_fun_s_formula(
    like, kind, settings, pipelines, make_job, local, checkpoints, texts
):
    size = SIZES[like]
    width, height, frames = size
    video, mask = pixels_of(pictures(frames, width=width, height=height)), masks(kind, frames, height, width)
    pixels = video.permute(3, 0, 1, 2) * 2 - 1
    expected = videox_fun.inpaint(pipelines(like), pixels=pixels, mask=mask[None], size=size, texts=texts[like], **settings)
    given = {}
    assert conditions.shows_nothing(mask) == (kind == "everything")
    if kind != "everything":
        hidden = conditions.shown(video, mask)
        encoded = local.encode(EncodeJob(Model(str(checkpoints[like])), hidden)).tensor
        given = {"masked_video": encoded, "mask": conditions.latent_mask(mask)}
    latents = local.sample(make_job(like, size=size, steps=3, **given, **settings)).tensor
    assert difference(latents, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["box", "everything"])
def test_1_5_makes_a_single_frame_as_videox_fun_does(kind, pipelines, make_job, local, checkpoints, texts):
    like, size = "1.5-5b-inp", (64, 48, 1)
    picture, mask = pixels_of(pictures(1, width=64, height=48)), masks(kind, 1, 48, 64)
    given = {"size": size, "scheduler": "ddim"}
    expected = videox_fun.inpaint(
        pipelines(like), pixels=picture.permute(3, 0, 1, 2) * 2 - 1, mask=mask[None], texts=texts[like], **given
    )
    if kind != "everything":
        encoded = local.encode(EncodeJob(Model(str(checkpoints[like])), conditions.shown(picture, mask))).tensor
        given |= {"masked_video": encoded, "mask": conditions.latent_mask(mask)}
    latents = local.sample(make_job(like, steps=3, **given)).tensor
    assert latents.shape == (1, 16, 1, 6, 8) and difference(latents, expected) <= TOLERANCE


def test_a_first_and_a_last_frame_are_a_video_that_is_black_between_them():
    start, end = torch.full((2, 4, 4, 3), 0.5), torch.full((1, 4, 4, 3), 0.75)
    video, mask = conditions.between_images(start, end, frames=9)
    assert video[:, 0, 0, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0.75]
    assert mask[:, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert conditions.between_images(None, end, frames=5)[1][:, 0, 0].tolist() == [1, 1, 1, 1, 0]
    assert conditions.between_images(start, None, frames=1)[1].shape == (1, 4, 4)


def test_a_mask_of_one_frame_and_one_that_is_not_0_or_1_are_cut_at_a_half():
    mask = torch.tensor([0.0, 0.49, 0.5, 1.0]).repeat_interleave(8).expand(1, 16, 32)
    assert conditions.latent_mask(mask)[0, 0, 0].tolist() == [[0, 0, 1, 1]] * 2
    video = torch.full((1, 16, 32, 3), 0.25)
    assert conditions.shown(video, mask)[0, 0, ::8, 0].tolist() == [0.25, 0.25, 0, 0]


def test_noise_on_what_is_shown_is_as_large_as_asked_for_leaves_black_alone_and_is_the_same_each_time():
    video = torch.full((4, 32, 32, 3), 0.5)
    video[:, :16] = 0
    noisy = conditions.add_noise(video, 0.0563)
    assert not noisy[:, :16].any()
    assert (noisy[:, 16:] * 2 - 1).std().item() == pytest.approx(0.0563, rel=0.05)
    assert torch.equal(noisy, conditions.add_noise(video, 0.0563))
    assert torch.equal(conditions.add_noise(video, 0.0), video)


def test_strength_and_the_share_of_steps_change_the_control(make_job, local):
    """Outside its share, and with no strength, control is zeros; the bounds belong to the share."""
    control = torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    sample = partial(make_job, "5b-control", size=(48, 48, 5), steps=4, scheduler="ddim")
    run = lambda **settings: local.sample(sample(**settings)).tensor  # noqa: E731
    none, whole = run(control=torch.zeros_like(control)), run(control=control)
    assert difference(run(control=control, control_strength=0.0), none) == 0
    assert difference(run(control=control, control_strength=0.5), run(control=control / 2)) <= TOLERANCE
    assert difference(run(control=control, control_start=0.8), none) == 0  # the last of four steps begins at 0.75
    assert difference(run(control=control, control_end=0.75), whole) == 0
    late, early = run(control=control, control_start=0.75), run(control=control, control_end=0.5)
    apart = [difference(one, other) for one, other in ((late, none), (late, whole), (early, none), (early, whole))]
    assert min(apart) > 0.01


@pytest.mark.parametrize("like", ["1.5-5b-i2v", "5b-inp"])
def test_strength_and_the_share_of_steps_change_the_image(like, make_job, local, checkpoints):
    """Without them nothing changes, to the bit. Outside its share an image is zeros; for an inpaint model nothing is known then."""
    image = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(1))
    video, mask = image.repeat(1, 1, 2, 1, 1), torch.zeros(1, 1, 2, 8, 12)
    if like == "5b-inp":
        given, half, nothing = {"masked_video": video, "mask": mask}, {"masked_video": video / 2, "mask": mask}, {}
        plain = torch.cat([1 - mask, video], dim=1) * 0.7
    else:
        given, half, nothing = {"image": image}, {"image": image / 2}, {"image": torch.zeros_like(image)}
        plain = torch.cat([image * (1 / 0.7), torch.zeros_like(image)], dim=2)
    sample = partial(make_job, like, size=(96, 64, 5), steps=4, scheduler="ddim")
    run = lambda **settings: local.sample(sample(**settings)).tensor  # noqa: E731
    none, whole = run(**nothing), run(**given)
    condition = conditions.make(sample(**given), Checkpoint.open(checkpoints[like]), torch.zeros(1, 2, 16, 8, 12))
    assert all(torch.equal(condition(done), plain.transpose(1, 2)) for done in (0.0, 0.3, 0.75))
    assert difference(run(**given, image_strength=0.5), run(**half)) <= TOLERANCE
    assert difference(run(**given, image_start=0.8), none) == 0  # the last of four steps begins at 0.75
    assert difference(run(**given, image_end=0.75), whole) == 0
    late, early = run(**given, image_start=0.75), run(**given, image_end=0.5)
    apart = [difference(one, other) for one, other in ((late, none), (late, whole), (early, none), (early, whole))]
    assert min(apart) > 0.005


def test_control_and_inpainting_go_with_a_part_of_the_steps(make_job, local):
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 16, 3, 6, 10, generator=generator)
    for like, given in (
        ("5b-control", {"control": latent[:1]}),
        ("5b-inp", {"masked_video": latent, "mask": latent[:1, :1] > 0}),
    ):
        given = {name: value.float() for name, value in given.items()}
        result = local.sample(make_job(like, latent=latent, steps=4, denoise=0.5, **given))
        assert len(result.report.step_seconds) == 2 and result.tensor.shape == latent.shape


@pytest.mark.parametrize("name", ["inverse", "raw", "scaled"])
def test_each_image_scale_is_that_multiple_of_the_image(name, make_job, local, checkpoints):
    """Another scale is the image multiplied by hand; ``auto`` is the inverse in CogVideoX1.5-5B-I2V."""
    image = torch.randn(1, 16, 1, 6, 10, generator=torch.Generator().manual_seed(4))
    factor = Checkpoint.open(checkpoints["1.5-5b-i2v"]).scaling_factor
    ratio = {"inverse": 1.0, "raw": factor, "scaled": factor**2}[name]
    sample = partial(make_job, "1.5-5b-i2v", size=(80, 48, 5), steps=3)
    ours = local.sample(sample(image=image, image_scale=name)).tensor
    assert difference(ours, local.sample(sample(image=image * ratio)).tensor) <= TOLERANCE
    auto = local.sample(sample(image=image)).tensor
    assert (difference(ours, auto) == 0) == (name == "inverse")


def test_a_checkpoint_that_says_it_was_trained_with_noise_loads(checkpoints, tmp_path, make_job, local):
    """diffusers knows no ``add_noise_in_inpaint_model``, as the published V1.1-5b has it."""
    import json
    import shutil

    folder = shutil.copytree(checkpoints["5b-inp"], tmp_path / "noisy")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_noise_in_inpaint_model": True}))
    job = partial(make_job, "5b-inp", size=(48, 48, 5), steps=2)
    assert difference(local.sample(job(model=Model(str(folder)))).tensor, local.sample(job()).tensor) == 0
