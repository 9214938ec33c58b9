"""The group: started once, warm between jobs, stopped within a step, and gone with its owner."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from multiprocessing.connection import Client, Pipe
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load, save_file

from parallel_backend.cli import serve
from parallel_backend.devices import Devices
from parallel_backend.errors import Cancelled, GroupLost, GroupUnavailable, RequestError
from parallel_backend.executor import recovery
from parallel_backend.executor.factory import ExecutorCache
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.overview import overview, share_of_rank
from parallel_backend.group import codec, fork_server_client, ownership, preflight, protocol, registry
from parallel_backend.group.codec import Message
from parallel_backend.group.fork_server import HELLO, ForkServer
from parallel_backend.group.launcher import Launcher
from parallel_backend.group.ownership import OwnerWatch, is_held
from parallel_backend.group.part import Part
from parallel_backend.group.registry import GroupAddress, Home, remove_stale, running, shared
from parallel_backend.jobs import DecodeJob, SampleJob
from parallel_backend.model import Model, Windows
from parallel_backend.parallel.group_rank import slow_link
from parallel_backend.plan import Plan
from parallel_backend.workload import Workload

from .conftest import PATIENCE, REPO, TOLERANCE, is_alive, rank_processes, wait_until
from .test_cancel import KINDS as VAE_KINDS
from .test_cancel import vae_job


@pytest.fixture(scope="module")
def group(request):
    """A group of two, kept for the whole file."""
    executor = GroupExecutor(Plan.parse("ulysses2"), Devices("cpu", (0, 1)))
    yield executor
    executor.close()


def test_a_second_job_loads_nothing(group, make_job):
    group.sample(make_job("5b", seed=1))
    loads = group.status()["loads"]
    result = group.sample(make_job("5b", seed=2, size=(80, 48, 9), scheduler="ddim", steps=9))
    assert group.status()["loads"] == loads
    assert result.report.load_seconds < 0.5  # opening the folder, no weights
    group.sample(make_job("2b"))
    assert group.status()["loads"] == loads + 1


@pytest.mark.parametrize(
    "plan, kind, speed, words",
    [
        ("ulysses2", "cuda", 3e8, ("only 0.3 GB/s", "ulysses2 waits", "cfg2 alone exchanges least", "NCCL_P2P_DISABLE=1")),
        ("cfg2-ring2", "cuda", 1.9e9, ("only 1.9 GB/s", "cfg2-ring2 waits")),
        ("cfg2", "cuda", 1e8, ("only 0.1 GB/s", "NCCL_P2P_DISABLE=1")),
        ("ulysses2", "cuda", 2e10, None),
        ("cfg2", "cuda", 1e9, None),
        ("ulysses2", "cpu", 1e8, None),
    ],
)
def test_a_slow_link_is_named_where_it_will_hold_the_plan_up(plan, kind, speed, words):
    said = slow_link(Plan.parse(plan), kind, speed)
    assert said is None if words is None else all(word in said for word in words) and "\n" not in said


def test_status_says_what_the_group_is_and_does(group, make_job):
    group.sample(make_job("5b"))
    status = group.status()
    assert (status["state"], status["plan"], status["world_size"], status["devices"]) == ("ready", "ulysses2", 2, "cpu:2")
    assert status["model"] == make_job("5b").model.path
    assert len(status["memory"]) == 2 and min(status["memory"]) > 0
    assert status["link"] > 0
    assert status["jobs"] >= 1 and status["uptime"] > 0 and status["queue"] == 0


def test_the_fork_server_imports_nothing_that_sampling_does_not_need(group):
    """Seen in the compiled files that it has mapped. ComfyUI's environment may have all of these packages."""
    group.start()
    assert wait_until(lambda: group.status()["state"] == "ready")
    server = fork_server_client.ForkServerProcess.get("cpu").process
    mapped = {part for one in psutil.Process(server.pid).memory_maps() for part in Path(one.path).parts}
    assert {"torch", "safetensors"} <= mapped
    assert not {"tokenizers", "pandas", "sklearn", "scipy", "torchvision", "sentencepiece"} & mapped


def test_free_ends_the_processes_and_the_next_job_starts_them_again(group, make_job):
    before = group.sample(make_job("5b")).tensor
    ranks = rank_processes(group.address)
    group.free()
    assert group.status()["state"] == "absent" and not any(map(is_alive, ranks.values()))
    result = group.sample(make_job("5b"))
    assert torch.equal(result.tensor, before) and result.report.notes == ()
    assert group.status()["loads"] == 1


