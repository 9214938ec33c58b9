"""Replicas: groups that share the videos of a batch, unequal ones and ones that are lost included."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from parallel_backend import devices as devices_module
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.windows import Layout
from parallel_backend.devices import Devices, visible_index
from parallel_backend.errors import Cancelled, GroupLost, GroupUnavailable, RequestError
from parallel_backend.executor import paces
from parallel_backend.executor import scheduler as scheduler_module
from parallel_backend.executor.batch import cut
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.paces import Paces
from parallel_backend.executor.replicas import ReplicasExecutor
from parallel_backend.executor.scheduler import Pool, ReplicaScheduler
from parallel_backend.group import preflight
from parallel_backend.group.job_fields import join_fields, split_fields
from parallel_backend.jobs import DecodeJob, Progress, Result, SampleJob
from parallel_backend.model import Model, Windows
from parallel_backend.plan import Plan

from .conftest import TOLERANCE, rank_processes, wait_until, workers

VIDEO = torch.randn(3, 16, 3, 6, 10, generator=torch.Generator().manual_seed(5))
CASES = [
    ("2b", {"scheduler": "ddim"}),
    ("5b", {"scheduler": "dpm"}),
    ("5b", {"scheduler": "dpm", "denoise": 0.5, "latent": VIDEO, "steps": 6}),
    ("5b", {"scheduler": "dpm", "windows": Windows(5, 4), "steps": 3}),
    ("5b", {"scheduler": "ddim", "positive_starts": (0, 0.2, 0.5), "steps": 3}),
    ("5b-i2v", {"scheduler": "ddim", "image": torch.randn(3, 16, 1, 8, 12), "size": (96, 64, 9), "steps": 3}),
]


@pytest.fixture(scope="module")
def replicas():
    """Two groups of one process each."""
    executor = ReplicasExecutor(Plan.parse("replicas2"), Devices("cpu", (0, 1)))
    executor.start()
    executor.status()
    yield executor
    executor.close()
    assert wait_until(lambda: not workers())


@pytest.fixture
def batch_of_three(make_job):
    return lambda like="5b", **settings: make_job(like, batch=3, **{"size": (80, 48, 9), "steps": 4, **settings})


def counted(replica, monkeypatch, *, slower: float = 0.0) -> list[int]:
    """Notes each piece that a replica takes, and makes it slower by some seconds."""
    taken, run = [], replica.run

    def slow(job, *others):
        taken.append(getattr(job, "batch_index", 0))
        result = run(job, *others)
        time.sleep(slower)
        return result

    monkeypatch.setattr(replica, "run", slow)
    return taken


@pytest.mark.parametrize("like, settings", CASES)
def test_a_video_made_apart_is_the_one_that_the_batch_would_have_had(like, settings, batch_of_three, local):
    job = batch_of_three(like, **settings)
    expected = local.sample(job).tensor
    pieces = [join_fields("sample", *split_fields(piece)) for piece in cut(job)]  # as they are after the wire
    found = torch.cat([local.sample(piece).tensor for piece in pieces])
    assert (found - expected).abs().max() <= TOLERANCE
    assert (expected[0] - expected[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("like, settings", CASES[:3])
def test_a_batch_over_two_replicas_is_the_one_of_a_single_process(like, settings, replicas, batch_of_three, local, monkeypatch):
    job = batch_of_three(like, **settings)
    taken = [counted(replica, monkeypatch) for replica in replicas.replicas]
    seen = []
    result = replicas.sample(job, on_step=lambda *step: seen.append(step))
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    assert all(taken) and sorted(taken[0] + taken[1]) == [0, 1, 2]
    total = 3 * job.steps_to_run
    assert seen == [(step, total) for step in range(1, total + 1)]
    report = result.report
    assert (report.plan, report.world_size, len(report.peak_memory), len(report.step_seconds)) == ("replicas2", 2, 2, total)
    assert not report.notes


def test_a_slow_replica_takes_fewer_and_results_come_in_order(replicas, make_job, local, monkeypatch):
    jobs = [make_job("5b", size=(48, 48, 5), steps=2, seed=seed) for seed in range(7)]
    slow, fast = (counted(replica, monkeypatch, slower=wait) for replica, wait in zip(replicas.replicas, (3.0, 0.0)))
    results = replicas.sample_all(jobs)
    for job, result in zip(jobs, results):
        assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    assert len(fast) + len(slow) == 7 and len(fast) > len(slow) > 0


def test_videos_are_sampled_and_decoded_where_a_replica_is_free(replicas, make_job, local):
    jobs = [make_job("5b", size=(48, 48, 5), steps=2, seed=seed) for seed in range(4)]
    replicas.free()
    assert replicas.load(jobs[0]).load_seconds > 0
    assert [one["held"] for one in replicas.status()["replicas"]] == [["transformer"]] * 2
    loads, made, seen = replicas.status()["loads"], {}, []

    def decode(place: int, sampled: Result) -> DecodeJob:
        return DecodeJob(jobs[place].model, sampled.tensor)

    def keep(place: int, *results: Result) -> None:
        made[place] = results

    replicas.make_all(jobs, decode, keep, on_step=lambda *step: seen.append(step))
    assert seen[-1] == (8, 8) and replicas.status()["loads"] <= loads + 2  # a VAE each
    for place, job in enumerate(jobs):
        sampled, decoded = made[place]
        assert (sampled.report.plan, len(sampled.report.step_seconds)) == ("replicas2", 2)
        expected = local.decode(decode(place, local.sample(job))).tensor
        assert (decoded.tensor - expected).abs().max() <= TOLERANCE


LONG = {"size": (48, 48, 49), "steps": 3}
"""A video of 13 latent frames."""
WINDOWED = [
    ("5b", {"scheduler": "dpm", "windows": Windows(17, 8, riflex="finetuned"), **LONG}),
    ("5b", {"scheduler": "dpm", "windows": Windows(17, 12, "uniform"), "cfg": 1.0, **LONG}),
    ("1.5-5b", {"scheduler": "ddim", "windows": Windows(13, 8), "dynamic_cfg": True, **LONG}),
    ("5b", {"windows": Windows(17, 8), "positive_starts": (0, 0.3), "negative_starts": (0, 0.6), **LONG}),
    ("5b-inp", {"windows": Windows(17, 8), "mask": torch.rand(1, 1, 13, 6, 6).round(), **LONG}),
]


@pytest.mark.parametrize("like, settings", WINDOWED)
def test_the_windows_of_a_long_video_are_shared(like, settings, replicas, make_job, local, monkeypatch):
    if "mask" in settings:
        settings = {**settings, "masked_video": torch.randn(1, 16, 13, 6, 6)}
    job = make_job(like, **settings)
    taken = [counted(replica, monkeypatch) for replica in replicas.replicas]
    seen, expected = [], local.sample(job)
    result = replicas.sample(job, on_step=lambda *step: seen.append(step))
    assert (result.tensor - expected.tensor).abs().max() <= TOLERANCE
    windows = len(Layout.of(job, Checkpoint.open(job.model.path)).at(0))
    assert windows > 2 and min(map(len, taken)) > 0 and sum(map(len, taken)) >= 3 * windows
    assert seen == [(1, 3), (2, 3), (3, 3)] and len(result.report.step_seconds) == 3
    assert all(result.report.peak_memory) and result.report.notes == expected.report.notes


def test_replicas_show_pictures_and_say_where_they_cannot(replicas, make_job, local):
    shown = []
    batch = make_job("5b", size=(64, 48, 17), steps=3, batch=2)
    result, expected = replicas.sample(batch, on_picture=shown.append), []
    assert (result.tensor - local.sample(batch, on_picture=expected.append).tensor).abs().max() <= TOLERANCE
    assert (shown[0].int() - expected[0].int()).abs().max() <= 2  # both of the first video's first step
    long = make_job("5b", size=(48, 48, 49), steps=2, windows=Windows(17, 8))
    assert replicas.sample(long, on_picture=shown.append).report.notes == (
        "no previews: replicas share the windows of each step",
    )


def test_a_slow_replica_predicts_fewer_windows(replicas, make_job, local, monkeypatch):
    job = make_job("5b", windows=Windows(17, 12), **LONG)
    slow, fast = (counted(replica, monkeypatch, slower=wait) for replica, wait in zip(replicas.replicas, (2.0, 0.0)))
    result = replicas.sample(job)
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    assert len(fast) > 2 * len(slow) > 0


def test_what_has_one_window_or_a_cache_is_left_to_one_replica(replicas, make_job, monkeypatch):
    taken = [counted(replica, monkeypatch) for replica in replicas.replicas]
    path = str(make_job("5b").model.path)
    models = ({"model": Model(path, **cache)} for cache in ({"step_cache": 0.1}, {"guidance_cache": 4}))
    for settings in ({"windows": Windows(81, 8)}, *({"windows": Windows(17, 8), **model} for model in models)):
        replicas.sample(make_job("5b", **LONG, **settings))
    assert len(taken[0]) + len(taken[1]) == 3


class Replica:
    """One that does nothing, and can be lost on its way."""

    is_replaced = False

    def __init__(self, *, lost_at: type | None = None):
        self.lost_at, self.ran = lost_at, []

    def run(self, job, on_step, should_stop, on_picture) -> Result:
        self.ran.append(type(job))
        if type(job) is self.lost_at:
            raise GroupLost("it was killed")
        return Result(torch.zeros(job.latent.shape))

    def is_there(self) -> bool:
        return self.lost_at is None

    def is_ready(self) -> bool:
        return True


class Painter(Replica):
    """One that shows a picture of every step, its last one too: the piece's number and the step."""

    def run(self, job, on_step, should_stop, on_picture) -> Result:
        for step in range(1, job.steps + 1):
            on_step(step, job.steps)
            on_picture(torch.tensor([job.seed, step]))
        return super().run(job, on_step, should_stop, on_picture)


