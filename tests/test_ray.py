"""A Ray cluster: its nodes give the videos of one process, whichever of them is lost, added, or slow."""

import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import types
from contextlib import contextmanager, suppress

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")

import ray
from ray import cloudpickle

from parallel_backend.cli import bench_table, serve, status
from parallel_backend.cluster import actor as actor_module
from parallel_backend.cluster.lease import leased
from parallel_backend.devices import Devices
from parallel_backend.errors import RequestError
from parallel_backend.executor import cluster_actor
from parallel_backend.executor.cluster import ClusterExecutor
from parallel_backend.executor.factory import open_executor
from parallel_backend.executor.overview import overview
from parallel_backend.executor.replicas import ReplicasExecutor
from parallel_backend.executor.resolve import resolve
from parallel_backend.group import preflight
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import Windows
from parallel_backend.plan import Plan
from parallel_backend.planner.gpu_table import KNOWN
from parallel_backend.workload import Workload

from .conftest import PATIENCE, REPO, TOLERANCE, wait_until, workers
from .support.ray_cluster import RayCluster

SMALL = {"size": (48, 48, 5), "steps": 3}
STEPS = 150
"""Of a job that loses a process after five: on a loaded machine the caller hears of a step when many more are done."""


@pytest.fixture(scope="module")
def cluster(kept_steps):
    """A head and two nodes of one CPU, to which this process is connected."""
    found = RayCluster(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        ray.shutdown()
        found.close()
    assert wait_until(lambda: not ray_processes(found.address)), "processes of Ray remain"


def ray_processes(address: str) -> list[psutil.Process]:
    """Returns the processes of a cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(address in word for word in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
    return found


OTHERS = "it belongs to a process that serve did not start; --all ends it too"


def is_empty() -> bool:
    """Whether no rank runs and nothing of the cluster is leased."""
    return not workers() and not leased() and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@contextmanager
def killed_after(process: subprocess.Popen):
    """Kills a process in the end, with SIGKILL."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def opened(cluster):
    """Opens an executor by the user's strings, and closes it after the test: ``opened("replicas2", "ray")``."""
    found = []

    def open_one(plan: str, devices: str = "ray"):
        plan, devices, _ = resolve(plan, devices, Workload(48))
        found.append(open_executor(plan, devices))
        return found[-1]

    yield open_one
    for executor in found:
        executor.close()
    assert wait_until(lambda: not workers()), "ranks remain"


@pytest.mark.slow
def test_replicas_on_two_nodes_make_the_videos_of_a_batch_and_the_windows_of_a_long_one(opened, make_job, local):
    replicas = opened("replicas2")
    assert isinstance(replicas, ReplicasExecutor) and str(replicas.devices) == "ray:2"
    replicas.start()
    assert wait_until(lambda: all(replica.is_ready() for replica in replicas.replicas))
    batch, seen = make_job("5b", batch=3, **SMALL), []
    result = replicas.sample(batch, on_step=lambda *step: seen.append(step))
    assert (result.tensor - local.sample(batch).tensor).abs().max() <= TOLERANCE
    assert seen == [(step, 9) for step in range(1, 10)] and not result.report.notes
    windowed = make_job("5b", size=(48, 48, 33), steps=2, windows=Windows(17, 8))
    assert (replicas.sample(windowed).tensor - local.sample(windowed).tensor).abs().max() <= TOLERANCE
    assert len({replica.known["node_id"] for replica in replicas.replicas}) == 2
    assert wait_until(lambda: overview(replicas)["ranks"][0]["doing"] == "waiting for a job")
    shown = overview(replicas)
    assert [rank["share"] for rank in shown["ranks"]] == ["replica 1, all", "replica 2, all"]
    assert shown["state"] == "ready"


@pytest.mark.slow
def test_a_node_that_is_killed_and_one_that_is_added_lose_no_video_and_their_order(opened, cluster, make_job, local):
    jobs = [make_job("5b", size=(48, 48, 5), steps=6, seed=seed) for seed in range(10)]
    replicas, made, happened = opened("replicas3"), {}, []  # the third waits for a node
    replicas.start()
    assert wait_until(lambda: sum(replica.is_ready() for replica in replicas.replicas) == 2)

    def decode(number, sampled):
        return DecodeJob(jobs[number].model, sampled.tensor)

    def keep(number, sampled, decoded):
        made[number] = sampled, decoded
        if len(made) >= 3:  # so the others leave enough for the groups on the added nodes
            assert wait_until(lambda: all(replica.is_ready() for replica in replicas.replicas))

    def on_step(step, steps):
        if step >= 4 and not happened:
            victim = next(replica for replica in replicas.replicas if replica.is_ready())
            happened.append("killed")
            cluster.kill(victim.known["node_id"])
            for _ in range(2):
                cluster.add()

    replicas.make_all(jobs, decode, keep, on_step=on_step)
    assert sorted(made) == list(range(10))
    for number, job in enumerate(jobs):
        sampled, decoded = made[number]
        expected = local.sample(job).tensor
        assert (sampled.tensor - expected).abs().max() <= TOLERANCE
        assert (decoded.tensor - local.decode(decode(number, sampled)).tensor).abs().max() <= TOLERANCE
    notes = {note for sampled, _ in made.values() for note in sampled.report.notes}
    assert any(
        re.search(r"replica \d of 3 \(ray:1\) was lost, and the others do its work: the group on node", note) for note in notes
    )
    assert all(replica.status()["jobs"] > 0 for replica in replicas.replicas)  # the added nodes too


@pytest.mark.slow
def test_a_group_alone_goes_on_after_its_last_step_when_its_actor_was_killed(opened, make_job, local):
    job, killed = make_job("5b", size=(48, 48, 5), steps=STEPS), []
    group = opened("single")
    assert isinstance(group, ClusterExecutor)

    def kill_once(step, steps):
        if step >= 5 and not killed:
            killed.append(group.known["pid"])
            os.kill(killed[0], signal.SIGKILL)

    result = group.sample(job, on_step=kill_once)
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    done = int(re.search(r"the group on node \S+ was lost: .* went on after step (\d+)", note)[1])
    assert done >= 4 and len(result.report.step_seconds) == STEPS - done


@pytest.mark.slow
def test_a_group_over_two_nodes_gives_the_video_of_one_and_goes_on_when_a_rank_of_the_other_was_killed(opened, make_job, local):
    job, killed = make_job("5b", size=(48, 48, 5), steps=STEPS), []
    group = opened("ulysses2")
    before = set(workers())

    def kill_once(step, steps):
        if step >= 5 and not killed:
            (other,) = (pid for pid in set(workers()) - before if psutil.Process(pid).name() == "xdit rank 1")
            killed.append(other)
            os.kill(other, signal.SIGKILL)

    result = group.sample(job, on_step=kill_once)
    assert (result.tensor - local.sample(job).tensor).abs().max() <= TOLERANCE
    (note,) = result.report.notes
    assert re.search(r"lost: node \S+ \(\S+, rank 1\): rank 1 was killed by SIGKILL; .* went on after step \d+", note)
    assert len(group.status()["memory"]) == 2 and len({*workers()} - before) == 2


@pytest.mark.slow
def test_groups_that_serve_keeps_are_used_shown_and_stopped(opened, make_job, local, run):
    command = [sys.executable, "-m", "parallel_backend", "serve", "--devices", "ray", "--plan", "replicas2"]
    with killed_after(subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)) as serve:
        assert "serving plan replicas2 on the Ray cluster (set by the user); Ray's dashboard " in serve.stdout.readline()
        while "2 of 2 groups are up: on " not in (line := serve.stdout.readline()):
            assert line, "serve has ended"
        served = workers()
        done = run("serve", "--devices", "ray", "--plan", "single")
        assert done.returncode == 2 and "serve keeps plan replicas2 on the Ray cluster already" in done.stderr
        plan, _, reason = resolve("auto", "ray", Workload(48))
        assert (str(plan), reason) == ("replicas2", "the groups that serve keeps on Ray")
        batch = make_job("5b", batch=2, **SMALL)
        replicas = opened("replicas2")
        assert (replicas.sample(batch).tensor - local.sample(batch).tensor).abs().max() <= TOLERANCE
        replicas.close()
        assert sorted(workers()) == sorted(served) and replicas.is_usable()
        shown = run("status", "--ray").stdout
        assert re.search(r"^replicas2#1 .* serve$", shown, re.MULTILINE)
        assert re.search(r"^replicas2#2 .* ready .* serve$", shown, re.MULTILINE)
        assert re.search(r"^node \S+ \(\S+\): 0 GPUs, 1 CPUs$", shown, re.MULTILINE) and "Ray's dashboard" in shown
        stopped = run("stop", "--ray").stdout
        ended = re.findall(r"^ended plan replicas2#(\d)(?: after \d+ s and \d+ jobs)? \(Ray\)$", stopped, re.MULTILINE)
        assert ended == ["1", "2"]
        assert serve.wait(PATIENCE) == 0 and serve.stdout.read().endswith("no group is left\n")
    assert wait_until(is_empty) and not replicas.is_usable()