def test_steps_are_reported_as_they_are_done(group, make_job):
    seen = []
    group.sample(make_job("5b", steps=9), on_step=lambda step, steps: seen.append((step, steps)))
    assert seen == [(step, 9) for step in range(1, 10)]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_cancelled_job_stops_within_a_step_and_the_group_stays_warm(stop_after, group, make_job):
    expected = group.sample(make_job("5b")).tensor
    loads, seen = group.status()["loads"], []
    slow = make_job("5b", size=(480, 320, 17), steps=200)  # a step takes long enough to be stopped in
    with pytest.raises(Cancelled):
        group.sample(slow, on_step=lambda step, _: seen.append(step), should_stop=lambda: len(seen) >= stop_after)
    assert seen[-1] <= stop_after + 1
    assert torch.equal(group.sample(make_job("5b")).tensor, expected)
    assert group.status()["loads"] == loads


def test_a_long_step_is_stopped_between_its_windows_on_all_ranks(group, make_job):
    group.sample(make_job("5b", steps=1))
    seen = []
    slow = make_job("5b", size=(720, 480, 121), steps=200, windows=Windows(5, 0))  # sixteen windows a step
    with pytest.raises(Cancelled, match="stopped after step 0 of 200"):
        group.sample(slow, on_step=lambda step, _: seen.append(step), should_stop=lambda: group.status()["state"] == "busy")
    assert seen == []
    assert len(group.sample(make_job("5b")).report.step_seconds) == 8


@pytest.mark.parametrize("kind", VAE_KINDS)
def test_a_group_stops_the_vae_on_all_ranks_and_stays_warm(kind, group, local, checkpoints):
    """In strips all ranks work, in tiles rank 0 alone."""
    small, large = vae_job(kind, checkpoints), vae_job(kind, checkpoints, rows=40, columns=60, frames=17)
    expected = group.run(small).tensor
    address, loads = group.address, group.status()["loads"]
    with pytest.raises(Cancelled, match="while the VAE was at work"):
        group.run(large, should_stop=lambda: group.status()["state"] == "busy")
    assert torch.equal(group.run(small).tensor, expected)
    assert (expected - local.run(small).tensor).abs().max() <= TOLERANCE
    assert group.address == address and group.status()["loads"] == loads


def test_a_group_whose_job_is_cancelled_while_weights_are_read_runs_the_next(group, make_job, local):
    group.free()
    job, asked = make_job("5b", steps=200), count()
    with pytest.raises(Cancelled):
        group.sample(job, should_stop=lambda: next(asked) > 0)
    job = make_job("5b", steps=2)
    assert (group.sample(job).tensor - local.sample(job).tensor).abs().max() <= TOLERANCE


def test_a_client_that_goes_away_cancels_its_job_only(group, make_job):
    class GoneAway(Exception):
        pass

    def leave(step, steps):
        raise GoneAway

    with pytest.raises(GoneAway):
        group.sample(make_job("5b", size=(480, 320, 17), steps=500), on_step=leave)
    assert len(group.sample(make_job("5b")).report.step_seconds) == 8
    assert wait_until(lambda: group.status()["state"] == "ready")


