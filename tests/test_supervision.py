"""A group that is killed or hangs: noticed, named, started again, and the video is the one of an undisturbed run."""

import itertools
import os
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from parallel_backend.cogvideox.pipeline import sampling
from parallel_backend.cogvideox.vae import codec
from parallel_backend.config import CONFIG
from parallel_backend.devices import Devices
from parallel_backend.errors import GroupError, OutOfMemory
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.group import job_loop, worker
from parallel_backend.group.codec import Message
from parallel_backend.group.hang_detector import HangDetector
from parallel_backend.group.heartbeat import Board, Heartbeat, HeartbeatWriter
from parallel_backend.group.job_fields import split_fields
from parallel_backend.group.registry import GroupAddress, Home
from parallel_backend.group.supervisor import Supervisor
from parallel_backend.jobs import DecodeJob, Progress
from parallel_backend.parallel import group_rank
from parallel_backend.parallel.rank import RankContext
from parallel_backend.plan import Plan
from parallel_backend.planner.machine import Link

from .conftest import TOLERANCE, is_alive, rank_processes, wait_until, workers


@pytest.fixture(scope="module")
def group():
    """A group of two that every test disturbs."""
    executor = GroupExecutor(Plan.parse("cfg2"), Devices("cpu", (0, 1)))
    yield executor
    executor.close()


@pytest.mark.parametrize(
    "how, rank, scheduler, word",
    [
        (signal.SIGKILL, 1, "dpm", "rank 1 was killed by SIGKILL"),
        (signal.SIGSTOP, 0, "ddim", "rank 0 was stopped (SIGSTOP) while"),
    ],
)
@pytest.mark.slow
def test_a_lost_job_goes_on_from_its_last_kept_step(how, rank, scheduler, word, group, make_job, local, caplog):
    job = make_job("5b", scheduler=scheduler, steps=12)
    expected = local.sample(job).tensor
    steps, hurt = [], []

    def hurt_once(step: int, total: int) -> None:
        steps.append(step)
        if step == 8 and not hurt:
            hurt.append(step)
            hurt_rank(group, rank, how)

    result = group.sample(job, on_step=hurt_once)
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    assert any(before + 1 >= after > 6 for before, after in zip(steps, steps[1:])) and len(result.report.step_seconds) < 6
    (note,) = result.report.notes
    assert word in note and "started again and went on after step" in note
    assert "starting the group again" in caplog.text


def hurt_rank(group: GroupExecutor, rank: int, how: int) -> None:
    """Sends a signal. A rank that is killed takes the other along before the launcher has seen either, as may happen."""
    ranks, launcher = rank_processes(group.address), group._launcher.process.pid
    if how == signal.SIGKILL:
        os.kill(launcher, signal.SIGSTOP)
    os.kill(ranks[rank], how)
    if how == signal.SIGKILL:
        wait_until(lambda: not is_alive(ranks[1 - rank]))
        os.kill(launcher, signal.SIGCONT)


@pytest.mark.slow
def test_a_killed_launcher_takes_its_workers_along_even_a_stopped_one(group, make_job):
    group.sample(make_job("5b", steps=2))
    ranks = rank_processes(group.address)
    os.kill(ranks[0], signal.SIGSTOP)
    group._launcher.process.kill()
    assert wait_until(lambda: not any(map(is_alive, ranks.values())))
    assert len(group.sample(make_job("5b", steps=2)).report.step_seconds) == 2


def test_a_group_burns_nothing_while_it_waits(group, make_job):
    group.sample(make_job("5b", steps=2))
    processes = [psutil.Process(pid) for pid in workers()]

    def burnt(seconds: float) -> float:
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        time.sleep(seconds)
        return sum(sum(process.cpu_times()[:2]) for process in processes) - before

    # One that spins does so all the time; on a machine with other work the first seconds may have some of the job's end in them.
    assert any(burnt(4) < 0.8 for _ in range(3))  # of 4 s times the cores