def test_of_several_videos_pictures_are_of_the_first_that_has_steps_left_to_the_very_last(make_job):
    jobs = [make_job("5b", steps=3, seed=seed) for seed in range(2)]
    painter, shown = Painter(), []
    ReplicaScheduler(Pool([painter]), {painter: "one"}, jobs, lambda: False).run(
        lambda *_: None, lambda: False, lambda picture: shown.append(picture.tolist())
    )
    assert shown == [[0, 1], [0, 2], [1, 1], [1, 2], [1, 3]]


def test_a_video_whose_replica_is_lost_while_decoding_is_not_sampled_again(make_job):
    job = make_job("5b")
    frail, strong = Replica(lost_at=DecodeJob), Replica()
    done = []

    def follow(number, made):
        if len(made) == 2:
            done.append((number, [where for where, _ in made]))
            return None
        return DecodeJob(job.model, made[0][1].tensor)

    names = {frail: "replica 1", strong: "replica 2"}
    scheduler = ReplicaScheduler(Pool([frail, strong]), names, [job], lambda: False, follow)
    scheduler.run(lambda *step: None, lambda: False)
    assert done == [(0, [frail, strong])]
    assert (frail.ran, strong.ran) == ([SampleJob, DecodeJob], [DecodeJob])
    assert scheduler.notes == ["replica 1 was lost, and the others do its work: it was killed"]