@pytest.mark.slow
def test_nothing_is_left_on_any_node_when_the_caller_was_killed(cluster, checkpoints, tmp_path, run):
    words = ["generate", "--model", checkpoints["5b"], "--prompt", "x", "--devices", "ray", "--plan", "ulysses2"]
    words += ["--width", 48, "--height", 48, "--frames", 5, "--steps", 900, "--output", tmp_path / "never.mp4"]
    command = [sys.executable, "-m", "parallel_backend", *map(str, words)]
    with killed_after(subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)) as caller:
        assert any("step 5/900" in line for line in caller.stderr), "the caller has ended"
        assert len(workers()) == 2
        (line,) = (line for line in run("stop", "--ray").stdout.splitlines() if line.endswith("on Ray goes on: " + OTHERS))
        assert line.startswith("plan ulysses2#1 on Ray ")
    assert wait_until(is_empty)


# ---- without a cluster ----


def test_the_address_of_rays_client_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    with pytest.raises(RequestError, match="RAY_ADDRESS is ray://10.0.0.1:10001, of Ray's client; run this on a node"):
        Devices.parse("ray")


def test_bench_times_what_runs_on_the_cluster_and_nothing_of_this_process(cluster, checkpoints, tmp_path, run, monkeypatch):
    """This process may have no GPU, or another kind."""
    monkeypatch.setattr(bench_table, "measured_peak", lambda device: pytest.fail("a GPU of this process is measured"))
    asked = ("bench", "--model", checkpoints["5b"], "--devices", "ray:1", "--plans", "single", "--repeat", 1)
    asked += ("--width", 48, "--height", 48, "--frames", 5, "--steps", 2, "--output", tmp_path / "rows.json")
    done = run(*asked, "--diffusers", "none")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["name"], row["plan"], row["device"], row["peak_tflops"]) == ("ours", "single", "cpu", None)
    for others in ((), ("--diffusers", "none", "--float32"), ("--diffusers", "none", "--xdit", "cfg2")):
        refused = run(*asked, *others)
        assert (
            refused.returncode == 2
            and "run in this process, not on 'ray:1': use --diffusers none, and neither of the others" in refused.stderr
        )
    monkeypatch.setattr("parallel_backend.executor.resolve.cluster.machine", lambda: KNOWN["H100"])
    assert bench_table.device_name(Devices("cuda", (0, 1), on_ray=True)) == "H100"