def test_an_idle_group_ends_and_the_next_job_starts_it_again(start_group, make_job, monkeypatch, caplog):
    monkeypatch.setenv("XDIT_IDLE_MINUTES", "0.02")
    group = start_group("cfg2")
    first = group.sample(make_job("5b", steps=2)).tensor
    ranks = rank_processes(group.address)
    assert wait_until(lambda: not any(map(is_alive, ranks.values())))
    assert group.status()["state"] == "absent"
    result = group.sample(make_job("5b", steps=2))
    assert torch.equal(result.tensor, first) and result.report.notes == ()
    assert "was lost" not in caplog.text


@pytest.mark.slow
def test_a_job_that_loses_the_group_twice_in_one_place_is_not_tried_again(group, make_job, monkeypatch):
    monkeypatch.setenv("XDIT_KEEP_SECONDS", "1000")  # nothing new is kept between the two
    group.close()
    deaths = []

    def kill(step: int, total: int) -> None:
        if step == 1:
            deaths.append(step)
            os.kill(rank_processes(group.address)[1], signal.SIGKILL)

    with pytest.raises(
        GroupError, match="rank 1 was killed by SIGKILL; twice before a step was kept, so the job is not tried again"
    ) as error:
        group.sample(make_job("5b", steps=900), on_step=kill)  # many: the last step must not be done before
    assert deaths == [1, 1] and "--- rank" in error.value.details


def look_often(heartbeats: list[Heartbeat], *, looks: int):
    """What a watch finds that looks at ranks with these heartbeats, which never change."""
    board, alive = Board.create(len(heartbeats)), psutil.Process()
    for place, heartbeat in enumerate(heartbeats):
        board.beat(place, heartbeat)
    detector = HangDetector(board, first_rank=2)
    found = (detector.look({place: alive for place in range(len(heartbeats))}) for _ in range(looks))
    return next(filter(None, found), None)


@pytest.mark.parametrize(
    "heartbeats, looks, culprits",
    [
        ([Heartbeat(3, "on step 2 of 9", 8), Heartbeat(3, "on step 2 of 9", 8)], 9, None),
        ([Heartbeat(3, "on step 2 of 9", 8), Heartbeat(3, "on step 2 of 9", 8)], 10, "ranks 2, 3"),
        ([Heartbeat(3, "on step 2 of 9", 8), Heartbeat(2, "on step 1 of 9", 8)], 10, "rank 3"),
        ([Heartbeat(1, "waiting for a job", None)] * 2, 1000, None),
    ],
)
def test_ranks_that_hang_are_given_up_after_their_own_time_and_the_one_behind_is_named(heartbeats, looks, culprits):
    found = look_often(heartbeats, looks=looks)
    if culprits is None:
        assert found is None
    else:
        doing = heartbeats[found.places[0]].doing
        assert found.cause.cause == f"{culprits} hung: no sign of life for 8 s while {doing}"


def test_a_heartbeat_is_read_whole_while_another_process_writes_it():
    board = Board.create(1)
    parent, child = os.getpid(), os.fork()
    if child == 0:
        for count in itertools.count(1):  # until it is killed: however rarely the reader runs, it finds a writer at work
            board.beat(0, Heartbeat(count, "x" * (count % 700), float(count)))
            if os.getppid() != parent:
                os._exit(1)
    counts, end = [0], time.monotonic() + 120
    try:
        while len(counts) < 100 and time.monotonic() < end:
            found = board.heartbeat(0)
            if found and found.count != counts[-1]:
                assert (found.doing, found.seconds) == ("x" * (found.count % 700), float(found.count))
                counts.append(found.count)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(counts) == 100 and counts == sorted(counts)


def test_what_goes_on_within_a_heartbeat_is_reported_without_another_count():
    board = Board.create(1)
    writer = HeartbeatWriter(board, 0)
    writer.beat("loading", 8.0)
    writer.say("reading weights: 43%")
    assert board.heartbeat(0) == Heartbeat(1, "reading weights: 43%", 8.0)
    with closing(Board.open(board.path, 1)) as opened:
        assert opened.heartbeat(0) == board.heartbeat(0)


