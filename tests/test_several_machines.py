"""Several machines without a cluster: how groups are laid out on nodes, what ranks compare, and what is refused."""

import json
import re
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file, save_file

from parallel_backend.cli.parser import main
from parallel_backend.cluster import lease as lease_module
from parallel_backend.cluster import members
from parallel_backend.cluster import nodes as cluster
from parallel_backend.cluster.nodes import Node, layout
from parallel_backend.devices import Devices
from parallel_backend.errors import GroupError, GroupLost, GroupUnavailable, RequestError
from parallel_backend.executor import cluster_actor
from parallel_backend.executor import resolve as resolve_module
from parallel_backend.executor.cluster import ClusterExecutor
from parallel_backend.executor.group_connection import error_of
from parallel_backend.executor.replicas import ReplicasExecutor
from parallel_backend.executor.resolve import resolve
from parallel_backend.group import job_loop
from parallel_backend.group.codec import Message, decode, encode
from parallel_backend.group.exit_cause import ExitCause, first_of
from parallel_backend.group.job_fields import split_fields
from parallel_backend.group.job_loop import JobLoop
from parallel_backend.group.preflight import interface_of
from parallel_backend.group.registry import GroupAddress, Home
from parallel_backend.group.server import refusal
from parallel_backend.plan import Plan
from parallel_backend.workload import Workload

from .conftest import PATIENCE, REPO

# ---- the nodes of a cluster ----


@pytest.fixture
def nodes(monkeypatch):
    """Has the cluster consist of nodes with so many GPUs of a kind: ``nodes("H100", 8, 8)``."""

    def have(gpu: str | None, *sizes: int) -> None:
        found = [Node(f"n{place}", "", 0 if gpu else size, size if gpu else 0, gpu) for place, size in enumerate(sizes)]
        monkeypatch.setattr(cluster, "nodes", lambda: found)
        monkeypatch.setattr(resolve_module, "served", list)

    return have


@pytest.mark.parametrize(
    "size, sizes, expected",
    [
        (8, [8, 8], (1, 8)),
        (16, [8, 8], (2, 8)),
        (12, [8, 4], (3, 4)),
        (4, [2, 1, 1], (4, 1)),
        (2, [1, 1], (2, 1)),
    ],
)
def test_a_group_takes_as_few_nodes_as_hold_equal_parts_of_it(size, sizes, expected):
    assert layout(size, sizes) == expected


def test_a_group_that_fits_nowhere_is_refused_in_one_line():
    with pytest.raises(RequestError, match="a group of 9 devices does not fit: the nodes of the Ray cluster have 4, 4; use"):
        layout(9, [4, 4])


@pytest.mark.parametrize(
    "gpu, sizes, workload, expected",
    [
        ("H100", (1, 1), Workload(48), "cfg2"),
        ("H100", (1, 1), Workload(48, guided=False, jobs=4), "replicas2"),
        ("H100", (1, 1), Workload(48, guided=False), "single"),
        ("H100", (8, 8), Workload(48), "cfg2-ulysses8"),
        ("H100", (8, 8), Workload(48, guided=False, jobs=2), "replicas2-ulysses8"),
        ("A100", (4, 2), Workload(48, jobs=6), "replicas3-cfg2"),
        (None, (1, 1), Workload(48), "cfg2"),
    ],
)
def test_auto_keeps_what_talks_much_on_a_node(gpu, sizes, workload, expected, nodes):
    nodes(gpu, *sizes)
    plan, devices, _ = resolve("auto", "ray", workload)
    assert (str(plan), str(devices)) == (expected, f"ray:{plan.world_size}")


@pytest.mark.parametrize(
    "plan, devices, expected",
    [
        ("single", "ray", "ray:1"),
        ("replicas5", "ray", "ray:5"),
        ("cfg2", "ray:2", "ray:2"),
        ("cfg2", "ray:3", "plan 'cfg2' needs 2 devices .*but 3 were given"),
        ("cfg2", "ray:0", "devices 'ray:0' are no devices; use ray:1 or more"),
        ("cfg2", "rays", "devices 'rays' are not understood; use auto, cpu, cpu:2, ray, or GPU numbers"),
    ],
)
def test_a_plan_takes_the_devices_that_it_needs(plan, devices, expected, nodes):
    nodes(None, 2)
    try:
        assert str(resolve(plan, devices, Workload(48))[1]) == expected  # the others may wait for nodes
    except RequestError as error:
        assert re.match(expected, str(error))


