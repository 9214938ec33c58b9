"""Connections to a group: they break, stall and are made again, and a healthy group is none the worse for it."""

import os
import shutil
import signal
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Client

import pytest
import torch

from parallel_backend.devices import Devices
from parallel_backend.errors import Cancelled, GroupError, GroupLost
from parallel_backend.executor import group_connection, recovery
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.group import connection, protocol, server
from parallel_backend.group.codec import Message
from parallel_backend.group.registry import GroupAddress, Home
from parallel_backend.jobs import DecodeJob, Progress, Report, SampleJob
from parallel_backend.notes import is_warning
from parallel_backend.plan import Plan

from .conftest import PATIENCE, TOLERANCE, rank_processes, wait_until


@pytest.fixture(scope="module")
def group():
    """A group of two, whose connections every test disturbs."""
    executor = GroupExecutor(Plan.parse("cfg2"), Devices("cpu", (0, 1)))
    executor.start()
    yield executor
    executor.close()


@pytest.fixture
def address():
    """A group's folder with no processes."""
    home = Home.open()
    known = {"plan": "cfg2", "devices": "cpu:2", "shared": True, "node": 0, "nodes": 1, "lost": None}
    address = GroupAddress.create(home.root, {**known, "lock": str(home.lock.path)})
    yield address
    address.remove()
    home.lock.close()


def test_a_broken_connection_is_made_again_and_the_healthy_group_goes_on(group, make_job, local, monkeypatch):
    job, made, broken, connect = make_job("5b", steps=12), [], [], connection.connect
    expected = local.sample(job).tensor
    group.sample(make_job("5b", steps=2))
    before = rank_processes(group.address)

    def remember(*arguments):
        made.append(connect(*arguments))
        return made[-1]

    def break_once(step: int, steps: int) -> None:
        if step == 6 and not broken:
            broken.append(step)
            connection.hang_up(made[-1])

    monkeypatch.setattr(group_connection, "connect", remember)
    result = group.sample(job, on_step=break_once)
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    assert note.startswith("the connection to the group broke; connected again and went on after step ")
    assert rank_processes(group.address) == before


def test_a_job_of_which_no_step_was_kept_is_said_to_begin_again(make_job, caplog):
    job, asked = make_job("5b", steps=6), []

    def ask(job: SampleJob, kept: group_connection.Keepsake) -> Message:
        asked.append(job.progress and job.progress.step)
        if len(asked) == 2:
            kept.progress = Progress(3, job.latent, torch.zeros(1))
        if len(asked) < 3:
            raise GroupLost("the group was lost: rank 1 was killed")
        return Message("done")

    _, notes = recovery.run_and_resume(job, ask, lambda lost: lost, group_connection.Keepsake())
    lost, again = "the group was lost: rank 1 was killed", "the group was started again and"
    assert asked == [None, None, 3]
    assert notes == [f"{lost}; {again} the job began again", f"{lost}; {again} went on after step 3"]
    assert [line.partition("again, to ")[2] for line in caplog.messages] == ["begin the job again", "go on after step 3"]


def test_all_notes_of_a_group_of_an_older_version_are_warnings():
    plain, tensors = {"report": asdict(Report(notes=("lost", "asked for")))}, {"tensor": torch.zeros(1)}
    for known, expected in (({}, [True, True]), ({"information": ["asked for"]}, [True, False])):
        found = group_connection.result_of(Message("done", plain | known, tensors), ["started again"]).report.notes
        assert found == ("started again", "lost", "asked for") and [is_warning(note) for note in found] == [True, *expected]


def test_an_error_of_the_caller_s_own_is_not_taken_for_a_broken_connection(group, make_job):
    def closed(step: int, steps: int) -> None:
        raise BrokenPipeError("standard error is closed")

    with pytest.raises(BrokenPipeError, match="standard error"):
        group.sample(make_job("5b", steps=4), on_step=closed)


def test_a_rank_that_is_killed_in_the_middle_of_a_large_answer_costs_no_job(group, make_job, local, monkeypatch):
    latent = torch.randn(1, 16, 5, 16, 20, generator=torch.Generator().manual_seed(4))
    job = DecodeJob(make_job("5b").model, latent)
    expected, killed, receive_part = local.decode(job).tensor, [], protocol.receive_part

    def kill_once(end, most, **how):
        if most > 2**20 and how.get("exactly", True) and not killed:  # eight frames: more than the socket holds
            killed.append(most)
            os.kill(rank_processes(group.address)[0], signal.SIGKILL)
            time.sleep(0.2)
        return receive_part(end, most, **how)

    monkeypatch.setattr(protocol, "receive_part", kill_once)
    result = group.decode(job)
    assert killed and (result.tensor - expected).abs().max() <= TOLERANCE
    assert "rank 0 was killed by SIGKILL; the group was started again" in result.report.notes[0]


