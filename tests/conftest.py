"""Checkpoints, prompts and groups that the tests share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Before torch: threads that spin as long as they do by default make a test fifty times slower beside another program.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch

from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.cogvideox.random_weights import LIKES, build
from parallel_backend.cogvideox.text import TextEncoder
from parallel_backend.devices import Devices
from parallel_backend.group.client import GroupExecutor
from parallel_backend.jobs import Model, SampleJob, empty_latent
from parallel_backend.local import LocalExecutor
from parallel_backend.plans import Plan

REPO = Path(__file__).resolve().parents[1]
PROMPT, NEGATIVE = "a red circle moves left over a blue city at night", "rain"
TOLERANCE = 1e-4
"""What the project promises between plans, and between itself and diffusers, in float32."""


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory):
    """Groups and caches of the tests stay out of the person's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class MadeWhenAsked(Mapping):
    """One value for each of LIKES, made when it is first asked for and then kept."""

    def __init__(self, make: Callable[[str], object]):
        self._make, self._made = make, {}

    def __getitem__(self, like: str):
        if like not in LIKES:
            raise KeyError(like)
        if like not in self._made:
            self._made[like] = self._make(like)
        return self._made[like]

    def __iter__(self):
        return iter(LIKES)

    def __len__(self) -> int:
        return len(LIKES)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Mapping[str, Path]:
    """Small pipelines with random weights: like 2b (sincos), 5b (rotary), 1.5 (two-frame tokens), and what each takes."""
    root = tmp_path_factory.mktemp("checkpoints")
    return MadeWhenAsked(lambda like: build(root / like, like=like))


@pytest.fixture(scope="session")
def texts(checkpoints) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    """Text states of PROMPT and NEGATIVE for each checkpoint."""

    def encode(like: str) -> tuple[torch.Tensor, torch.Tensor]:
        encoder = TextEncoder(Checkpoint.open(checkpoints[like]), device=torch.device("cpu"), dtype=torch.float32)
        return tuple(encoder.encode([encoder.tokenize(text)]) for text in (PROMPT, NEGATIVE))

    return MadeWhenAsked(encode)


@pytest.fixture(scope="session")
def make_job(checkpoints, texts) -> Callable[..., SampleJob]:
    """Makes a sampling job: ``make_job("5b", size=(96, 64, 17), batch=1, steps=8, …)``."""

    def make(like: str, *, size=(96, 64, 17), batch=1, steps=8, seed=3, **settings) -> SampleJob:
        width, height, frames = size
        positive, negative = texts[like]
        latent = settings.pop("latent", None)
        if latent is None:
            latent = empty_latent(width=width, height=height, frames=frames, batch=batch)
        model = settings.pop("model", Model(str(checkpoints[like])))
        return SampleJob(model, positive, latent, negative, seed=seed, steps=steps, **settings)

    return make


@pytest.fixture(scope="session")
def local() -> LocalExecutor:
    """The executor of the test's own process."""
    return LocalExecutor(torch.device("cpu"))


@pytest.fixture
def start_group():
    """Starts groups on the CPU and ends them with the test: ``start_group("cfg2")``."""
    started = []

    def start(plan: str) -> GroupExecutor:
        parsed = Plan.parse(plan)
        executor = GroupExecutor(parsed, Devices("cpu", tuple(range(parsed.world_size))))
        started.append(executor)
        return executor

    yield start
    for executor in started:
        executor.close()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command line."""
    return subprocess.run(
        [sys.executable, "-m", "parallel_backend", *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def workers() -> list[int]:
    """Process numbers of every worker that belongs to this test run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        mine = os.environ["XDG_RUNTIME_DIR"].encode()
        if b"parallel_backend.group.worker" in words and any(word.startswith(mine) for word in words):
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether a condition became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