def test_a_cluster_without_devices_is_refused(nodes):
    nodes(None, 0)
    with pytest.raises(RequestError, match="the Ray cluster has no GPU and no CPU; add nodes with `ray start"):
        resolve("auto", "ray", Workload(48))


def test_absent_ray_is_said_in_one_line(monkeypatch, run):
    monkeypatch.setattr(cluster, "has_module", lambda name: False)
    done = run("generate", "--model", "demo", "--prompt", "x", "--devices", "ray", "--output", "x.mp4")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "devices 'ray' need Ray, which is not installed: pip install -r requirements-ray.txt" in done.stderr


@pytest.mark.parametrize(
    "words",
    [("serve", "--nnodes", "2"), ("serve", "--rendezvous", "10.0.0.1:29500"), ("plan", "--model", "demo", "--nnodes", "2")],
    ids=lambda words: words[-2],
)
def test_options_that_ray_replaced_are_refused_and_name_it(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(list(words))
    said = capsys.readouterr().err
    assert error.value.code == 2 and len(said.splitlines()) == 1
    assert f"{words[-2]} is gone: several machines are a Ray cluster now; use --devices ray (docs/cluster.md)" in said


def test_the_description_for_kubernetes_has_what_its_operator_asks_for_with_a_token():
    (text,) = re.findall(r"```yaml\n(.*?)```", (REPO / "docs" / "cluster.md").read_text(), re.DOTALL)
    spec = yaml.safe_load(text)["spec"]  # KubeRay refuses a token without the version of Ray
    assert spec["authOptions"]["mode"] == "token" and tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52)


# ---- parts of a group ----


@pytest.fixture
def part_of_another() -> GroupAddress:
    """The folder of a part of a group on Ray whose rank 0 is elsewhere, with no processes."""
    known = {"plan": "cfg2", "devices": "cpu:1", "shared": False, "processes": 1, "nodes": 2, "node": 1, "first_rank": 1}
    home = Home.open()
    address = GroupAddress.create(home.root, {**known, "lost": None, "lock": str(home.lock.path)})
    yield address
    address.remove()
    home.lock.close()


def test_a_part_of_a_group_is_shown_and_is_not_stopped_alone(part_of_another, run):
    states = {group["folder"]: group["state"] for group in json.loads(run("status", "--json").stdout)["groups"]}
    assert states[str(part_of_another.folder)] == "part of a group on Ray that another node leads"
    said = run("stop").stdout
    assert "plan cfg2 on cpu:1 is a part of a group on Ray that another node leads: it ends with that" in said


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