def test_a_group_whose_folder_is_swept_away_loses_neither_its_job_nor_the_next(group, make_job, local):
    job, hurt = make_job("5b", steps=12), []
    expected = local.sample(job).tensor

    def sweep_and_kill(step: int, steps: int) -> None:
        if step == 6 and not hurt:
            hurt.extend(rank_processes(group.address).values())
            shutil.rmtree(group.address.folder)
            os.kill(hurt[1], signal.SIGKILL)

    result = group.sample(job, on_step=sweep_and_kill)
    assert (result.tensor - expected).abs().max() <= TOLERANCE and len(result.report.step_seconds) < 8
    assert "rank 1 was killed by SIGKILL" in result.report.notes[0]
    folder = group.address.folder
    shutil.rmtree(folder)
    result = group.sample(job)
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    assert f"its folder {folder} was removed; the group was started again" in result.report.notes[0]


@pytest.fixture
def serve(address):
    """Starts a group's side of the socket in this process."""
    started = []

    def start(status) -> server.Server:
        started.append(server.Server(address, status))
        return started[-1]

    yield start
    for one in started:
        one.close()


@contextmanager
def listener(address: GroupAddress):
    """Something that listens on a group's socket and says nothing."""
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(address.socket)
        end.listen()
        yield end


def test_a_listener_that_says_nothing_is_given_up_and_cancel_is_heard_meanwhile(address, make_job, configure):
    with listener(address):
        attached = GroupExecutor.attach(address)
        with pytest.raises(Cancelled):
            attached.sample(make_job("5b"), should_stop=lambda: True)
        configure(connection, handshake_seconds=0.3)
        for ask in (attached.status, attached.free, attached.stop, lambda: attached.sample(make_job("5b"))):
            with pytest.raises(GroupError, match="does not answer"):
                ask()


def test_a_listener_that_stops_in_the_middle_of_a_message_is_given_up(address):
    with listener(address) as end:
        ours = socket.socket(socket.AF_UNIX)
        connection.bounded(ours, sending=1.0, receiving=1.0)
        ours.connect(address.socket)
        theirs, _ = end.accept()
        theirs.sendall((100).to_bytes(4, "big") + b"ten bytes.")  # of a hundred
        with connection.Connection(ours.detach()) as reader, pytest.raises(connection.Broken), connection.talking():
            reader.recv_bytes()
        theirs.close()


def test_a_request_that_fails_is_answered_and_the_connection_is_not_just_dropped(address, serve):
    def status() -> dict:
        raise RuntimeError("dictionary changed size during iteration")

    serve(status)
    with pytest.raises(GroupError, match="the group failed: RuntimeError: dictionary changed size"):
        GroupExecutor.attach(address).status()


def test_a_failure_of_the_system_in_a_request_is_answered_too(address, serve):
    def status() -> dict:
        raise OSError("no device")

    serve(status)
    with pytest.raises(GroupError, match="the group failed: OSError: no device"):
        GroupExecutor.attach(address).status()


def test_a_client_waits_whatever_its_program_has_set_for_sockets(address, serve, monkeypatch):
    def status() -> dict:
        time.sleep(0.5)
        return {}

    serve(status)
    socket.setdefaulttimeout(20)  # without a wait of their own sockets would be non-blocking
    try:
        with connection.connect(address.socket, address.key, lambda: False) as end:
            assert os.get_blocking(end.fileno())
            protocol.send(end, Message("status"))
            assert protocol.receive(end).plain == {"queue": 0}
    finally:
        socket.setdefaulttimeout(None)


def test_a_client_that_reads_nothing_keeps_nobody_waiting(address, serve, configure):
    configure(server, write_seconds=0.5)
    serving = serve(dict)
    with Client(address.socket, family="AF_UNIX", authkey=address.key) as mute:
        protocol.send(mute, Message("free"))
        request = serving.next(30)
        answer = Message("done", {}, {"tensor": torch.zeros(2**22)})
        thread = threading.Thread(target=request.answer, args=(answer,), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive() and request.cancelled.is_set()
        with pytest.raises((EOFError, OSError)):  # it gets no half of a message, and can connect again
            while True:
                protocol.receive(mute)
    assert GroupExecutor.attach(address).status()["queue"] == 0


def test_many_may_ask_at_once(group):
    group.start()
    assert wait_until(lambda: group.status()["state"] == "ready")
    said = []
    threads = [threading.Thread(target=lambda: said.append(group.status()["state"])) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert said == ["ready"] * 40
