"""Pictures of a video in the making: what the VAE makes of a step's clean latents, in every way of running a job."""

from types import SimpleNamespace

import pytest
import torch

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.vae import preview
from parallel_backend.engine.engine import Engine
from parallel_backend.errors import Cancelled
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import Model
from parallel_backend.parallel.rank import RankContext

from .conftest import TOLERANCE

SIZE = (64, 48, 17)
"""Five latent frames, of which four are shown in two rows."""


@pytest.fixture
def at_every_step(configure):
    configure(preview, preview_seconds=0.0)


@pytest.mark.parametrize("frames, expected", [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 3, 4]), (13, [0, 4, 8, 12])])
def test_moments_are_spread_from_the_first_to_the_last(frames, expected):
    assert preview.moments(frames) == expected


@pytest.mark.parametrize("like", ["2b", "5b", "1.5-5b"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.slow
def test_each_picture_is_what_the_vae_makes_of_the_clean_latent(like, scheduler, at_every_step, make_job, local, checkpoints):
    job, shown = make_job(like, size=SIZE, steps=3, scheduler=scheduler), []
    result = local.sample(job, on_picture=shown.append)
    assert torch.equal(result.tensor, local.sample(job).tensor)
    assert len(shown) == 3 and {(picture.shape, picture.dtype) for picture in shown} == {((96, 128, 3), torch.uint8)}
    # The last step ends at what it takes for clean, so the last picture is of the result.
    own = [local.decode(DecodeJob(job.model, result.tensor[:, :, [place]])).tensor[0, 0] for place in (0, 1, 3, 4)]
    expected = torch.cat([torch.cat(own[:2], dim=1), torch.cat(own[2:], dim=1)])
    assert (shown[-1] / 255 - expected).abs().max() <= 1.5 / 255
    assert (shown[0] != shown[-1]).any()


def test_large_videos_are_shown_small_and_a_batch_by_its_first(make_job, local, at_every_step, checkpoints):
    model = Model(str(checkpoints["5b"]))
    engine = Engine(RankContext(torch.device("cpu")))
    module = engine.cache.vae(Checkpoint.open(model.path), torch.float32)
    latent = torch.randn(2, 16, 3, 50, 70, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    shown = []
    previews = preview.Previews(module, scaling=1.0, skipped=1, show=shown.append, go_on=lambda: True)
    previews.look(latent)
    assert shown[0].shape == (50 // 3 * 8, 2 * (70 // 3) * 8, 3)
    previews.look(torch.cat([latent[:1], torch.zeros_like(latent[:1])]))
    assert torch.equal(shown[0], shown[1])


def test_pictures_come_now_and_then(make_job, local, monkeypatch, configure):
    job, shown, now = make_job("5b", size=SIZE, steps=8), [], iter(range(100))
    configure(preview, preview_seconds=5.0)
    monkeypatch.setattr(preview, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    local.sample(job, on_picture=shown.append)
    assert 2 < len(shown) < 8


def test_the_last_picture_is_of_the_result_however_short_the_job_is(make_job, local, configure):
    """Three of six steps: where the number does not divide 1000, the result is not what the last step takes for clean."""
    configure(preview, preview_seconds=1e9)
    noisy = torch.randn(1, 16, 5, 6, 8, generator=torch.Generator().manual_seed(1))
    job, shown = make_job("5b", size=SIZE, steps=6, latent=noisy, denoise=0.5), []
    result = local.sample(job, on_picture=shown.append)
    assert len(shown) == 2
    module = local.engine.cache.held["vae"][1]
    expected = preview.picture(module, result.tensor[0].transpose(0, 1))
    assert (shown[1].int() - expected.int()).abs().max() <= 1


def test_a_job_whose_caller_wants_none_or_whose_model_cannot_loads_no_vae(make_job, at_every_step, monkeypatch):
    executor, shown = LocalExecutor(torch.device("cpu")), []
    job = make_job("5b", size=SIZE, steps=2)
    assert not executor.sample(job).report.notes and executor.status()["held"] == ["transformer"]
    monkeypatch.delitem(Checkpoint.open(job.model.path).elements, "vae")
    assert executor.sample(job, on_picture=shown.append).report.notes == ("no previews: the model has no VAE",)
    assert not shown and executor.status()["held"] == ["transformer"]


@pytest.mark.parametrize("name", ["load_vae", "picture"])
@pytest.mark.parametrize(
    "error, words",
    [(torch.OutOfMemoryError("no"), "there is not enough memory"), (OSError("the file is torn"), "the file is torn")],
)
def test_where_no_picture_can_be_made_the_video_is(name, error, words, make_job, local, at_every_step, monkeypatch):
    executor, job, shown = LocalExecutor(torch.device("cpu")), make_job("5b", size=SIZE, steps=3), []

    def fail(*_):
        raise error

    monkeypatch.setattr(Checkpoint if name == "load_vae" else preview, name, fail)
    result = executor.sample(job, on_picture=shown.append)
    assert not shown and result.report.notes == (f"no previews: {words}",)
    assert torch.equal(result.tensor, local.sample(job).tensor)


def test_who_is_shown_pictures_may_stop_the_job(make_job, local, at_every_step):
    def stop(_):
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        local.sample(make_job("5b", size=SIZE, steps=3), on_picture=stop)


@pytest.mark.parametrize("plan", ["cfg2", "ulysses2"])
@pytest.mark.slow
def test_a_group_shows_pictures_and_makes_the_same_video(plan, start_group, make_job, local):
    shown, expected = [], []
    job = make_job("5b", size=SIZE, steps=4)
    result = start_group(plan).sample(job, on_picture=shown.append)
    assert not result.report.notes and (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    local.sample(job, on_picture=expected.append)
    assert (shown[0].int() - expected[0].int()).abs().max() <= 2  # both of the first step


def test_the_sampler_shows_them_where_comfyui_is_told_to(in_comfyui):
    shown, _ = in_comfyui("""
import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
configure("parallel_backend.cogvideox.vae.preview", preview_seconds=1e9)
seen = []
comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total, preview)))
job, found = sample(), []
for method in (LatentPreviewMethod.NoPreviews, LatentPreviewMethod.Auto):
    args.preview_method = method
    seen.clear()
    host.run(job)
    found.append([(value, total, preview and (preview[0], *preview[1].size, preview[2])) for value, total, preview in seen])
show(found=found)
""")
    without, with_pictures = shown["found"]
    assert [one[2] for one in without] == [None] * len(without)
    pictures = [one for one in with_pictures if one[2]]
    assert [one[:2] for one in pictures] == [[1, 2], [2, 2]] and pictures[0][2] == ["JPEG", 3 * 64, 48, 512]
