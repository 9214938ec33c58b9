"""Upscaling: the videos of DOVE's and SparkVSR's formulas, in every plan, whole and in tiles."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from parallel_backend.cogvideox.offload import working_bytes
from parallel_backend.cogvideox.pipeline.upscaling import Mosaic, describe, rounded_up, tiles_of, windows
from parallel_backend.cogvideox.vae import tiling
from parallel_backend.devices import Devices
from parallel_backend.engine import engine
from parallel_backend.errors import Cancelled, RequestError
from parallel_backend.executor import feasible
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.executor.prepare import check_job, prepare
from parallel_backend.executor.replicas import ReplicasExecutor
from parallel_backend.executor.upscaling import without_repetition
from parallel_backend.jobs import DecodeJob, Report, Result, UpscaleJob
from parallel_backend.model import Model
from parallel_backend.plan import Plan
from parallel_backend.planner import gpu_table
from parallel_backend.planner.planner import choose

from .conftest import TOLERANCE, rank_processes
from .support import dove

DOVE, SPARK = "1.5-5b", "1.5-5b-i2v"
TILED = {"tile": 64, "overlap": 16, "frames": 9, "frame_overlap": 1}
WHOLE = [(slice(0, 9), slice(0, 32), slice(0, 48))]
FOUR = [(slice(start, start + 9), slice(0, 32), slice(left, left + 48)) for start in (0, 8) for left in (0, 32)]
"""Those of 10 frames of 80x32, padded to 17, with ``TILED``."""


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def make(checkpoints, texts):
    def job(like: str = DOVE, video: torch.Tensor | None = None, **settings) -> UpscaleJob:
        video = clip(9, 8, 12) if video is None else video
        return UpscaleJob(Model(str(checkpoints[like])), video, texts[like][0], **settings)

    return job


@pytest.fixture(scope="module")
def cases(make, checkpoints, texts) -> list[tuple[UpscaleJob, np.ndarray]]:
    """Jobs, and what their authors' formula makes: one whole, one in four tiles, one of the other model."""
    found = []
    for like, video, scale, tiles, settings in (
        (DOVE, clip(9, 8, 12), 4, WHOLE, {}),
        (DOVE, clip(10, 8, 20), 4, FOUR, TILED),
        (DOVE, clip(1, 8, 12), 4, [(slice(0, 1), slice(0, 32), slice(0, 48))], {}),
        (SPARK, clip(7, 16, 24), 2, WHOLE, {"scale": 2}),
    ):
        pipeline = CogVideoXPipeline.from_pretrained(checkpoints[like])
        overlaps = (TILED["frame_overlap"], TILED["overlap"], TILED["overlap"])
        expected = dove.upscaled(pipeline, video, texts[like][0], scale=scale, tiles=tiles, overlaps=overlaps)
        found.append((make(like, video, **settings), expected))
    return found


def check(executor, cases) -> list:
    """Holds what an executor makes to the expected videos. Returns the reports."""
    reports, seen = [], []
    for job, expected in cases:
        result = executor.run(job, on_step=lambda *step: seen.append(step))
        assert result.tensor.shape == expected.shape
        assert np.abs(result.tensor.numpy() - expected).max() <= TOLERANCE
        total = len(tiles_of(job))
        assert seen[-total:] == [(step, total) for step in range(1, total + 1)]
        assert len(result.report.step_seconds) == total
        reports.append(result.report)
    return reports


def test_a_video_is_that_of_its_authors_formula(cases, local):
    check(local, cases)
    (whole, expected), *_ = cases
    other = local.run(replace(whole, positive=whole.positive / 2)).tensor.numpy()
    assert np.abs(other - expected).max() > 100 * TOLERANCE  # the text is seen


@pytest.mark.parametrize("plan", ["ulysses2", "ring2", "tensor2", pytest.param("ulysses2-fsdp2", marks=pytest.mark.slow)])
def test_two_processes_give_the_video_of_its_authors_formula(plan, cases, start_group):
    reports = check(start_group(plan), cases)
    assert {(report.plan, len(report.peak_memory)) for report in reports} == {(plan, 2)}


