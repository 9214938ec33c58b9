"""Several machines: they meet, give the video of one, name the one that differs or goes, and leave nothing behind."""

import json
import os
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from parallel_backend.cli.parser import main
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.errors import GroupError, GroupUnavailable, RequestError
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.resolve import resolve
from parallel_backend.group import hosts, job_loop, link, muster
from parallel_backend.group.codec import Message
from parallel_backend.group.exit_cause import ExitCause, first_of
from parallel_backend.group.hosts import Common, Place, Rendezvous
from parallel_backend.group.job_fields import split_fields
from parallel_backend.group.job_loop import JobLoop
from parallel_backend.group.muster import Leader, Member
from parallel_backend.group.preflight import interface_of
from parallel_backend.group.registry import GroupAddress, Home
from parallel_backend.workload import Workload

from .conftest import PATIENCE, TOLERANCE, wait_until
from .support.two_hosts import SILENT_SECONDS, TwoHosts

# ---- two hosts with their processes ----


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two hosts for the whole file; the tests see the groups that the user sees on the first."""
    both = TwoHosts(tmp_path_factory.mktemp("hosts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(both.folders[0]))
        yield both
        both.close()


@pytest.fixture
def serve(two):
    """Has both hosts serve a plan, the second whatever the first has: ``serve("cfg2")``. Gives an executor on the first."""

    def start(plan: str) -> GroupExecutor:
        for host, options in enumerate((("--plan", plan), ())):
            if two.served[host] is None or two.served[host].poll() is not None:
                two.serve(host, *options)
        executor = GroupExecutor.attach(two.address())
        assert executor.status()["plan"] == plan
        return executor

    return start


@pytest.mark.slow
def test_two_hosts_give_the_video_of_one_and_both_are_shown(two, serve, make_job, local, capsys):
    job = make_job("5b")
    group = serve("cfg2")
    assert (group.sample(job).tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    first, second = (f"{socket.gethostname()} ({address}, node {node})" for node, address in enumerate(two.network.addresses))
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    for words in (f"host {first}: rank 0 on cpu:1, memory ", f"host {second}: rank 1 on cpu:1, memory "):
        assert words in shown
    assert len(group.status()["memory"]) == 2
    assert "lending cpu:1 as rank 1 of plan cfg2 to host" in two.said(1)


@pytest.mark.slow
def test_a_host_that_is_cut_off_in_a_job_is_named_in_time_and_no_process_is_left(two, serve, make_job):
    group, other = serve("cfg2"), psutil.Process(two.served[1].pid)
    address, cut = group.address, []

    def cut_once(step: int, steps: int) -> None:
        if not cut:
            cut.append(step)
            two.network.cut(other)

    try:
        here = re.escape(f"({two.network.addresses[1]}, node 1, rank 1)")
        with pytest.raises(GroupError, match=f"host \\S+ {here} is gone: no sign of life for {SILENT_SECONDS:.0f} s"):
            group.sample(make_job("5b", size=(192, 128, 17), steps=1000), on_step=cut_once)  # longer than the silence
        assert wait_until(lambda: not two.processes(0)) and not address.folder.exists()
        if not two.network.is_real:
            two.network.mend(other)
        assert wait_until(lambda: not two.processes(1))
        assert wait_until(lambda: "waiting for node 0 again" in two.said(1))
    finally:
        two.network.mend(other)
        two.served[0].kill()  # as if the first host had gone too; the second goes on waiting for it
        two.served[0].wait()


@pytest.mark.slow
def test_another_node_0_is_joined_and_a_job_goes_on_when_a_launcher_was_killed_until_stop_ends_both(
    two, serve, make_job, local
):
    job, hurt = make_job("5b", steps=60), []  # many: the last step must not be done before the supervisor is gone
    group = serve("ulysses2")

    def kill_once(step: int, steps: int) -> None:
        if step >= 4 and not hurt:
            hurt.append(two.supervisor(1).pid)
            os.kill(hurt[0], signal.SIGKILL)

    result = group.sample(job, on_step=kill_once)
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    assert re.search(r"host \S+ \(\S+, node 1, rank 1\): the supervisor was killed by SIGKILL; .*went on after step", note)
    assert main(["stop"]) == 0
    assert [process.wait(PATIENCE) for process in two.served] == [0, 0], two.said(0) + two.said(1)
    assert not two.processes(0) and not two.processes(1)


# ---- how they meet, in this process ----


def common(**other) -> Common:
    """What a host of two in these tests has."""
    return replace(Common.here(nodes=2, plan="cfg2", kind="cpu", processes=1), **other)


@pytest.fixture
def place() -> Place:
    """Node 0 of two hosts on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return Place(Rendezvous("127.0.0.1", port), 2, 0, PATIENCE)