class OnCluster(Replica):
    """One whose node is lost at a step, so many times, and which is there again afterwards."""

    is_replaced = True

    def __init__(self, *, step: int, times: int = 1):
        super().__init__()
        self.step, self.times, self.begun_at = step, times, []

    def run(self, job, on_step, should_stop, on_picture) -> Result:
        self.begun_at.append(job.progress.step if job.progress else 0)
        if len(self.begun_at) <= self.times:
            error = GroupLost("its node was lost")
            error.progress = Progress(self.step, torch.zeros(1), torch.zeros(1))
            raise error
        return super().run(job, on_step, should_stop, on_picture)

    def is_there(self) -> bool:
        return len(self.begun_at) > self.times


def run_on(replicas, jobs) -> tuple[ReplicaScheduler, list[tuple[int, int]]]:
    names, seen = {replica: f"replica {place}" for place, replica in enumerate(replicas, 1)}, []
    scheduler = ReplicaScheduler(Pool(replicas), names, jobs, lambda: False)
    scheduler.run(lambda *step: seen.append(step), lambda: False)
    return scheduler, seen


def test_a_video_whose_node_is_lost_goes_on_elsewhere_from_its_last_kept_step(make_job, monkeypatch):
    job, lost, other = make_job("5b", steps=8), OnCluster(step=5), OnCluster(step=0, times=0)
    monkeypatch.setattr(lost, "is_ready", lambda: not lost.begun_at)
    scheduler, seen = run_on([lost, other], [job])
    assert other.begun_at == [5]
    assert scheduler.notes == ["replica 1 was lost, and the others do its work: its node was lost"]
    assert seen == [(5, 8)]