@pytest.fixture(scope="module")
def replicas():
    executor = ReplicasExecutor(Plan.parse("replicas2"), Devices("cpu", (0, 1)))
    yield executor
    executor.close()


def test_replicas_share_the_tiles_and_give_the_video_of_its_authors_formula(cases, replicas, local, monkeypatch):
    taken = {}
    for place, replica in enumerate(replicas.replicas):
        monkeypatch.setattr(replica, "run", noting(taken, place, replica.run))
    with torch.inference_mode():  # as in ComfyUI; the replicas' threads are not in it
        check(replicas, cases[:2])
    assert set(taken.values()) == {0, 1}
    job, _ = cases[1]
    found = replicas.run(job).tensor
    assert torch.equal(found, replicas.run(job).tensor)  # whichever tile was finished first
    assert (found - local.run(job).tensor).abs().max() <= TOLERANCE


def noting(taken: dict, place: int, run):
    def noted(job, *others):
        taken[job.place] = place
        return run(job, *others)

    return noted


def test_a_tile_whose_replica_is_killed_is_made_again(cases, replicas, monkeypatch):
    (job, expected), replica, killed = cases[1], replicas.replicas[0], []
    run = replica._run

    def killing(part, *others):
        if part.kind == "window" and not killed:
            killed.append(rank_processes(replica.address)[0])
            os.kill(killed[0], signal.SIGKILL)
        return run(part, *others)

    monkeypatch.setattr(replica, "_run", killing)
    result = replicas.run(job)
    assert np.abs(result.tensor.numpy() - expected).max() <= TOLERANCE
    assert killed and any("was lost" in note for note in result.report.notes)


def test_it_stops_between_the_jobs_of_a_tile(make):
    executor, asked = LocalExecutor(torch.device("cpu")), []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(Cancelled):
        executor.run(make(), should_stop=should_stop)


