"""A Ray cluster of CPU nodes on this machine: `python -m benchmarks.cluster`, from the repository's root, prints four tables.

Every plan over nodes, compared with `single`; many videos over three nodes, of which one is killed and one added in the middle; what is left
after the caller was killed; jobs in a row, with the memory of all processes. On a small model with random weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import torch
from ray.cluster_utils import Cluster

from parallel_backend.cluster.nodes import connect
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.base import Executor
from parallel_backend.executor.factory import open_executor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import SampleJob
from parallel_backend.plan import Plan

from .random_weights import build
from .soak import job_of

PLANS = {
    (1, 1): ("cfg2", "ulysses2", "ring2", "tensor2", "cfg2-fsdp2", "pipefusion2", "replicas2"),
    (2, 2): ("cfg2-ulysses2", "ulysses2-ring2", "cfg2-tensor2", "cfg2-ulysses2-fsdp4", "replicas2-cfg2"),
    (1, 1, 1): ("ring3", "replicas3"),
}
"""Plans by the CPUs of the nodes that they are over."""
STORE = 100 * 2**20
RUN = "XDG_RUNTIME_DIR"
"""A variable of this run's processes."""
SMALL = {"size": (64, 48, 9), "steps": 4}


@contextmanager
def cluster_of(*sizes: int) -> Iterator[Cluster]:
    """A head without devices and nodes of so many CPUs, to which this process is connected within."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    )
    try:
        for size in sizes:
            cluster.add_node(num_cpus=size, object_store_memory=STORE)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        connect().shutdown()
        cluster.shutdown()


@contextmanager
def opened(plan: str) -> Iterator[Executor]:
    """An executor on the cluster."""
    parsed = Plan.parse(plan)
    executor = open_executor(parsed, Devices("cpu", tuple(range(parsed.world_size)), on_ray=True))
    try:
        executor.start()
        yield executor
    finally:
        executor.close()


def differs(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns the largest difference."""
    return (first - second).abs().max().item()


def parity(checkpoint: Checkpoint, local: LocalExecutor) -> None:
    """The first table."""
    job = job_of(checkpoint, **SMALL, pipefusion_warmup=4)  # all steps of pipefusion2 are exact
    expected = local.sample(job).tensor
    print("\n| plan | CPUs of the nodes | largest difference from `single` |\n|---|---|---|", flush=True)
    for sizes, plans in PLANS.items():
        with cluster_of(*sizes):
            for plan in plans:
                with opened(plan) as executor:
                    print(
                        f"| {plan} | {', '.join(map(str, sizes))} | {differs(executor.sample(job).tensor, expected):.1e} |",
                        flush=True,
                    )


def videos(checkpoint: Checkpoint, local: LocalExecutor, count: int) -> None:
    """The second table."""
    jobs: list[SampleJob] = [job_of(checkpoint, size=SMALL["size"], steps=12, seed=seed) for seed in range(count)]
    killed: list[float] = []
    with cluster_of(1, 1, 1) as cluster, opened("replicas3") as executor:
        while not all(replica.is_ready() for replica in executor.replicas):
            time.sleep(0.1)

        def on_step(step: int, steps: int) -> None:
            if step > steps // 8 and not killed:
                killed.append(time.monotonic())
                victim = executor.replicas[0].known["node_id"]
                node = next(each for each in cluster.worker_nodes if each.node_id == victim)
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=1, object_store_memory=STORE)

        began = time.monotonic()
        results = executor.sample_all(jobs, on_step=on_step)
        seconds = time.monotonic() - began
        while not executor.replicas[0].is_ready():
            time.sleep(0.1)
        each = [one.get("jobs", 0) for one in executor.status()["replicas"]]
    worst = max(differs(result.tensor, local.sample(job).tensor) for result, job in zip(results, jobs))
    lost = sorted({note.partition(",")[0] for result in results for note in result.report.notes})
    print(
        "\n| videos | seconds | largest difference from `single`, in order | done by each replica's last group | notes |\n|---|---|---|---|---|"
    )
    print(f"| {count} | {seconds:.0f} | {worst:.1e} | {each} | {'; '.join(lost)} |", flush=True)


def killed(checkpoint: Checkpoint, times: int) -> None:
    """The third table."""
    prompts, (width, height, frames) = checkpoint.path.parent / "prompts.txt", SMALL["size"]
    prompts.write_text("a\nb\nc\n")
    words = f"generate --model {checkpoint.path} --prompts-file {prompts} --devices ray --output never.mp4".split()
    words += f"--steps 900 --width {width} --height {height} --frames {frames}".split()
    print(
        "\n| plan of a caller that gets SIGKILL | processes on the nodes before | seconds until none is left |\n|---|---|---|",
        flush=True,
    )
    with cluster_of(1, 1, 1):
        for plan in ("replicas3", "ring3") * times:
            command = [sys.executable, "-m", "parallel_backend", *words, "--plan", plan]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as caller:
                next(line for line in caller.stderr if line.startswith("step 30/"))
                before = len(ours())
                caller.kill()
            began = time.monotonic()
            while ours():
                time.sleep(0.05)
            print(f"| {plan} | {before} | {time.monotonic() - began:.1f} |", flush=True)


def ours() -> list[psutil.Process]:
    """Returns the actors of groups, and the groups' processes, on all nodes."""
    return list(filter(is_ours, psutil.process_iter()))


def is_ours(process: psutil.Process) -> bool:
    """Whether a process runs, belongs to a group, and was started by this program or what that started."""
    with suppress(psutil.Error):
        if process.name().startswith(("ray::XDiTGroup", "xdit ")) and process.status() != psutil.STATUS_ZOMBIE:
            return process.environ().get(RUN) == os.environ[RUN]
    return False


def growth(checkpoint: Checkpoint, count: int) -> None:
    """The fourth table."""
    job = job_of(checkpoint, **SMALL)
    print(
        "\n| jobs | memory of the caller MiB | of Ray's and the group's processes MiB | open files | processes |\n|---|---|---|---|---|"
    )
    with cluster_of(1, 1), opened("cfg2") as executor:
        for number in range(1, count + 1):
            executor.sample(job)
            if number in (count // 4, count // 2, count):
                here, others = psutil.Process(), processes()
                memory = sum(sizes_of(others, lambda one: one.memory_info().rss))
                files = sum(sizes_of([here, *others], lambda one: one.num_fds()))
                print(
                    f"| {number} | {here.memory_info().rss / 2**20:.0f} | {memory / 2**20:.0f} | {files} | {len(others)} |",
                    flush=True,
                )


def processes() -> list[psutil.Process]:
    """Returns the processes of Ray and of the groups."""
    return psutil.Process().children(recursive=True)


def sizes_of(found: list[psutil.Process], size) -> Iterator[int]:
    """Yields a figure of each process that has not ended meanwhile."""
    for process in found:
        with suppress(psutil.Error):
            yield size(process)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3, help="of a caller, for each plan")
    parser.add_argument("--tables", default="parity,videos,killed,growth")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RUN] = folder
        checkpoint = Checkpoint.open(build(Path(folder) / "5b", like="5b"))
        local = LocalExecutor(torch.device("cpu"))
        tables = {
            "parity": partial(parity, checkpoint, local),
            "videos": partial(videos, checkpoint, local, args.videos),
            "killed": partial(killed, checkpoint, args.kills),
            "growth": partial(growth, checkpoint, args.jobs),
        }
        for name in args.tables.split(","):
            tables[name]()


if __name__ == "__main__":
    main()