@contextmanager
def in_a_thread(run):
    """Runs something meanwhile; gives a list for what it returns or raises, filled at the end."""
    found = []

    def keep() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=keep)
    thread.start()
    yield found
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def met(place):
    """A leader and a member that have met, and what is called when the group ends elsewhere."""
    leader, member = Leader(place, common(), "cpu:1"), Member(replace(place, node=1), common(plan="auto"), "cpu:1")
    with in_a_thread(member.meet):
        leader.meet()
    calls = {"leader": threading.Event(), "member": threading.Event()}
    assert leader.watch(calls["leader"].set) and member.watch(calls["member"].set)
    yield leader, member, calls
    for host in (member, leader):
        host.part(again=False)


def test_hosts_that_meet_know_ranks_plan_and_the_way_between_them(met):
    leader, member, _ = met
    assert leader.meeting.hosts == member.meeting.hosts
    assert [host.ranks for host in member.meeting.hosts] == ["rank 0", "rank 1"]
    assert (member.meeting.plan, member.meeting.interface) == ("cfg2", "lo")
    where = leader.place.rendezvous
    assert leader.meeting.store == member.meeting.store != (where.host, where.port)


def test_a_host_that_never_comes_is_named_on_one_that_waits(place, monkeypatch):
    place = replace(place, nodes=3)
    leader, member = Leader(place, common(nnodes=3), "cpu:1"), Member(replace(place, node=2), common(nnodes=3), "cpu:1")
    admit, clock = leader._admit, [0.0]
    monkeypatch.setattr(muster, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))

    def admit_and_wait(*arrival) -> None:
        admit(*arrival)
        clock[0] += PATIENCE + 1

    monkeypatch.setattr(leader, "_admit", admit_and_wait)
    with in_a_thread(member.meet) as found:
        with pytest.raises(
            GroupUnavailable, match=f"no host came as node 1 to {place.rendezvous} within {PATIENCE} s; .*--node-rank 1"
        ):
            leader.meet()
    assert isinstance(found[0], GroupUnavailable) and "gave up: no host came as node 1" in str(found[0])
    leader.part(again=False)


def test_a_node_0_that_is_not_there_is_named(place):
    with pytest.raises(GroupUnavailable, match=f"node 0 was not at {place.rendezvous} within 1 s .*--node-rank 0"):
        Member(replace(place, node=1, wait=1), common(), "cpu:1").meet()


@pytest.mark.parametrize(
    "other, words",
    [
        ({"plan": "ulysses2"}, "plan is cfg2 on host .* and ulysses2 on host"),
        ({"processes": 2}, "the number of devices is 1 on host .* and 2 on host"),
        ({"version": "old"}, "the pack's version is .* and old on host"),
        ({"torch": "1.0"}, "torch is .* and 1.0 on host"),
        ({"kind": "cuda", "nnodes": 3}, "nnodes is 2 on .* and 3 on .*; the kind of device is cpu on host .* and cuda on host"),
    ],
)
def test_a_host_that_differs_is_refused_on_both_sides_and_the_right_one_is_still_taken(other, words, place, caplog):
    leader = Leader(place, common(), "cpu:1")
    with in_a_thread(leader.meet):
        with pytest.raises(RequestError, match=f"refused: {words}") as error:
            Member(replace(place, node=1), common(**other), "cpu:1").meet()
        assert re.search(f"refused a host: {words}", caplog.text) and "\n" not in str(error.value)
        member = Member(replace(place, node=1), common(), "cpu:1")
        assert member.meet().plan == "cfg2"
    for host in (member, leader):
        host.part(again=False)


def test_strangers_at_the_port_keep_nobody_from_meeting(place):
    leader, member = Leader(place, common(), "cpu:1"), Member(replace(place, node=1), common(), "cpu:1")
    lines = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "hello"}\n{"kind": "here"}\n',
        b"x" * 2**18 + b"\n",
        b"[" * 2**16 + b"\n",
    ]
    strangers = [socket.create_connection((place.rendezvous.host, place.rendezvous.port)) for _ in lines]
    for stranger, line in zip(strangers, lines):
        stranger.sendall(line)
    with in_a_thread(member.meet) as found:
        leader.meet()
    assert found[0].hosts == leader.meeting.hosts
    for stranger in strangers:
        stranger.close()
    for host in (member, leader):
        host.part(again=False)


def test_a_host_that_hangs_up_ends_the_group_and_is_named(met):
    leader, member, calls = met
    member._links[0].close()  # as the kernel does for a process that was killed
    assert calls["leader"].wait(PATIENCE)
    cause = leader.verdict(ExitCause("rank 0 ended with status 1"))  # as broken connections have it end
    assert cause.gone and re.search(r"host \S+ \(127.0.0.1, node 1, rank 1\) is gone: its serve process", cause.cause)