def test_clients_are_served_in_order_each_with_its_own_steps(group, make_job):
    seen, results = {}, {}

    def client(name: str, steps: int) -> None:
        seen[name] = []
        results[name] = group.sample(make_job("5b", steps=steps), on_step=lambda step, total: seen[name].append(total)).tensor

    threads = [threading.Thread(target=client, args=(f"client {steps}", steps)) for steps in (6, 7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert seen == {f"client {steps}": [steps] * steps for steps in (6, 7, 8)}
    assert len(results) == 3


def test_the_group_decodes_as_this_process_does(group, make_job, local):
    latent = torch.randn(2, 16, 5, 4, 6, generator=torch.Generator().manual_seed(2))
    job, parts = DecodeJob(make_job("5b").model, latent), []
    videos = group.decode(job, on_frames=lambda *part: parts.append(part)).tensor
    assert (videos - local.decode(job).tensor).abs().max() <= TOLERANCE
    assert [(video, start) for video, start, _ in parts] == [(0, 0), (0, 9), (1, 0), (1, 9)]  # as they are decoded
    assert all(part.data_ptr() == videos[video, start].data_ptr() for video, start, part in parts)


def test_a_request_that_makes_no_sense_never_reaches_the_group(group, make_job, tmp_path):
    jobs = group.status().get("jobs")  # none if it has not been started yet
    with pytest.raises(RequestError, match="no checkpoint folder"):
        group.sample(make_job("5b", model=Model(str(tmp_path / "none"))))
    group.plan, plan = type(group.plan)(ulysses=3), group.plan
    try:
        with pytest.raises(RequestError, match="does not divide"):
            group.sample(make_job("5b"))
    finally:
        group.plan = plan
    assert group.status().get("jobs") == jobs


def test_a_failure_in_the_group_names_the_rank_and_the_group_goes_on(group, make_job, checkpoints, tmp_path, monkeypatch):
    job = make_job("5b", model=Model(str(tmp_path / "gone")))
    monkeypatch.setattr(group, "check", lambda job: None)  # a checkpoint that vanished after it was looked at
    with pytest.raises(RequestError, match="no checkpoint folder"):
        group.sample(job)
    monkeypatch.undo()
    assert len(group.sample(make_job("5b")).report.step_seconds) == 8


def test_a_checkpoint_that_changes_on_disk_between_jobs_is_read_anew(group, local, make_job, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["5b"], tmp_path / "5b")
    job = make_job("5b", model=Model(str(folder)))
    before = group.sample(job).tensor
    weights = next((folder / "transformer").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])  # a download that has not ended yet
    with pytest.raises(RequestError, match="safetensors"):
        group.sample(job)
    save_file({name: value * 1.1 for name, value in load(whole).items()}, weights)
    after = group.sample(job).tensor
    assert (after - before).abs().max() > 100 * TOLERANCE
    assert (after - local.sample(job).tensor).abs().max() <= TOLERANCE


def test_the_folder_is_private_and_a_wrong_key_is_refused(group):
    folder = group.address.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(group.address.key_file.stat().st_mode) == 0o600
    with pytest.raises(Exception, match="digest"):
        Client(group.address.socket, family="AF_UNIX", authkey=b"wrong")
    assert group.status()["state"] == "ready"


def claiming(*, kind: str = "decode", dtype: str = "F32", shape: tuple[int, ...] = (1, 16, 2, 4, 6), size: int = 3072) -> bytes:
    """The first part of a message, with one tensor that never comes."""
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    message = json.dumps({"version": codec.VERSION, "kind": kind, "plain": {}})
    header = json.dumps({"__metadata__": {"message": message}, "latent": tensor}).encode()
    return len(header).to_bytes(8, "little") + header


RUBBISH = {
    "nothing": b"",
    "a letter": b"x",
    "no length": b"\xff" * 64,
    "no object": b"\x03" + bytes(7) + b"[1]",
    "no request": codec.encode(Message("dance")),
    "a long first part": bytes(codec.MAX_HEADER + 9),
    "more than a kind holds": claiming(shape=(2**28 + 1,), size=2**30 + 4),
    "tensors where none belong": claiming(kind="status"),
    "another dtype": claiming(dtype="F64", size=6144),
    "a shape that does not fit": claiming(shape=(2**40,)),
    "many dimensions": claiming(shape=(1,) * 6 + (768,)),
    "a negative size": claiming(shape=(-1, -768)),
    "more than a header": claiming() + bytes(3072),
}


@pytest.mark.parametrize("data", RUBBISH.values(), ids=RUBBISH)
def test_rubbish_is_dropped_and_nobody_notices(data, group, make_job):
    group.start()
    assert wait_until(lambda: group.status()["state"] == "ready")
    with Client(group.address.socket, family="AF_UNIX", authkey=group.address.key) as connection:
        # Of a part that is too long the group reads nothing and hangs up.
        with suppress(ConnectionError) if len(data) > codec.MAX_HEADER else nullcontext():
            connection.send_bytes(data)
            assert connection.poll(30)
            assert protocol.receive(connection).plain["error"] == "ProtocolError"
    assert len(group.sample(make_job("5b")).report.step_seconds) == 8


def test_a_message_of_another_version_says_so(monkeypatch):
    monkeypatch.setattr(codec, "VERSION", 1)
    data = codec.encode(Message("status"))
    monkeypatch.undo()
    with pytest.raises(codec.ProtocolError, match=f"version 1 of the protocol and this side {codec.VERSION}"):
        codec.decode(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_message_survives_the_wire(dtype, monkeypatch):
    monkeypatch.setattr(protocol, "PART", 16)
    tensor, empty = torch.arange(12).to(dtype).reshape(3, 4), torch.empty(0, 3, dtype=dtype)
    tensors = {"a": tensor, "view": tensor.T, "one": tensor[0, 1], "none": empty, "same": tensor}
    sent, (here, there) = Message("done", {"x": [1, "é", None]}, tensors), Pipe()
    for read in (protocol.receive, lambda connection: codec.decode(protocol.receive_bytes(connection))):
        protocol.send(there, sent)
        found = read(here)
        assert (found.kind, found.plain) == ("done", {"x": [1, "é", None]})
        assert set(found.tensors) == set(tensors)
        for name, expected in tensors.items():
            assert torch.equal(found.tensors[name], expected) and found.tensors[name].dtype == dtype


@pytest.mark.parametrize("size", [0, 3071, 3073])
def test_a_part_of_another_size_than_was_said_is_refused(size):
    here, there = Pipe()
    there.send_bytes(claiming())
    there.send_bytes(bytes(size))
    with pytest.raises(codec.ProtocolError, match="bytes"):
        protocol.receive(here)


@pytest.mark.slow
def test_the_group_goes_when_its_owner_is_killed():
    code = (
        "from parallel_backend.executor.group import GroupExecutor\n"
        "from parallel_backend.plan import Plan; from parallel_backend.devices import Devices\n"
        "group = GroupExecutor(Plan(cfg=2), Devices('cpu', (0, 1))); group.start(); group.status()\n"
        "print(group.address.folder, flush=True)\nimport os, time\n"
        "if os.fork() == 0: os.close(1), os.setsid(), time.sleep(60), os._exit(0)\n"  # it inherits every pipe and lock, and stays
        "time.sleep(600)"
    )
    signals = (signal.SIGKILL, signal.SIGTERM)
    owners = [subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in signals]
    try:
        for owner, how in zip(owners, signals):
            folder = owner.stdout.readline().strip()
            started = psutil.Process(owner.pid).children(recursive=True)
            assert {"xdit forkserver", "xdit supervisor", "xdit rank 0", "xdit rank 1"} <= {each.name() for each in started}
            started = [each.pid for each in started if each.name().startswith("xdit")]
            owner.send_signal(how)
            owner.wait(PATIENCE)
            assert wait_until(lambda: not any(map(is_alive, started)))  # noqa: B023
            assert wait_until(lambda: not os.path.exists(folder))  # noqa: B023
    finally:
        for owner in owners:
            owner.kill()


KEEPER = """
import os, sys
from parallel_backend.group.registry import GroupAddress, Home
home = Home.open()
known = {"plan": "cfg2", "devices": "cpu:2", "shared": True, "lock": str(home.lock.path)}
print(GroupAddress.create(home.root, known).folder, flush=True)
if sys.argv[1:] == ["fork"] and os.fork() == 0:  # it inherits every descriptor of its parent's, and stays
    os.close(1)
    os.setsid()
sys.stdin.read()
"""


@contextmanager
def group_of_another_process(*arguments: str):
    """Another process that keeps a group's folder, with no processes, and the folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", KEEPER, *arguments], cwd=REPO, **pipes) as owner:
        try:
            yield owner, Path(owner.stdout.readline().strip())
        finally:
            owner.kill()


def rename_owner(folder: Path, pid: int) -> None:
    """Has a group's folder say that another process keeps it, as after a restart of a container."""
    description = json.loads((folder / "group.json").read_text())
    lock = Path(description["lock"])
    renamed = lock.with_name(f"owner-{pid}-{lock.name[-8:]}")
    lock.rename(renamed)
    (folder / "group.json").write_text(json.dumps({**description, "owner": pid, "lock": str(renamed)}))


@pytest.mark.parametrize("whose", ["nobody's", "another's", "this process's"])
def test_a_dead_owner_s_group_is_dead_whoever_has_its_number_now(whose):
    with group_of_another_process() as (owner, folder):
        assert folder in [address.folder for address in running()]
        owner.kill()
        owner.wait()
        rename_owner(folder, {"nobody's": owner.pid, "another's": os.getppid(), "this process's": os.getpid()}[whose])
        assert folder not in [address.folder for address in running()]
        remove_stale()
        assert not folder.exists()


def test_a_living_owner_s_group_is_left_alone_though_its_number_is_unknown_here():
    with group_of_another_process() as (owner, folder):
        rename_owner(folder, 2**22 + 7)  # another container's number
        remove_stale()
        assert folder in [address.folder for address in running()]


def test_a_forked_child_that_outlives_the_owner_does_not_keep_its_group():
    with group_of_another_process("fork") as (owner, folder):
        assert folder in [address.folder for address in running()]
        owner.kill()
        owner.wait()
        assert not shared("cfg2", "cpu:2")
        remove_stale()
        assert not folder.exists()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder in which a socket's path is short enough; pytest's own has a worker's and a test's name in it."""
    with tempfile.TemporaryDirectory(prefix="x-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("linked", [False, True])
def test_the_lock_of_this_process_outlives_a_look_at_it(linked, short_path, configure):
    if linked:  # as where /tmp or the runtime folder is a link to another disk
        (short_path / "there").mkdir()
        (short_path / "link").symlink_to(short_path / "there")
        configure(registry, runtime_dir=str(short_path / "link"))
    home = Home.open()
    try:
        assert home.is_usable()
        for _ in range(2):  # a second descriptor that is closed would drop the lock
            assert is_held(home.lock.path) and OwnerWatch(home.lock.path).is_alive()
        look = "import sys; from pathlib import Path; from parallel_backend.group.ownership import is_held; print(is_held(Path(sys.argv[1])))"
        said = subprocess.run([sys.executable, "-c", look, str(home.lock.path)], cwd=REPO, capture_output=True, text=True)
        assert said.stdout.strip() == "True"
    finally:
        home.lock.close()
    assert not is_held(home.lock.path)


def test_folders_that_come_and_go_never_disturb_a_look():
    home = Home.open()
    known = {"plan": "cfg2", "devices": "cpu:2", "shared": True, "lock": str(home.lock.path)}
    stop, failed, stays = threading.Event(), [], GroupAddress.create(home.root, known)

    def churn() -> None:
        while not stop.is_set():
            GroupAddress.create(home.root, known).remove()

    def look() -> None:
        try:
            for _ in range(400):
                assert stays in running() and stays in shared("cfg2", "cpu:2")
                remove_stale()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=churn), *(threading.Thread(target=look) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    stays.remove()
    home.lock.close()
    assert not failed


def test_a_folder_that_another_user_has_made_under_this_user_s_name_is_not_looked_into(short_path, monkeypatch, configure):
    configure(registry, runtime_dir=str(short_path))
    home = Home.open()
    try:
        planted = GroupAddress.create(home.root, {"shared": True, "lock": str(home.lock.path)})
        assert planted in running()
        owner = os.getuid() + 1
        monkeypatch.setattr(registry.os, "getuid", lambda: owner)
        assert planted not in running()
        with pytest.raises(OSError, match="belongs to another user"):
            registry.make_root(home.root)
    finally:
        home.lock.close()


def test_a_lock_that_is_left_in_a_closed_folder_is_in_nobody_s_way(short_path, monkeypatch, configure):
    configure(registry, runtime_dir=str(short_path))
    home = Home.open()
    (home.root / "owner-1-left").touch()

    def closed(path, *arguments, **settings) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", closed)
    remove_stale()
    home.lock.close()
    assert not is_held(home.lock.path)


def test_where_no_group_can_start_the_reason_is_one_line(start_group, monkeypatch):
    monkeypatch.setattr(preflight.sys, "platform", "darwin")
    with pytest.raises(GroupUnavailable, match="need Linux \\(this is darwin\\)"):
        start_group("cfg2")
    monkeypatch.undo()
    monkeypatch.setattr(preflight, "has_module", lambda name: False)
    with pytest.raises(GroupUnavailable, match="xfuser is not installed"):
        start_group("cfg2")


BROKEN_PYTHONS = {
    "the fork server ended with status 3": "echo the reason; exit 3",
    "rank [01] ended with status 1": 'export PYTHONPATH="$(dirname "$0"):$PYTHONPATH"; exec "{python}" "$@"',
}


@pytest.mark.parametrize("cause", BROKEN_PYTHONS)
def test_a_group_that_cannot_come_up_is_unavailable_and_says_what_its_processes_said(
    cause, monkeypatch, configure, start_group, make_job, tmp_path
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{BROKEN_PYTHONS[cause].format(python=sys.executable)}\n")
    python.chmod(0o755)
    (tmp_path / "xfuser").mkdir()
    for module in ("__init__", "envs"):
        (tmp_path / "xfuser" / f"{module}.py").write_text("raise ImportError('the reason')")
    configure(preflight, python=str(python))
    before, started, group = running(), time.monotonic(), start_group("cfg2")
    with pytest.raises(GroupUnavailable, match=f"did not start: {cause}") as error:
        group.sample(make_job("5b"))
    assert "the reason" in error.value.details and "\n" not in error.value.summary
    assert group.status()["state"] == "absent" and running() == before
    shown = overview(group)
    assert (shown["state"], shown["last_error"]) == ("failed", error.value.summary)
    again = time.monotonic()
    with pytest.raises(GroupUnavailable, match=f"did not start: {cause}.* s ago; it is tried again once something changes"):
        monkeypatch.setenv("TRITON_CACHE_DIR", "/set by the job that ran in this process instead")
        group.sample(make_job("5b"))
    assert time.monotonic() - again < 5 and again - started < 150
    configure(preflight, python="/nowhere/python")
    with pytest.raises(GroupUnavailable, match="/nowhere/python cannot be started"):
        group.sample(make_job("5b"))


@pytest.fixture
def mute_python(tmp_path, configure):
    """An interpreter that runs and says nothing."""
    configure(preflight, python=python_that("exec sleep 600", tmp_path))


def python_that(does: str, folder: Path) -> str:
    """Makes an interpreter that does something first. Returns its path."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    "does, words",
    [
        ("exit 0", "the fork server ended with status 0: {python} cannot run this pack; correct XDIT_PYTHON"),
        ("exit 3", "the fork server ended with status 3: {python} cannot run this pack; correct XDIT_PYTHON"),
        (
            f'exec {sys.executable} -S "$@"',  # without its packages
            "ModuleNotFoundError: No module named '.*'; install requirements.txt for {python}, or correct XDIT_PYTHON",
        ),
        (f'ulimit -f 0; exec {sys.executable} "$@"', ": OSError: .* File too large.*; free space"),
    ],
    ids=["ends", "fails", "without packages", "full disk"],
)
def test_why_an_interpreter_starts_no_group_is_said_with_what_to_do(does, words, tmp_path, configure, start_group, make_job):
    python = python_that(does, tmp_path)
    configure(preflight, python=python)
    group = start_group("cfg2")
    for again in (False, True):
        with pytest.raises(GroupUnavailable, match=words.format(python=re.escape(python))) as error:
            group.sample(make_job("5b"))
        is_remembered = "s ago; it is tried again once something changes" in error.value.summary
        assert is_remembered == (again and "free space" not in words)


def test_the_home_folder_of_an_interpreter_may_be_short(configure, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    configure(preflight, python="~/venv/bin/python")
    assert preflight.group_python() == "/home/user/venv/bin/python"


def test_an_interpreter_that_does_not_run_the_pack_is_given_up_soon(mute_python, start_group, make_job, configure):
    configure(fork_server_client, hello_seconds=1.0)
    with pytest.raises(GroupUnavailable, match="did not run this pack within .* s; correct XDIT_PYTHON"):
        start_group("cfg2").sample(make_job("5b"))


def test_ranks_that_are_not_there_yet_use_no_memory(mute_python, start_group):
    group = start_group("cfg2")
    group.start()
    assert [rank["memory"]["used"] for rank in overview(group)["ranks"]] == [0, 0]


def test_serve_says_why_a_group_was_given_up_while_it_started(mute_python, start_group, configure, monkeypatch, capsys):
    configure(recovery, removed_seconds=0.1)
    group = start_group("cfg2")

    def start_and_lose_the_folder() -> None:
        GroupExecutor.start(group)
        shutil.rmtree(group.address.folder, ignore_errors=True)

    monkeypatch.setattr(group, "start", start_and_lose_the_folder)
    with pytest.raises(GroupUnavailable, match="did not start: its folder .* was removed; twice, so it is not tried again"):
        serve.come_up(group)
    assert "the group was lost while it started: its folder" in capsys.readouterr().out


def test_a_request_to_a_group_that_another_thread_ends_at_once_is_lost_and_can_be_made_again(mute_python, start_group):
    group = start_group("cfg2")
    lock = group._lock

    class LockOfTwo:
        """After its first release the other thread ends the group."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_) -> None:
            lock.release()
            group._lock = lock
            group.close()

    group._lock = LockOfTwo()
    with pytest.raises(GroupLost, match="the group was lost in another job"):
        next(group.answers(Message("status"), lambda: False))


def test_a_fork_server_whose_owner_has_not_read_its_hello_goes_on_until_its_groups_end():
    server = ForkServer.__new__(ForkServer)
    owner, server._control = socket.socketpair()
    with server._control:
        server._control.sendall(HELLO)
        owner.close()
        assert not server._take_request()


def test_other_machines_are_let_go_if_this_one_cannot_start(monkeypatch):
    ended = []
    part = Part(0, 2, ("127.0.0.1", 1), "127.0.0.1", "node 0")
    members = SimpleNamespace(meet=lambda: part, end=lambda: ended.append(part))
    monkeypatch.setattr(preflight, "has_module", lambda name: False)
    with pytest.raises(GroupUnavailable, match="xfuser is not installed"):
        Launcher(Plan(cfg=2), Devices("cpu", (0,)), members=members).start()
    assert ended == [part]


def test_a_fork_server_that_does_not_end_is_killed(mute_python, configure):
    configure(fork_server_client, stop_seconds=0.1)
    server = fork_server_client.ForkServerProcess(preflight.group_python(), dict(os.environ))
    assert server.end() == -signal.SIGKILL
    server.close()


def test_a_job_is_cancelled_while_its_group_starts(mute_python, start_group, make_job):
    asked = []
    with pytest.raises(Cancelled, match="while the group was starting"):
        start_group("cfg2").sample(make_job("5b"), should_stop=lambda: asked.append(1) or len(asked) > 3)


def test_serve_ends_in_one_line_when_its_processes_end_at_once(configure, run):
    configure(preflight, python=shutil.which("false"))
    for _ in range(4):
        ended = run("serve", "--model", "demo", "--plan", "cfg2", "--devices", "cpu:2")
        assert ended.returncode == 1 and "the group did not start: the fork server ended with status 1" in ended.stderr


def test_a_machine_without_loopback_says_so_before_anything_starts(monkeypatch):
    monkeypatch.setattr(preflight, "LOOPBACKS", ((socket.AF_INET, "192.0.2.1"),))  # nobody's address
    with pytest.raises(GroupUnavailable, match="no loopback network .192.0.2.1: .*ip link set lo up"):
        GroupExecutor(Plan(cfg=2), Devices("cpu", (0, 1)))


def test_what_other_launchers_set_does_not_reach_the_group(monkeypatch):
    others = {"PET_NNODES": "2", "MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}
    others |= {"SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "x", "ROLE_RANK": "1", "GLOO_SOCKET_IFNAME": "nowhere0"}
    for name, value in {**others, "LOCAL_SETTING": "mine", "RANKS": "mine"}.items():
        monkeypatch.setenv(name, value)
    found = preflight.rank_environment(Devices("cpu", (0, 1)), "lo", is_forced=True)
    assert {name: found[name] for name in others if name in found} == {"GLOO_SOCKET_IFNAME": "lo"}
    assert found["LOCAL_SETTING"] == found["RANKS"] == "mine"


@pytest.mark.parametrize("reason", ["cannot be made", "is too long", "has no locks", "belongs to another user"])
def test_groups_live_elsewhere_where_the_runtime_folder_is_of_no_use(reason, short_path, monkeypatch):
    bad, good = short_path / "bad", short_path / "good"
    if reason == "cannot be made":
        bad = Path("/dev/null/run")
    elif reason == "is too long":
        bad = short_path / ("job" * 40)
    elif reason == "belongs to another user":
        bad.mkdir()
        os.chown(bad, 12345, 12345) if os.getuid() == 0 else pytest.skip("needs root to make another's folder")
    else:
        lock = ownership.OwnerLock
        monkeypatch.setattr(registry, "OwnerLock", lambda root: lock(root) if root == good else os.mkdir("/dev/null/locks"))
    monkeypatch.setattr(registry, "roots", lambda: [bad, good])
    home = Home.open()
    assert home.root == good and str(bad) in home.note and "\n" not in home.note
    home.lock.close()
    monkeypatch.setattr(registry, "roots", lambda: [bad])
    with pytest.raises(GroupUnavailable, match="no folder for the group's socket: .*set XDIT_RUNTIME_DIR"):
        Home.open()


def test_groups_are_looked_for_in_all_folders_of_the_user_or_in_the_one_that_is_set(tmp_path, monkeypatch, configure):
    set_for_tests = Path(os.environ["XDIT_RUNTIME_DIR"], "cogvideox-xdit")
    assert registry.roots() == [set_for_tests]  # they see no other group of the user
    configure(registry, runtime_dir=None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "own"))
    own = f"cogvideox-xdit-{os.getuid()}"
    others = [Path(base, own) for base in (tmp_path / "own", "/tmp", "/var/tmp", "/dev/shm")]
    assert registry.roots() == [tmp_path / "cogvideox-xdit", *others]


def test_a_look_for_groups_makes_no_folder_and_never_fails(tmp_path, configure):
    configure(registry, runtime_dir=str(tmp_path / "none"))
    assert not running() and not (tmp_path / "none").exists()
    configure(registry, runtime_dir="/dev/null/run")
    assert shared("cfg2", "cpu:2") == []
    remove_stale()


@pytest.mark.slow
def test_a_group_may_run_under_another_interpreter_and_close_leaves_nothing_of_it(
    monkeypatch, configure, start_group, make_job, local, tmp_path
):
    python = tmp_path / "other-python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    configure(preflight, python=str(python))
    for name, value in {"PET_NNODES": "2", "MASTER_ADDR": "192.0.2.1", "WORLD_SIZE": "8", "NCCL_SOCKET_IFNAME": "no0"}.items():
        monkeypatch.setenv(name, value)  # as a cluster's prologue does
    job: SampleJob = make_job("2b")
    group = start_group("cfg2")
    assert (group.sample(job).tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    folder, ranks = group.address.folder, rank_processes(group.address)
    group.close()
    group.close()
    assert not folder.exists()
    assert wait_until(lambda: not any(map(is_alive, ranks.values())))


def test_a_job_cancelled_while_it_waits_is_answered_at_once(group, make_job):
    started, ended = threading.Event(), threading.Event()

    def first() -> None:
        with pytest.raises(Cancelled):
            group.sample(
                make_job("5b", size=(480, 320, 17), steps=900), on_step=lambda *_: started.set(), should_stop=ended.is_set
            )

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert started.wait(PATIENCE)
        with pytest.raises(Cancelled, match="while waiting in the queue"):
            group.sample(make_job("5b", seed=8), should_stop=lambda: group.status()["queue"] == 1)
        assert thread.is_alive(), "the running job must not be what was stopped"
    finally:
        ended.set()
        thread.join(PATIENCE)
    assert len(group.sample(make_job("5b")).report.step_seconds) == 8


def test_a_failed_decode_leaves_the_group_warm(group, make_job, tmp_path, monkeypatch):
    group.sample(make_job("5b"))
    before, folder = group.status()["loads"], group.address.folder
    monkeypatch.setattr(group, "check", lambda job: None)
    with pytest.raises(RequestError, match="no checkpoint folder"):
        group.decode(DecodeJob(Model(str(tmp_path / "gone")), torch.rand(1, 16, 1, 4, 4)))
    monkeypatch.undo()
    group.sample(make_job("5b"))
    assert (group.status()["loads"], group.address.folder) == (before, folder)


def test_an_interpreter_that_is_not_there_is_named_and_leaves_no_folder(configure, start_group, make_job):
    before = running()
    configure(preflight, python="/nowhere/python")
    with pytest.raises(GroupUnavailable, match="/nowhere/python cannot be started.*correct XDIT_PYTHON"):
        start_group("cfg2").sample(make_job("5b"))
    assert running() == before


def test_a_group_that_another_keeps_is_waited_for_while_it_starts_and_let_go_of_when_it_has_ended(start_group, make_job):
    shared = start_group("cfg2")
    shared.share()
    keeper, devices = ExecutorCache(), Devices("cpu", (0, 1))
    attached = keeper.get(shared.plan, devices)
    assert attached.address == shared.address and keeper.on(devices, Workload(4)) is attached
    assert attached.status()["state"] == "starting"
    assert len(attached.sample(make_job("5b")).report.step_seconds) == 8
    shared.close()
    assert keeper.on(devices, Workload(4)) is None
    assert keeper.get(shared.plan, devices) is not attached
    keeper.close()


def test_a_request_that_makes_no_sense_leaves_the_group_that_is_kept_alone(monkeypatch):
    keeper, plan, devices = ExecutorCache(), Plan(cfg=2), Devices("cpu", (0, 1))
    kept = keeper.get(plan, devices)
    kept.start()
    try:
        assert kept.status()["state"] == "ready"
        with pytest.raises(RequestError, match="needs 3 devices"):
            keeper.get(Plan(ring=3), devices)
        monkeypatch.setattr(preflight, "has_module", lambda name: False)
        with pytest.raises(GroupUnavailable, match="xfuser is not installed"):
            keeper.get(Plan(ulysses=2), devices)
        assert keeper.get(plan, devices) is kept
        assert kept.status()["state"] == "ready"
    finally:
        keeper.close()


def test_a_group_is_kept_for_any_plan_but_not_for_a_model_whose_heads_do_not_fit():
    keeper, devices = ExecutorCache(), Devices("cpu", (0, 1, 2))
    kept = keeper.get(Plan(ulysses=3), devices)
    assert keeper.on(devices, Workload(30)) is kept
    assert keeper.on(devices, Workload(4)) is None
    assert keeper.on(Devices("cpu", (0, 1)), Workload(30)) is None
    devices = Devices("cpu", (0, 1))
    kept = keeper.get(Plan(cfg=2, fsdp=2), devices)
    assert keeper.on(devices, Workload(30, offload="model")) is kept
    assert keeper.on(devices, Workload(30, offload="group")) is None
    three = Devices("cpu", (0, 1, 2))
    with pytest.raises(RequestError, match="needs 2 devices"):
        keeper.get(Plan(ring=2), three)
    assert keeper.on(three, Workload(30)) is None and keeper.on(devices, Workload(30)) is kept


@pytest.mark.parametrize(
    "plan, shares",
    [
        ("single", ["all"]),
        ("cfg2", ["cfg −", "cfg +"]),
        ("cfg2-ulysses2", ["cfg −, sequence 1/2", "cfg −, sequence 2/2", "cfg +, sequence 1/2", "cfg +, sequence 2/2"]),
        ("ulysses2-pipefusion2", ["stage 1/2, sequence 1/2", "stage 1/2, sequence 2/2", "stage 2/2, sequence 1/2", "stage 2/2, sequence 2/2"]),
    ],
)  # fmt: skip
def test_the_share_of_each_rank_is_described(plan, shares):
    assert [share_of_rank(Plan.parse(plan), rank) for rank in range(len(shares))] == shares
