"""What a group survives: ``make soak`` prints three tables.

Every rank, the supervisor and the fork server killed or stopped at every moment of a job; thousands of messages that are none; hundreds of
jobs in a row with cancels among them. On CPU processes and a small model with random weights.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Client
from pathlib import Path

import psutil
import torch

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.errors import Cancelled
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.group import codec, protocol
from parallel_backend.group.job_fields import split_fields
from parallel_backend.jobs import DecodeJob, SampleJob, empty_latent
from parallel_backend.model import Model
from parallel_backend.plan import Plan

from .invalid_messages import invalid_bytes, parts
from .random_weights import build

MOMENTS = ("starting", "loading", "first step", "middle step", "last step", "decoding", "idle")
STEPS = 30


def job_of(checkpoint: Checkpoint, *, size=(240, 160, 17), steps: int = STEPS, seed: int = 3, **settings) -> SampleJob:
    """A sampling job on random text."""
    width, height, frames = size
    shape = (1, checkpoint.text_tokens, checkpoint.text_features)
    positive, negative = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    latent = empty_latent(width=width, height=height, frames=frames)
    return SampleJob(Model(str(checkpoint.path)), positive, latent, negative, seed=seed, steps=steps, **settings)


def processes(group: GroupExecutor) -> dict[str, psutil.Process]:
    """Returns the fork server, the supervisor and the ranks that run, by name."""
    process, ranks = group._launcher.process, group.address.describe().get("ranks", ())
    found = {"fork server": process.server.process.pid, "supervisor": process.pid}
    found |= {f"rank {rank}": pid for rank, pid in enumerate(ranks)}
    return {name: psutil.Process(pid) for name, pid in found.items() if pid and psutil.pid_exists(pid)}


def wait_for(condition, seconds: float = 120) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come")
        time.sleep(0.001)


class Attack:
    """Sends one signal to one process of a group at one moment.

    Args:
        group: whose process it is.
        victim: ``fork server``, ``supervisor`` or ``rank N``.
        how: the signal.
    """

    def __init__(self, group: GroupExecutor, victim: str, how: int):
        self.group, self.victim, self.how = group, victim, how
        self.at: float | None = None

    def strike(self) -> None:
        """Sends it, once."""
        if self.at is None:
            self.at = time.monotonic()
            processes(self.group)[self.victim].send_signal(self.how)

    def strike_when(self, doing: str) -> None:
        """Sends it when the ranks say that they do something."""

        def wait() -> None:
            wait_for(lambda: doing in (self.group.stage() or ""))  # of the group that the job starts, if there is none
            self.strike()

        threading.Thread(target=wait, daemon=True).start()


def survive(moment: str, victim: str, how: int, group: GroupExecutor, checkpoint: Checkpoint, expected: dict) -> str:
    """Runs a job with an attack in it. Returns what became of it, for the table."""
    attack, job = Attack(group, victim, how), job_of(checkpoint)
    decode = DecodeJob(job.model, expected["latent"])
    began = time.monotonic()
    if moment == "starting":
        group.close()
        group.start()
        wait_for(lambda: victim in processes(group))
        attack.strike()
    else:
        group.sample(job_of(checkpoint, steps=1))
    if moment == "idle":
        attack.strike()
        if how == signal.SIGKILL:
            time.sleep(1)
        else:
            wait_for(lambda: not group._launcher.is_running(), 30)
    if moment == "loading":
        group.free()
        attack.strike_when("reading weights")
    if moment == "decoding":
        attack.strike_when("decode")
        result, wanted = group.decode(decode), expected["frames"]
    else:
        strike_at = {"first step": 1, "middle step": STEPS // 2, "last step": STEPS - 1}.get(moment)
        result = group.sample(job, on_step=lambda step, _: attack.strike() if step == strike_at else None)
        wanted = expected["latent"]
    difference = (result.tensor - wanted).abs().max().item()
    if difference > 1e-4:
        return f"WRONG: differs by {difference:.1e}"
    if attack.at is None:
        return f"MISSED: nothing was hit while {moment}"
    notes = [note.partition(";")[0] for note in result.report.notes]
    return f"{time.monotonic() - began:.0f} s, differs by {difference:.0e}; {'; '.join(notes) or 'a new group, no job was hit'}"


def kills(checkpoint: Checkpoint, plan: str, moments: Sequence[str]) -> int:
    """The first table. Returns in how many rows something is wrong."""
    bad = 0
    parsed = Plan.parse(plan)
    local = LocalExecutor(torch.device("cpu"))
    latent = local.sample(job_of(checkpoint)).tensor
    expected = {"latent": latent, "frames": local.decode(DecodeJob(Model(str(checkpoint.path)), latent)).tensor}
    print(f"\n| plan {plan}: hit | signal | moment | what became of the job |\n|---|---|---|---|", flush=True)
    group = GroupExecutor(parsed, Devices("cpu", tuple(range(parsed.world_size))))
    victims = [*(f"rank {rank}" for rank in range(parsed.world_size)), "supervisor", "fork server"]
    try:
        for moment in moments:
            for victim in victims:
                for how in (signal.SIGKILL, signal.SIGSTOP):
                    if not victim.startswith("rank") and how == signal.SIGSTOP:
                        continue  # they do nothing while a job runs
                    before = set(processes(group).values()) if group._launcher.process else set()
                    said = survive(moment, victim, how, group, checkpoint, expected)
                    now = set(processes(group).values())
                    left = [process.pid for process in before - now if process.is_running() and process.status() != "zombie"]
                    print(f"| {victim} | {how.name} | {moment} | {said}{f'; LEFT {left}' if left else ''} |", flush=True)
                    bad += bool(left) or said.startswith(("WRONG", "MISSED"))
    finally:
        group.close()
    return bad


def messages(checkpoint: Checkpoint, count: int) -> None:
    """The second table."""
    rng = random.Random(0)
    group = GroupExecutor(Plan(cfg=2), Devices("cpu", (0, 1)))
    job = job_of(checkpoint, size=(64, 48, 9), steps=1)
    plain, tensors = split_fields(job)
    valid = codec.encode(codec.Message(job.kind, plain, tensors))
    not_finite = codec.encode(codec.Message(job.kind, plain, {**tensors, "positive": job.positive * float("nan")}))
    answers: dict[str, int] = {}
    try:
        expected = group.sample(job).tensor
        before = processes(group)["rank 0"].memory_info().rss
        for number in range(count):
            data = not_finite if number % 500 == 0 else invalid_bytes(rng, valid)
            with Client(group.address.socket, family="AF_UNIX", authkey=group.address.key) as connection:
                try:
                    for part in parts(rng, data):
                        connection.send_bytes(part)
                    if not connection.poll(60):
                        raise TimeoutError(f"no answer to message {number}")
                    while (answer := protocol.receive(connection)).kind == "step":
                        pass
                    said = f"{answer.kind}: {answer.plain.get('error', '')}"
                except (EOFError, ConnectionError):
                    said = "dropped"
            answers[said] = answers.get(said, 0) + 1
        after = processes(group)["rank 0"].memory_info().rss
        same = torch.equal(group.sample(job).tensor, expected)
    finally:
        group.close()
    print("\n| answer to a message that is none | times |\n|---|---|")
    for said, times in sorted(answers.items(), key=lambda item: -item[1]):
        print(f"| {said} | {times} |")
    print(
        f"\n{count} messages: memory of rank 0 grew by {(after - before) / 2**20:.1f} MiB; a valid job afterwards: {same}",
        flush=True,
    )


def jobs(checkpoint: Checkpoint, count: int) -> None:
    """The third table."""
    rng = random.Random(1)
    sizes = [(64, 48, 9), (96, 64, 17), (80, 48, 5), (160, 96, 13)]
    print("\n| plan | jobs | cancelled | steps after a cancel, most | memory MiB, start to end | files open | processes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for plan in ("cfg2", "ulysses2"):
        group = GroupExecutor(Plan.parse(plan), Devices("cpu", (0, 1)))
        cancelled, late, figures = 0, 0, []
        try:
            for number in range(count // 2):
                steps, stop_at = rng.randrange(2, 12), rng.choice([None, None, rng.randrange(1, 10)])
                seen: list[int] = []
                job = job_of(
                    checkpoint, size=rng.choice(sizes), steps=steps, seed=number, scheduler=rng.choice(["ddim", "dpm"]),
                    cfg=rng.choice([1.0, 6.0]),
                )  # fmt: skip
                try:
                    group.sample(
                        job,
                        on_step=lambda step, _: seen.append(step),  # noqa: B023
                        should_stop=lambda: stop_at is not None and len(seen) >= stop_at,  # noqa: B023
                    )
                except Cancelled:
                    cancelled += 1
                    late = max(late, seen[-1] - stop_at)
                if number in (count // 4, count // 2 - 1):  # the first half warms up
                    alive = processes(group).values()
                    memory, files = sum(one.memory_info().rss for one in alive), sum(one.num_fds() for one in alive)
                    figures.append((memory / 2**20, files, len(psutil.Process().children(recursive=True))))
        finally:
            group.close()
        (memory, files, alive), (memory2, files2, alive2) = figures
        print(
            f"| {plan} | {count // 2} | {cancelled} | {late} | {memory:.0f} to {memory2:.0f} | {files} to {files2} | {alive} to {alive2} |",
            flush=True,
        )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", default="cfg2,ulysses2", help="of the first table")
    parser.add_argument("--moments", default=",".join(MOMENTS), help=f"of the first table (default: {','.join(MOMENTS)})")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=200)
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(build(Path(folder) / "5b", like="5b"))
        bad = sum(kills(checkpoint, plan, args.moments.split(",")) for plan in filter(None, args.plans.split(",")))
        if args.messages:
            messages(checkpoint, args.messages)
        if args.jobs:
            jobs(checkpoint, args.jobs)
    if bad:
        sys.exit(f"{bad} rows are wrong")


if __name__ == "__main__":
    main()