def test_a_host_that_says_what_makes_no_sense_is_gone(met):
    leader, member, calls = met
    member._links[0].send("ended", cause={"cause": "x", "behind": "often"})
    assert calls["leader"].wait(PATIENCE)
    assert leader.verdict(None).cause.endswith("is gone: it sends what is no message")


def test_a_host_that_is_silent_ends_the_group_and_is_named(place, configure):
    configure(link, silent_seconds=3.0, beat_seconds=0.1)
    leader, member = Leader(place, common(), "cpu:1"), Member(replace(place, node=1), common(), "cpu:1")
    with in_a_thread(member.meet):
        leader.meet()
    called = threading.Event()
    leader.watch(called.set)
    assert not called.wait(3.5)  # both give signs of life
    member._links[0]._closed.set()  # no more beats
    assert called.wait(PATIENCE)
    assert "is gone: no sign of life for 3 s" in leader.verdict(None).cause
    for host in (member, leader):
        host.part(again=False)


def test_a_rank_that_was_killed_on_another_host_is_the_cause_and_the_hosts_meet_again(met):
    leader, member, calls = met
    killed = ExitCause("rank 1 was killed by SIGKILL", by_itself=False)
    with in_a_thread(lambda: member.verdict(killed)) as heard:
        assert calls["leader"].wait(PATIENCE)
        cause = leader.verdict(ExitCause("rank 0 ended with status 1"))
        assert re.fullmatch(r"host \S+ \(127.0.0.1, node 1, rank 1\): rank 1 was killed by SIGKILL", cause.cause)
        leader.part(again=True, cause=cause)
    assert heard == [cause] and member.comes_again and not cause.gone
    with in_a_thread(member.meet):
        leader.meet()


def test_a_failure_on_node_0_ends_the_other_host_which_hears_why(met):
    leader, member, calls = met
    with in_a_thread(lambda: leader.verdict(ExitCause("rank 0 ended with status 1"))) as found:
        assert calls["member"].wait(PATIENCE) and member.has_trouble
        with in_a_thread(lambda: member.verdict(None)) as heard:
            assert wait_until(lambda: found)
            leader.part(again=False, cause=found[0])
    assert "node 0, rank 0): rank 0 ended with status 1" in found[0].cause and heard == found
    assert not member.comes_again and member.failed


def test_a_host_that_leaves_is_gone_and_one_whose_node_0_ends_in_good_order_is_done(met):
    leader, member, calls = met
    leader.part(again=False)
    assert calls["member"].wait(PATIENCE)
    assert not member.comes_again and not member.failed


def test_a_host_whose_serve_is_ended_is_gone(met):
    leader, member, calls = met
    member.part(again=False)
    assert calls["leader"].wait(PATIENCE)
    assert leader.verdict(None).cause.endswith("is gone: its serve was ended there")


@pytest.mark.parametrize(
    "causes, first",
    [
        ([ExitCause("failed"), ExitCause("killed", by_itself=False), ExitCause("gone", by_itself=False, gone=True)], "gone"),
        ([ExitCause("failed"), ExitCause("killed", by_itself=False), ExitCause("hung", by_itself=False, behind=3)], "killed"),
        ([ExitCause("waits", by_itself=False, behind=4), ExitCause("hung", by_itself=False, behind=3)], "hung"),
        ([ExitCause("met with it", failure={"waited": 0.1}), ExitCause("failed", failure={"waited": 15.0})], "failed"),
    ],
)
def test_of_several_ends_the_one_that_the_others_follow_from_is_the_cause(causes, first):
    assert first_of(causes).cause == first_of(causes[::-1]).cause == first


# ---- what a user may get wrong ----