@pytest.mark.parametrize(
    "error",
    [
        GroupLost("the group was lost", details="its log", came_up=False, is_there=True),
        GroupError("rank 1 failed", rank=1, details="a traceback"),
        GroupUnavailable("xfuser is missing"),
        RequestError("a wrong request"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_group_is_the_same_for_a_caller_on_another_machine(error):
    answer = decode(encode(refusal(error)))
    raised = error_of(answer.plain)
    assert (answer.kind, type(raised), str(raised), vars(raised)) == ("failed", type(error), str(error), vars(error))


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

    def found(rank: int):
        try:
            return run(rank)
        except RequestError as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(found, range(2)))


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
    monkeypatch.setattr(job_loop.validation, "check", lambda *_: None)
    for error in open_on_two([job, other], monkeypatch):
        assert re.search(
            r"host 1: \S+, its LoRAs or its ControlNets have other files than on host 0; copy them from there", str(error)
        )


def test_a_lora_that_one_host_has_otherwise_is_named(make_job, tmp_path, monkeypatch):
    job, paths = make_job("5b", lora=0.5), [tmp_path / host / "style.safetensors" for host in ("one", "other")]
    (lora,) = job.model.loras
    for path, strength in zip(paths, (1, 2)):
        path.parent.mkdir()
        save_file({name: weight * strength for name, weight in load_file(lora.path).items()}, path)
    on = [replace(job, model=replace(job.model, loras=(replace(lora, path=str(path)),))) for path in paths]
    assert [opened.model for opened in open_on_two([on[0], on[0]], monkeypatch)] == [on[0].model] * 2
    for error in open_on_two(on, monkeypatch):
        assert re.search(r"host 1: \S+, its LoRAs or its ControlNets have other files than on host 0", str(error))


def test_ranks_that_are_asked_to_end_while_they_start_end(monkeypatch):
    ended = threading.Event()

    class Launcher:
        def __init__(self, plan, devices, part):
            self.process = None

        def start(self) -> None:
            ranks.end()  # by another thread of the actor
            self.process = SimpleNamespace(kill=ended.set, wait=lambda: -9 if ended.is_set() else 0)

        stop = leave = exit_cause = lambda self: None

    monkeypatch.setattr(cluster_actor, "devices_here", lambda: Devices("cpu"))
    monkeypatch.setattr(cluster_actor, "Launcher", Launcher)
    ranks = cluster_actor.Ranks("cfg2")
    assert ranks.lend({"node": 1, "nodes": 2}) is None and ended.is_set()


@pytest.mark.parametrize("asked, expected", [("known", {"node": "a"}), ("dead", None)])
def test_an_actor_that_another_thread_loses_meanwhile_is_not_waited_for(asked, expected, monkeypatch):
    class Greeting(Future):
        """Of an actor that is up, and is lost as soon as one has seen that."""

        def done(self) -> bool:
            lease.lose()
            return super().done()

    greetings = [Greeting(), *(Future() for _ in range(4))]
    greetings[0].set_result({"node": "a"})
    monkeypatch.setattr(lease_module, "greet", lambda handle: SimpleNamespace(future=lambda: greetings.pop(0)))
    lease, found = lease_module.Lease(None), []
    thread = threading.Thread(target=lambda: found.append(getattr(lease, asked)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found == [expected] and lease.known == {}


def test_replicas_on_a_cluster_hold_no_gpu_of_the_caller():
    groups = [ClusterExecutor(f"replicas2#{place}") for place in (1, 2)]
    replicas = ReplicasExecutor(Plan(replicas=2), Devices("cuda", (0, 1), on_ray=True), groups)
    assert {device.type for device in (*replicas.torch_devices, *groups[0].torch_devices)} == {"cpu"}


def test_ranks_meet_at_a_port_that_no_connection_is_given(monkeypatch):
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert members.free_port("127.0.0.1") in members.PORTS and members.PORTS.stop <= low
    with socket.create_server(("127.0.0.1", members.free_port("127.0.0.1"))) as taken:
        port = taken.getsockname()[1]
        other = members.free_port("127.0.0.1")
        monkeypatch.setattr(members.random, "sample", lambda *_: [port, other])
        assert members.free_port("127.0.0.1") == other
        monkeypatch.setattr(members.random, "sample", lambda *_: [port])
        with pytest.raises(GroupUnavailable, match="no port of 127.0.0.1 from 20000 to 31999 is free"):
            members.free_port("127.0.0.1")


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == "lo"
    assert interface_of("192.0.2.1") is None or interface_of("192.0.2.1") != "lo"


@pytest.mark.parametrize("has_failed", [True, False])
def test_ranks_that_had_failed_when_the_other_node_ended_them_say_why(has_failed, monkeypatch):
    """Rank 0 had only lost its connection to them: with its own error the job would fail, where a lost rank begins it again."""
    ended, killed, asked = threading.Event(), [], threading.Event()
    cause = ExitCause("rank 1 was killed by SIGKILL", by_itself=False)

    class Process:
        def wait(self, seconds: float | None = None) -> int:
            if seconds is not None:
                asked.set()
            if not ended.wait(PATIENCE if seconds is None or has_failed else 0):
                raise TimeoutError
            return 1

        def kill(self) -> None:
            killed.append(self)
            ended.set()

    lent = SimpleNamespace(process=None, exit_cause=lambda: cause, stop=lambda: None, leave=lambda: None)
    lent.start = lambda: setattr(lent, "process", Process())
    monkeypatch.setattr(cluster_actor, "Launcher", lambda *_: lent)
    ranks = cluster_actor.Ranks.__new__(cluster_actor.Ranks)
    ranks.plan, ranks.devices, ranks._launcher = Plan(ulysses=2), Devices("cpu", (0,)), None
    part = {"node": 1, "nodes": 2, "store": ("127.0.0.1", 1), "address": "127.0.0.1", "name": "node 1"}
    with ThreadPoolExecutor() as threads:
        said = threads.submit(ranks.lend, part)
        while lent.process is None:
            threading.Event().wait(0.01)
        end = threads.submit(ranks.end)
        assert asked.wait(PATIENCE)
        if has_failed:
            ended.set()  # its supervisor reports now
        end.result(PATIENCE)
        assert said.result(PATIENCE) == ({**cause.__dict__} if has_failed else None)
    assert bool(killed) != has_failed