def test_an_address_where_nothing_listens_is_named_in_one_line_without_waiting_for_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *given, **settings: pytest.fail("Ray tries for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RequestError, match="no Ray cluster answers at '127.0.0.1:1' (.*refused.*); start one") as found:
        Devices.parse("ray")
    assert "\n" not in str(found.value)


def test_an_actor_imports_the_pack_of_its_node_whatever_its_caller_calls_it(monkeypatch):
    monkeypatch.setattr(cluster_actor, "devices_here", lambda: Devices("cpu"))
    parent = types.ModuleType("as_in_comfyui")
    parent.__path__ = [str(REPO)]
    monkeypatch.setitem(sys.modules, "as_in_comfyui", parent)
    sent = cloudpickle.dumps(importlib.import_module("as_in_comfyui.parallel_backend.cluster.actor").actor_class())
    for name in [name for name in sys.modules if name.partition(".")[0] == "as_in_comfyui"]:
        monkeypatch.delitem(sys.modules, name)
    actor = pickle.loads(sent)("Ranks", "cfg2")
    assert type(actor.held) is cluster_actor.Ranks and str(actor.held.devices) == "cpu:1"


def test_an_actor_leaves_the_cores_of_the_others_on_its_node_alone(monkeypatch):
    known = {"get_runtime_context": lambda: types.SimpleNamespace(get_node_id=lambda: "b")}
    nodes = [{"NodeID": "a", "Resources": {"CPU": 9.0}}, {"NodeID": "b", "Resources": {"CPU": 4.0, "GPU": 2.0}}]
    monkeypatch.setattr(actor_module, "connect", lambda: types.SimpleNamespace(nodes=lambda: nodes, **known))
    for resource, expected in (("CPU", Devices("cpu", (0,), others=3)), ("GPU", Devices("cuda", (0,), others=1))):
        bundles = types.SimpleNamespace(bundle_specs=[{resource: 1.0}] * 2)
        monkeypatch.setattr(ray.util, "get_current_placement_group", lambda bundles=bundles: bundles)
        assert actor_module.devices_here() == expected


@pytest.fixture
def unmade(monkeypatch):
    """An executor whose actor is up, on a node where no group can be made."""
    monkeypatch.setattr(cluster_actor, "devices_here", lambda: Devices("cpu"))
    monkeypatch.setattr(preflight, "has_module", lambda name: False)
    held, executor = cluster_actor.Group("single"), ClusterExecutor("single#1", is_owner=False)
    executor._lease = types.SimpleNamespace(dead=None, known={"node": "b"}, is_up=lambda seconds: True, look=held.look)
    return executor


NO_GROUP = "xfuser is not installed: pip install xfuser, or set XDIT_PYTHON to a Python that has it"


def test_a_group_that_cannot_be_made_on_its_node_is_said_to_have_failed_and_why(unmade, run, monkeypatch):
    failed = {"plan": "single", "devices": "ray:1", "node": "b", "ranks": [], "state": "failed", "last_error": NO_GROUP}
    assert overview(unmade) == unmade.status() == failed
    monkeypatch.setattr(status, "groups_on_cluster", lambda: {"single#1": unmade})
    monkeypatch.setattr(status.cluster, "nodes", list)
    shown = run("status", "--ray").stdout
    assert re.search(r"^single#1 +b +failed .* serve$", shown, re.MULTILINE)
    assert f"logs of single#1 on b: on its node, and in Ray's dashboard, last error {NO_GROUP}\n" in shown
    assert serve.line_of([failed, {**failed, "state": "ready"}]) == f"1 of 2 groups are up: on b; 1 failed: {NO_GROUP}"


def test_a_group_that_was_made_has_not_failed_where_one_look_at_it_does(monkeypatch):
    def broken(executor):
        raise OSError("one look")

    monkeypatch.setattr(cluster_actor, "devices_here", lambda: Devices("cpu"))
    held = cluster_actor.Group("single")
    assert held.look()["state"] == "absent"
    monkeypatch.setattr(cluster_actor, "overview", broken)
    with pytest.raises(OSError, match="one look"):  # serve would end a group that has failed
        held.look()
    held.group.close()


def test_replicas_say_why_one_of_them_failed(unmade):
    other = ClusterExecutor("replicas2#2", is_owner=False)
    both = ReplicasExecutor(Plan(replicas=2), Devices("cpu", (0, 1), on_ray=True), [other, unmade])
    shown = overview(both)
    assert (shown["state"], shown["last_error"]) == ("failed", f"replica 2: {NO_GROUP}")


def test_an_actor_that_ray_cannot_start_is_said_to_have_failed_and_why_and_one_that_was_ended_is_not():
    executor, dead = ClusterExecutor("single#1"), {"dead": "no module named diffusers", "known": {}, "end": lambda: None}
    executor._lease = types.SimpleNamespace(**dead, was_lost=False)
    for _ in range(2):  # it is given up at the first look
        shown = executor.look()
        assert (shown["state"], shown["last_error"]) == ("failed", f"plan 'single' does not run on Ray: {dead['dead']}")
    executor._lease = types.SimpleNamespace(**dead, was_lost=True)  # by stop: Ray starts others again
    assert executor.look()["state"] == "absent"


def test_serve_ends_with_the_reason_where_every_group_failed(unmade, run, monkeypatch):
    monkeypatch.setattr(unmade, "start", lambda expected=None: None)
    monkeypatch.setattr(serve, "cluster_executor", lambda *given, **settings: unmade)
    monkeypatch.setattr(serve, "served", list)
    monkeypatch.setattr(serve, "dashboard_line", lambda: "no dashboard")
    monkeypatch.setattr(serve, "resolve", lambda *given, **settings: (Plan(), Devices("cpu", on_ray=True), "a test"))
    ended = run("serve", "--devices", "ray", "--plan", "single")
    assert (ended.returncode, ended.stderr) == (1, f"serve: no group is left: {NO_GROUP}\n")