def test_a_replica_that_is_there_again_is_used_and_a_video_that_loses_every_node_is_an_error(make_job):
    again = OnCluster(step=3, times=2)
    run_on([again], [make_job("5b", steps=8)])
    assert again.begun_at == [0, 3, 3]
    with pytest.raises(GroupLost, match="its node was lost"):
        run_on([OnCluster(step=3, times=9)], [make_job("5b", steps=8)])


def test_a_replica_without_a_node_gets_no_video_and_none_at_all_is_an_error(make_job, monkeypatch, configure):
    jobs, waiting, there = [make_job("5b", seed=seed) for seed in range(4)], Replica(), Replica()
    monkeypatch.setattr(waiting, "is_ready", lambda: False)
    run_on([waiting, there], jobs)
    assert not waiting.ran and len(there.ran) == 4
    configure(scheduler_module, wait_seconds=0.2)
    with pytest.raises(GroupUnavailable, match="no replica has had a node of the Ray cluster"):
        run_on([waiting], jobs)


def test_decoding_is_spread_and_state_and_memory_are_of_all(replicas, make_job, local):
    job = DecodeJob(make_job("5b").model, VIDEO)
    assert (replicas.decode(job).tensor - local.decode(job).tensor).abs().max() <= TOLERANCE
    status = replicas.status()
    assert (status["state"], status["plan"], len(status["memory"]), len(status["replicas"])) == ("ready", "replicas2", 2, 2)
    assert [one["held"] for one in status["replicas"]] == [status["held"]] * 2
    assert replicas.torch_devices == (torch.device("cpu"),) * 2
    replicas.free()
    assert replicas.status()["held"] == []


def test_a_cancelled_batch_stops_on_all_replicas_and_they_stay_warm(replicas, batch_of_three):
    seen, slow = [], batch_of_three(size=(480, 320, 17), steps=200)
    with pytest.raises(Cancelled):
        replicas.sample(slow, on_step=lambda step, _: seen.append(step), should_stop=lambda: len(seen) >= 2)
    assert wait_until(lambda: all(one["state"] == "ready" for one in replicas.status()["replicas"]))
    assert len(seen) < 10


def test_a_long_video_goes_on_when_a_replica_is_killed_on_the_way(replicas, make_job, local):
    job = make_job("5b", windows=Windows(17, 8), **{**LONG, "steps": 6})
    victim, hurt = replicas.replicas[0], []

    def kill(step: int, total: int) -> None:
        if step == 3:
            hurt.append(os.kill(rank_processes(victim.address)[0], signal.SIGKILL))

    result = replicas.sample(job, on_step=kill)
    assert hurt and (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    assert any("was killed by SIGKILL" in note for note in result.report.notes)


def test_what_a_lost_replica_leaves_is_done_by_the_others_and_said(
    replicas, batch_of_three, make_job, local, monkeypatch, configure
):
    job = batch_of_three(steps=25)  # on a busy machine this process hears of the fourth step some steps later
    replicas.sample(batch_of_three(steps=1))
    victim, survivor = replicas.replicas
    taken = counted(survivor, monkeypatch)
    configure(preflight, python="/bin/false")  # no group comes back
    hurt = []

    def kill(step: int, total: int) -> None:
        if step >= 4 and not hurt:
            hurt.append(step)
            os.kill(rank_processes(victim.address)[0], signal.SIGKILL)

    result = replicas.sample(job, on_step=kill)
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    assert note.startswith("replica 1 of 2 (cpu:1) was lost, and the others do its work: ") and "\n" not in note
    assert len(taken) >= 2
    long = make_job("5b", windows=Windows(17, 8), **LONG)  # nor do they come back for its windows
    found = replicas.sample(long)
    assert (found.tensor - local.sample(long).tensor).abs().max() <= TOLERANCE
    alone = replicas.sample(replace(job, latent=job.latent[:1]))  # the one that is there comes first now
    assert not alone.report.notes

    os.kill(rank_processes(survivor.address)[0], signal.SIGKILL)
    with pytest.raises(GroupUnavailable, match="did not start"):
        replicas.sample(job)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("replica ")]