def test_a_user_who_waits_for_the_first_step_sees_what_goes_on(make_job):
    executor, said, shown = LocalExecutor(torch.device("cpu")), [], []
    executor.engine.on_stage = said.append
    executor.sample(make_job("2b", steps=1), on_step=lambda step, steps: shown.append(executor.stage()))
    assert said == [*reading(said), "first step"] and shown == ["first step"]
    executor.sample(make_job("2b", steps=1))
    assert said[len(reading(said)) :] == ["first step"] * 2  # nothing is read again


def reading(stages: list[str]) -> list[str]:
    """Returns those stages in which weights were read. They must be some, from less to more, and end with all of them."""
    found = [stage for stage in stages if stage.startswith("reading weights: ")]
    shares = [int(stage.removeprefix("reading weights: ").removesuffix("%")) for stage in found]
    assert shares == sorted(set(shares)) and len(shares) > 2 and shares[-1] == 100
    return found


def test_a_rank_says_what_it_does_before_the_first_step(make_job, monkeypatch):
    said = []
    board = SimpleNamespace(beat=lambda place, heartbeat: said.append(heartbeat.doing))
    context = RankContext(torch.device("cpu"))
    context.rank, context.notes = 1, ()  # rank 0 would also listen
    loop = job_loop.JobLoop(context, None, HeartbeatWriter(board, 1), Link(1e9, 1e-5))
    loop.run(Message("sample", *split_fields(make_job("2b", steps=1))), None)
    loading = "loading, and on the first step or the whole of a sample job"
    assert said == [loading, *reading(said), "first step", "ending a job"]


def test_a_rank_says_that_it_joins_the_group_and_then_that_it_exchanges_data(monkeypatch):
    class BrokenLink(Exception):
        """Ends the rank before its first job."""

    class Joined:
        def __init__(self, plan, *, device, rank):
            said.append(f"rank {rank} of {plan} joined")

        def probe(self):
            raise BrokenLink

    said, heart = [], SimpleNamespace(beat=lambda doing, seconds: said.append(doing))
    monkeypatch.setattr(group_rank, "GroupRankContext", Joined)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "OMP_NUM_THREADS": torch.get_num_threads()}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(BrokenLink):
        worker.join(None, "cfg2", "cpu", heart)
    *before, exchanging = said
    assert before == ["joining the group", "rank 1 of cfg2 joined"] and exchanging.startswith("exchanging data")


def test_the_stage_of_a_group_is_what_rank_0_said_last(start_group, make_job):
    group = start_group("cfg2")
    assert group.stage() is None
    home = Home.open()
    group.address = GroupAddress.create(home.root, {"processes": 2})
    assert group.stage() == "starting 2 processes"
    board = Board.create(2)
    group.address.add(board=board.path)
    assert group.stage() is None
    first, second = HeartbeatWriter(board, 0), HeartbeatWriter(board, 1)
    first.beat("joining the group", 8.0)
    second.beat("exchanging data", 8.0)
    assert group.stage() == "joining the group"
    first.say("reading weights: 43%")
    assert group.stage() == "reading weights: 43%"
    group.address.remove()
    assert group.stage() is None
    home.lock.close()
    group.sample(make_job("2b", steps=1))
    assert wait_until(lambda: group.stage() == "waiting for a job")


def test_a_python_without_memfd_create_has_heartbeats_too(monkeypatch):
    monkeypatch.delattr("os.memfd_create")
    board = Board.create(2)
    Board.open(board.path, 2).beat(1, Heartbeat(1, "here", None))
    assert board.heartbeat(1) == Heartbeat(1, "here", None) and board.heartbeat(0) is None