def test_what_has_no_effect_is_said(make, local, monkeypatch):
    job = make()
    assert not local.run(job).report.notes
    monkeypatch.setattr(local, "plan", Plan.parse("cfg2"), raising=False)
    asked = replace(job, model=replace(job.model, step_cache=0.1, guidance_cache=4))
    assert local.run(asked).report.notes == (
        "step_cache has no effect: a tile takes one step",
        "guidance_cache has no effect: a tile takes one step",
        "an upscaling model has no guidance: both halves of plan 'cfg2' compute the same",
    )


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("height, width", [(8, 40), (9, 43)])
def test_tiles_are_cut_out_of_the_enlarged_video(scale, height, width, make):
    video = clip(6, height, width)
    job = make(video=video, scale=scale, tile=64, overlap=31, frames=9, frame_overlap=2)
    frames, rows, columns = (
        rounded_up(edge, *how) for edge, how in ((6, (8, 1)), (height * scale, (16,)), (width * scale, (16,)))
    )
    border = (-(-rows // scale) - height, -(-columns // scale) - width)
    padded = torch.cat([video, video[-1:].repeat(frames - 6, 1, 1, 1)]).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(padded, (0, border[1], 0, border[0]), mode="replicate")
    large = torch.nn.functional.interpolate(padded, scale_factor=scale, mode="bilinear", align_corners=False)
    large = large.permute(0, 2, 3, 1)
    for tile in tiles_of(job):
        assert (tile.pixels(video, scale) - large[tile.place]).abs().max() <= 1e-6


@pytest.mark.parametrize("size, most, overlap, unit, first", [(1280, 1024, 64, 16, 0), (3840, 1024, 64, 16, 0), (161, 33, 8, 8, 1), (41, 33, 16, 8, 1), (33, 33, 8, 8, 1), (1088, 512, 256, 16, 0)])  # fmt: skip
def test_windows_cover_all_with_weights_of_one_and_are_alike(size, most, overlap, unit, first):
    found = windows(size, most, overlap, unit, first)
    lengths = {len(window.weights) for window in found}
    assert len(lengths) == 1 and max(lengths) <= most and (max(lengths) - first) % unit == 0
    total = np.zeros(size)
    for window in found:
        total[window.frames] += window.weights
    assert np.allclose(total, 1)
    assert all(after.start <= before.start + max(lengths) - overlap for before, after in zip(found, found[1:]))


def test_notes_of_tiles_that_differ_in_numbers_are_shown_once():
    notes = ("VAE in tiles: 1.5 GiB are free", "another", "VAE in tiles: 1.4 GiB are free")
    result = without_repetition(Result(torch.empty(0), Report(notes=notes)))
    assert result.report.notes == notes[:2]


def test_a_tile_that_cannot_fit_is_refused_before_anything_starts(make, monkeypatch):
    monkeypatch.setattr(feasible, "usable_memory", lambda: 2**20)
    prepared = prepare(check_job(make()), "single", "cpu")
    with pytest.raises(RequestError, match="a tile of 48x32 with 9 frames is predicted to need .*; use smaller tiles"):
        feasible.check_feasible(prepared)


def test_a_mosaic_is_the_same_in_any_order(make):
    job = make(video=clip(10, 8, 20), **TILED)
    parts = [
        torch.rand(*tile.size, 3, generator=torch.Generator().manual_seed(place)) for place, tile in enumerate(tiles_of(job))
    ]
    made = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        mosaic = Mosaic(job)
        for number in order:
            mosaic.add(number, parts[number])
        made.append(mosaic.video)
    assert torch.equal(*made) and 0 < made[0].min() and made[0].max() <= 1


def test_what_is_made_is_said(make):
    assert describe(make()) == "9 frames of 12x8 to 48x32 in one tile of 9 frames of 48x32"
    assert describe(make(video=clip(10, 8, 20), **TILED)) == "10 frames of 20x8 to 80x32 in 4 tiles of 9 frames of 48x32"


def test_the_planner_counts_tiles_and_memory_is_that_of_one(make):
    job = make(video=clip(49, 180, 320))
    checked = check_job(job)
    workload = checked.workload()
    assert (workload.jobs, workload.unit, workload.guided, workload.batch) == (4, "tiles", False, 1)
    plan, reason = choose(
        workload.work(torch.device("cpu")), gpu_table.KNOWN["H100"], 2, jobs=workload.jobs, unit=workload.unit
    )
    assert str(plan) == "replicas2" and "for all 4 tiles" in reason
    assert workload.work(torch.device("cpu")).pixels == 33 * 720 * 672
    assert prepare(checked, "auto", "cpu:2").plan == Plan(replicas=2)
    need = working_bytes(job, checked.checkpoint, Plan(), torch.float32)
    latent = torch.empty(1, 16, 9, 90, 84)
    assert need >= tiling.working_bytes(DecodeJob(job.model, latent), torch.float32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scale": 9}, "scale is 9; use 1 to 8"),
        ({"tile": 100}, "tile size is 100; it must be a multiple of 16, such as 96"),
        ({"frames": 32}, "a tile has 32 frames; it must be 8k.1, such as 33"),
        ({"frame_overlap": 17}, "overlap of frames is 17; use 0 to 16"),
        ({"overlap": 600}, "overlap is 600; use 0 to 512"),
        ({"pixels": torch.zeros(0, 8, 8, 3)}, r"the video is \(0, 8, 8, 3\)"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words, make):
    with pytest.raises(RequestError, match=words):
        replace(make(), **changes)


def test_what_a_model_or_a_plan_cannot_do_is_refused(make):
    with pytest.raises(RequestError, match="makes videos from a control video; to enlarge a video use DOVE"):
        check_job(make("1.5-5b-control"))
    with pytest.raises(RequestError, match="5b has the shape of CogVideoX 1.0; to enlarge a video use DOVE"):
        check_job(make("5b"))
    with pytest.raises(RequestError, match="positive conditioning has 7 tokens"):
        check_job(replace(make(), positive=torch.zeros(1, 7, 32)))
    with pytest.raises(RequestError, match="a tile takes one forward pass.*use plan 'ulysses2'"):
        check_job(make()).check_plan(Plan.parse("pipefusion2"))


def test_a_tile_is_at_its_step_once_the_weights_are_read(make, local, monkeypatch):
    seen, predict = [], engine.predict_window
    monkeypatch.setattr(engine, "predict_window", lambda *given: seen.append(local.stage()) or predict(*given))
    local.free()
    local.run(make())
    assert seen == ["first step"]