def test_gpus_and_cores_are_shared_out_in_order(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices_module, "usable_cores", lambda: 8)
    first, second = Devices("cuda", (0, 1, 3, 2)).shared_out(2)
    assert (str(first), str(second)) == ("0,1", "3,2")
    assert second.environment() == {"CUDA_VISIBLE_DEVICES": "3,2", "OMP_NUM_THREADS": "2", "XDIT_RANKS": "0,1"}
    (cpu, other) = Devices("cpu", (0, 1)).shared_out(2)
    assert str(cpu) == str(other) == "cpu:1" and cpu.environment()["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    "named, seen, ranks", [("0,0,1,1", "0,1", [0, 0, 1, 1]), ("2,0,2", "2,0", [0, 1, 0]), ("1,3", "1,3", [0, 1])]
)
def test_each_rank_has_the_gpu_that_is_named_for_it(named, seen, ranks, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment = Devices.parse(named).environment()
    assert environment["CUDA_VISIBLE_DEVICES"] == seen
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [visible_index(rank) for rank in range(len(ranks))] == ranks


def test_a_gpu_holds_several_ranks_only_where_nccl_is_told_to_allow_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match="devices '1,1' name a GPU twice"):
        Devices.parse("1,1")
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    devices = Devices.parse("1,1")
    assert devices.count == 2 and devices.environment()["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_single_group_has_no_replicas():
    with pytest.raises(RequestError, match="each replica is a separate group; one group takes plan 'cfg2'"):
        GroupExecutor(Plan.parse("replicas2-cfg2"), Devices("cpu", (0, 1, 2, 3)))


class Clock:
    """Time that tests move."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "busy_for, left, begins",
    [
        (0.0, 3, True),  # the fast one would need 1 + 3 s, the slow one 3
        (0.0, 1, False),  # 2 s
        (0.9, 2, False),  # 0.1 + 2 s
        (5.0, 1, True),  # the fast one is no longer fast
    ],
)
def test_a_slow_worker_leaves_what_faster_ones_will_have_done_before_it(busy_for, left, begins, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(paces, "time", clock)
    found = Paces()
    assert found.should_begin("slow", ["fast"], left=1)  # nobody knows yet
    for worker, seconds in (("fast", 1.0), ("slow", 3.0)):
        found.begin(worker)
        clock.now += seconds
        found.end(worker, overhead=0.0)
    found.begin("fast")
    clock.now += busy_for
    assert found.should_begin("slow", ["fast"], left=left) == begins
    assert found.should_begin("slow", [], left=left)


@pytest.mark.parametrize("error", [GroupUnavailable("no group starts here"), RequestError("no group starts here")])
def test_a_replica_that_cannot_answer_is_failed_and_the_others_are_asked_and_freed(error, monkeypatch):
    freed = []

    def fails() -> dict:
        raise error

    replicas = ReplicasExecutor(Plan.parse("replicas2"), Devices("cpu", (0, 1)))
    first, second = replicas.replicas
    monkeypatch.setattr(first, "status", fails)
    monkeypatch.setattr(second, "status", lambda: {"state": "ready"})
    monkeypatch.setattr(first, "free", fails)
    monkeypatch.setattr(second, "free", lambda: freed.append(second))
    with pytest.raises(type(error), match="no group starts here"):
        replicas.free()
    assert freed == [second]
    shown = replicas.status()
    assert [one["state"] for one in shown["replicas"]] == ["failed", "ready"] and shown["state"] == "ready"
    assert shown["replicas"][0]["last_error"] == "no group starts here"
    monkeypatch.setattr(second, "status", fails)
    assert replicas.status()["state"] == "failed"