def test_the_failure_report_of_a_rank_is_cut_to_what_there_is_room_for():
    board = Board.create(2)
    board.report_failure(1, {"error": "E", "message": "é" * 100_000, "traceback": "\x00" * 100_000 + "the end", "waited": 1.5})
    report = board.failure_report(1)
    assert report["traceback"].endswith("the end") and report["message"].startswith("éé") and report["waited"] == 1.5
    assert board.failure_report(0) is None and board.heartbeat(1) is None


@pytest.mark.parametrize(
    "waited, ends, named",
    [
        ({1: 0.0, 0: 0.0}, {1: 1, 0: 1}, 1),  # while they start: rank 1 failed, and then rank 0, whose connection broke
        ({1: 0.0, 0: 0.0}, {0: 1, 1: 1}, 1),
        ({0: 0.0, 1: 15.0}, {0: 1, 1: 1}, 1),  # in a job: rank 1 had failed first, and waited for rank 0
        ({1: 0.0}, {1: 1, 0: -signal.SIGKILL}, 0),
        ({}, {1: 1, 0: 1}, 1),
    ],
)
def test_of_several_ranks_the_one_that_failed_first_is_named_with_its_own_error(waited, ends, named):
    supervisor = Supervisor.__new__(Supervisor)
    supervisor.hang, supervisor.first_rank, supervisor.count, supervisor.board = None, 0, 2, Board.create(2)
    for rank, seconds in waited.items():
        error = {"error": "E", "message": f"of rank {rank}", "traceback": "", "host": None, "waited": seconds}
        HeartbeatWriter(supervisor.board, rank).report_failure(error)
    cause = supervisor.exit_cause(ends)
    assert cause.cause.startswith(f"rank {named} ") and cause.by_itself == (ends[named] == 1)
    if cause.by_itself and waited:
        assert (cause.failure["rank"], cause.failure["message"]) == (named, f"of rank {named}")


class SlowEngine:
    """Takes so many seconds for each step, by a clock of its own."""

    together = True

    def __init__(self, seconds: list[float]):
        self.seconds, self.now = seconds, 0.0

    def run(self, job, after_step, *_) -> None:
        for step, seconds in enumerate(self.seconds, 1):
            self.now += seconds
            after_step(Progress(step, torch.empty(0), torch.empty(0)), len(self.seconds))


@pytest.mark.parametrize(
    "seconds, allowed",
    [
        ([20, 15, 15, 15], [100, 75, 75, 75]),  # steps of a large video on a slow GPU: no hang
        ([300, 0.5, 0.6, 0.5], [1500, 8, 8, 8]),  # the first has loading in it
        ([3, 0.1, 4, 0.1], [15, 8, 20, 20]),  # a step cache spares some
    ],
)
def test_a_step_may_take_five_times_as_long_as_those_before_it(seconds, allowed, make_job, monkeypatch):
    engine, given = SlowEngine(seconds), []
    monkeypatch.setattr(job_loop, "time", SimpleNamespace(monotonic=lambda: engine.now))
    rank = job_loop.JobLoop.__new__(job_loop.JobLoop)
    rank.engine, rank.context = engine, SimpleNamespace(device=torch.device("cpu"))
    rank.heart = SimpleNamespace(beat=lambda doing, limit: given.append(limit), say=lambda doing: None)
    job = make_job("5b", steps=len(seconds))
    rank.run(Message("sample", *split_fields(job)), None)
    assert given[1:] == pytest.approx(allowed)


@pytest.mark.parametrize(
    "kind, rank, together, limit",
    [
        ("decode", 0, False, CONFIG.exchange_seconds),
        ("decode", 1, False, None),  # rank 0 alone may take half an hour for tiles, and is watched itself
        ("decode", 1, True, CONFIG.exchange_seconds),
        ("load", 1, True, CONFIG.load_seconds),  # the other's disk may be slower
    ],
)
def test_a_rank_that_waits_for_another_s_work_is_not_taken_for_hung(kind, rank, together, limit):
    given, ended = [], SimpleNamespace(together=together, status=lambda: {"memory": 0})
    one = job_loop.JobLoop.__new__(job_loop.JobLoop)
    one.engine, one.jobs = ended, 0
    one.context = SimpleNamespace(rank=rank, collect=lambda value: [value])
    one.heart = SimpleNamespace(beat=lambda doing, limit: given.append(limit), say=lambda doing: None)
    one.run = lambda *_: None
    one.do_job(Message(kind), None)
    assert given == [limit]