@pytest.mark.parametrize(
    "options, words",
    [
        (("--nnodes", "2"), "nnodes is 2 and node-rank 0; .*--rendezvous HOST:PORT"),
        (("--node-rank", "1"), "--rendezvous HOST:PORT"),
        (("--rendezvous", "127.0.0.1:29500"), "nnodes is 1; with a rendezvous use 2 or more"),
        (("--nnodes", "2", "--rendezvous", "127.0.0.1"), "rendezvous '127.0.0.1' is no HOST:PORT"),
        (("--nnodes", "2", "--rendezvous", "127.0.0.1:99999"), "is no HOST:PORT"),
        (
            ("--nnodes", "2", "--node-rank", "2", "--rendezvous", "127.0.0.1:29500"),
            "node-rank is 2; 2 hosts are numbered 0 to 1",
        ),
        (("--nnodes", "2", "--wait", "0", "--rendezvous", "127.0.0.1:29500"), "wait is 0; use more than 0 seconds"),
        (
            ("--nnodes", "2", "--plan", "cfg2", "--rendezvous", "192.0.2.1:29500"),
            "cannot listen there .*node-rank 0 is the host",
        ),
        (("--nnodes", "2", "--plan", "cfg2", "--rendezvous", "no.such.invalid:29500"), "cannot listen there"),
        (
            ("--nnodes", "2", "--plan", "cfg2", "--devices", "cpu:2", "--rendezvous", "127.0.0.1:29500"),
            "needs 2 devices but 4 were given, 2 on each of 2 hosts",
        ),
        (
            ("--nnodes", "2", "--node-rank", "1", "--plan", "cfg2", "--devices", "cpu:2", "--rendezvous", "127.0.0.1:29500"),
            "needs 2 devices but 4 were given, 2 on each of 2 hosts",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_serve_refuses_what_makes_no_sense_in_one_line(options, words, capsys):
    assert main(["serve", "--devices", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and len(error.splitlines()) == 1


@pytest.fixture
def served_elsewhere_too():
    """The folder of a group of two hosts, as ``serve`` makes it, with no processes."""
    known = {"plan": "cfg2", "devices": "cpu:1", "shared": True, "processes": 1, "nodes": 2, "node": 0, "first_rank": 0}
    home = Home.open()
    address = GroupAddress.create(home.root, {**known, "lost": None, "lock": str(home.lock.path)})
    yield address
    address.remove()
    home.lock.close()


@pytest.mark.parametrize(
    "plan, devices, expected",
    [
        ("auto", "auto", "cfg2"),
        ("cfg2", "cpu", "cfg2"),
        ("auto", "cpu:1", "cfg2"),
        ("auto", "cpu:2", None),
        ("single", "cpu", None),
    ],
)
def test_a_group_over_hosts_is_found_by_its_plan_and_the_devices_here(plan, devices, expected, served_elsewhere_too):
    found, here, reason = resolve(plan, devices, Workload(48))
    assert (reason == "the group of 2 hosts that serve keeps") == (expected is not None)
    if expected:
        assert (str(found), str(here)) == (expected, "cpu:1")


def test_a_group_whose_hosts_have_not_met_says_that_it_waits(served_elsewhere_too, capsys):
    assert main(["status", "--json"]) == 0
    states = [group["state"] for group in json.loads(capsys.readouterr().out)["groups"]]
    assert "waiting for the other hosts" in states


# ---- models on several hosts ----


def open_on_two(jobs, monkeypatch) -> list:
    """What ranks on two hosts make of a job each: the job, or what they raise."""
    monkeypatch.setenv(job_loop.HOST, "a host")
    gathered, barrier = [None, None], threading.Barrier(2)

    class RankContext:
        def __init__(self, rank: int):
            self.rank = rank

        def collect(self, value):
            gathered[self.rank] = (f"host {self.rank}", *value[1:])
            barrier.wait(PATIENCE)
            return gathered

    def run(rank: int):
        loop = JobLoop.__new__(JobLoop)
        loop.context = RankContext(rank)
        return loop.opened(Message(jobs[rank].kind, *split_fields(jobs[rank])))

    with in_a_thread(lambda: run(0)) as first, in_a_thread(lambda: run(1)) as second:
        pass
    return [*first, *second]


def test_a_model_that_one_host_lacks_or_has_otherwise_is_named_on_all(make_job, checkpoints, tmp_path, monkeypatch):
    job = make_job("5b")
    assert [opened.model for opened in open_on_two([job, job], monkeypatch)] == [job.model] * 2
    absent = replace(job, model=replace(job.model, path=str(tmp_path / "gone")))
    for error in open_on_two([job, absent], monkeypatch):
        assert isinstance(error, RequestError)
        assert re.search(
            r"host 1: there is no checkpoint folder \S+gone; models and LoRAs must be at the same path", str(error)
        )
    for error in open_on_two([absent, absent], monkeypatch):
        assert str(error) == f"there is no checkpoint folder {tmp_path / 'gone'}"
    other = make_job("5b", model=replace(job.model, path=str(checkpoints["5b-i2v"])))
    assert Checkpoint.open(other.model.path).likeness() != Checkpoint.open(job.model.path).likeness()
    monkeypatch.setattr(job_loop.validation, "check", lambda *_: None)
    for error in open_on_two([job, other], monkeypatch):
        assert re.search(r"host 1: \S+ has other files than on host 0; copy it from there", str(error))


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == "lo"
    assert interface_of("192.0.2.1") is None
    assert hosts.code_version() == hosts.code_version.__wrapped__()