class TooSmall:
    """A VAE on a device that holds a whole frame, or a large tile, only so often."""

    def __init__(self, module, fits):
        self.module, self.fits, self.tried = module, fits, []

    def __call__(self, *_):
        tile = self.module.tile_sample_min_height if self.module.use_tiling else None
        self.tried.append(tile)
        if tile not in self.fits:
            raise torch.OutOfMemoryError("no")
        return torch.zeros(1)


@pytest.mark.parametrize(
    "tiling, fits, tried",
    [("auto", [None], [None]), ("auto", [256], [None, 256]), ("auto", [64], [None, 256, 128, 64]), ("on", [128], [256, 128])],
)
def test_a_decode_that_runs_out_of_memory_goes_on_in_smaller_tiles_and_says_so(
    tiling, fits, tried, make_job, monkeypatch, checkpoints
):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    latent = executor.sample(job).tensor
    attempts = []

    def decode(module, *_, **__):
        attempts.append(TooSmall(module, fits))
        return attempts[-1]()

    monkeypatch.setattr(codec, "decode", decode)
    result = executor.decode(DecodeJob(job.model, latent, tiling=tiling))
    assert [attempt.tried[0] for attempt in attempts] == tried
    assert len([note for note in result.report.notes if "ran out of memory" in note]) == len(tried) - 1
    monkeypatch.undo()
    assert torch.equal(executor.sample(job).tensor, latent)


@pytest.mark.parametrize(
    "tiling, words", [("off", "out of memory whole: .* use tiling"), ("auto", "out of memory in tiles of 64: ")]
)
def test_a_decode_that_fits_in_no_way_says_what_helps(tiling, words, make_job, monkeypatch):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    monkeypatch.setattr(codec, "decode", lambda module, *_, **__: TooSmall(module, [])())
    with pytest.raises(OutOfMemory, match=words):
        executor.decode(DecodeJob(job.model, job.latent, tiling=tiling))


def test_a_step_that_runs_out_of_memory_says_what_helps_and_the_next_job_works(make_job, monkeypatch):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=2)
    expected = executor.sample(job).tensor

    def advance(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sampling, "advance", advance)
    with pytest.raises(OutOfMemory, match="step 1 ran out of memory on cpu: it needs about .* use offload 'group' .now 'none'"):
        executor.sample(job)
    monkeypatch.undo()
    assert torch.equal(executor.sample(job).tensor, expected)


def test_a_step_that_is_not_finite_stops_the_job_with_its_number(make_job):
    executor, job = LocalExecutor(torch.device("cpu")), make_job("5b", steps=3)
    with pytest.raises(FloatingPointError, match="step 1 of 3 is not finite in torch.float32"):
        executor.sample(replace(job, positive=job.positive * float("nan")))
    assert executor.sample(job).tensor.isfinite().all()


@pytest.mark.slow
def test_what_serve_keeps_is_started_again_and_its_clients_go_on(start_group, make_job, local):
    kept = start_group("cfg2")
    kept.share()
    assert kept.status()["state"] == "ready"
    keeper = threading.Thread(target=lambda: (kept.wait(), kept.start()), daemon=True)  # as the command does
    keeper.start()
    job = make_job("5b", steps=12)
    hurt = []

    def hurt_once(step: int, total: int) -> None:
        if step == 8 and not hurt:
            hurt.append(step)
            os.kill(rank_processes(attached.address)[0], signal.SIGKILL)

    attached = GroupExecutor.attach(kept.address)
    result = attached.sample(job, on_step=hurt_once)
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    assert hurt and attached.address == kept.address
    assert len(result.report.step_seconds) < 6  # it went on from a kept step
