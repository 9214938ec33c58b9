"""Fixtures that the tests share: checkpoints, prompts, jobs, groups and commands."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

# Set before torch is imported: with the default, spinning threads make a test fifty times slower if another program runs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# For the workers and for what tests start: with its defaults glibc gives the memory of each large tensor back, and the kernel clears it
# again for the next one, which is a quarter of the time of a VAE.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1073741824")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "1073741824")
# Keeps groups and caches of the tests out of the user's own folders, and other groups of the user out of the tests. The path is short, as
# those of sockets may have 107 bytes.
os.environ["XDIT_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="xdit-", dir="/tmp")
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["XDIT_RUNTIME_DIR"], "cache")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other core belongs to the other worker

import psutil
import pytest
import torch
import torch.nn.functional as F

from benchmarks.random_weights import LIKES, build
from parallel_backend.cli.console import quiet_libraries
from parallel_backend.cli.parser import main
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.devices import Devices
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.group.registry import GroupAddress
from parallel_backend.jobs import SampleJob, empty_latent
from parallel_backend.model import Lora, Model
from parallel_backend.plan import Plan

from .support import core_files
from .support.comfy_runtime import NODES, ComfyRuntime
from .support.comfyui_server import find_comfyui
from .support.lora_files import fun_layout, random_change, write
from .support.single_files import save_as

REPO = Path(__file__).resolve().parents[1]
PROMPT, NEGATIVE = "a red circle moves left over a blue city at night", "rain"
PATIENCE = 180
"""Seconds after which a test gives up. It is long, because a loaded machine is slow and only a failing test waits this long."""
TOLERANCE = 1e-4
"""The largest difference that the project allows between plans, and between itself and diffusers, in float32."""


LONG = (
    "comfyui",
    "ray",
    "browser",
    "supervision",
    "command_line",
    "parallel",
    "workflows",
    "group",
    "demo",
    "sharding",
    "pipefusion",
    "targets",
    "speed",
    "controlnet",
    "connection",
    "host",
    "upscaling",
    "replicas",
    "conditions",
    "core_parts",
    "removal",
    "vae",
    "quantized",
    "cancel",
    "download_node",
    "parity_with_diffusers",
)
"""The slowest test files, slowest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts slow files first, so that none is left to run alone at the end."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Has the test files be imported without garbage collections, which take a quarter of the time and find nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_unconfigure() -> None:
    """Lets the interpreter clear what was frozen, or Triton's bindings report it as leaked. Removes the tests' own folders."""
    gc.unfreeze()
    shutil.rmtree(os.environ["XDIT_RUNTIME_DIR"], ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Reports last what failed, with the beginning of each message: a CI may show its last lines alone, and hundreds of tests are skipped."""
    report_workflows(terminalreporter)
    result = yield
    for outcome in ("failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message[:800] if crash else report.longreprtext[-800:]
            terminalreporter.write_line(f"{outcome} in {report.when} of {report.nodeid}: {message}")
    return result


def report_workflows(terminalreporter) -> None:
    """Reports how the tests of the shipped workflows ended on comfy-runtime and on a real ComfyUI, if they ran."""
    places = {
        "test_workflows": "comfy-runtime",
        "test_comfyui": f"the ComfyUI at {find_comfyui()}" if find_comfyui() else "no ComfyUI",
    }
    for stem, place in places.items():
        counts = {
            outcome: sum(
                Path(report.nodeid.partition("::")[0]).stem == stem for report in terminalreporter.stats.get(outcome, ())
            )
            for outcome in ("passed", "failed", "error", "skipped")
        }
        if any(counts.values()):
            said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
            terminalreporter.write_line(f"workflows on {place}: {said}")


@pytest.fixture(scope="session", autouse=True)
def frozen_modules():
    """Has the garbage collector leave out what was imported for all test files. The engine collects garbage whenever it lets weights go, and with
    the objects of all imported modules that takes a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def kept_steps():
    """Has groups send every step's state to their callers. So the ranks wait for a test that is late to kill or cancel them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDIT_KEEP_SECONDS", "1e-9")
        yield


@pytest.fixture
def configure(monkeypatch) -> Callable[..., None]:
    """Changes settings as one module of this process sees them: ``configure(launcher, hello_seconds=1.0)``."""

    def change(module, **settings) -> None:
        monkeypatch.setattr(module, "CONFIG", replace(module.CONFIG, **settings))

    return change


class MadeWhenAsked(Mapping):
    """A value for each of LIKES, made on first use and then kept."""

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
    """Small pipelines with random weights: like 2b (sincos), 5b (rotary), 1.5 (two-frame tokens), and for each task."""
    quiet_libraries()  # their progress bars would be captured as output of the test
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
def loras(checkpoints, tmp_path_factory) -> Mapping[str, str]:
    """A LoRA file for each checkpoint, with CogVideoX-Fun's names."""
    root = tmp_path_factory.mktemp("loras")
    return MadeWhenAsked(
        lambda like: write(root / f"{like}.safetensors", fun_layout(random_change(checkpoints[like]), alpha=4.0))
    )


@pytest.fixture(scope="session")
def transformer_files(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Transformers of CogVideoX 1.5 as single files, under the core's names."""
    root = tmp_path_factory.mktemp("files")
    return {like: save_as(checkpoints[like], root / f"{like}.safetensors", "core") for like in ("1.5-5b", "1.5-5b-i2v")}


class Broken(list):
    """The reason why a shared fixture failed. It is taken out by the first test that fails with it."""


def made(found):
    """Returns a shared fixture's value. If it is :class:`Broken`, one test fails with one line and the others are skipped."""
    if isinstance(found, Broken):
        if found:
            pytest.fail(found.pop(), pytrace=False)
        pytest.skip("what this test needs is broken: see the first test that needed it")
    return found


@pytest.fixture(scope="session")
def made_core_models(checkpoints, tmp_path_factory) -> dict[str, core_files.CoreFiles] | Broken:
    try:
        return core_files.make(checkpoints, tmp_path_factory.mktemp("core"))
    except OSError as error:
        return Broken([f"the ComfyUI at {find_comfyui()} is not whole: {error}"])


@pytest.fixture
def core_models(made_core_models) -> dict[str, core_files.CoreFiles]:
    """Small models in files for ComfyUI's own loaders. Needs a ComfyUI."""
    return made(made_core_models)


@pytest.fixture(scope="session")
def make_job(checkpoints, texts, loras, transformer_files) -> Callable[..., SampleJob]:
    """Makes a sampling job: ``make_job("5b", size=(96, 64, 17), batch=1, steps=8, lora=0.5, in_one_file=True, …)``."""

    def make(like: str, *, size=(96, 64, 17), batch=1, steps=8, seed=3, in_one_file=False, **settings) -> SampleJob:
        width, height, frames = size
        positive, negative = texts[like]
        path = checkpoints[like]
        if in_one_file:  # the core's layout, with the number of tokens of the published models
            path = transformer_files[like]
            positive, negative = (F.pad(text, (0, 0, 0, 226 - text.shape[1])) for text in (positive, negative))
        positive, negative = (
            in_turn(text, settings.get(f"{side}_starts")) for side, text in (("positive", positive), ("negative", negative))
        )
        latent = settings.pop("latent", None)
        if latent is None:
            latent = empty_latent(width=width, height=height, frames=frames, batch=batch)
        added = (Lora(loras[like], settings.pop("lora")),) if "lora" in settings else ()
        model = settings.pop("model", Model(str(path), loras=added))
        return SampleJob(model, positive, latent, negative, seed=seed, steps=steps, **settings)

    return make


def in_turn(text: torch.Tensor, starts: tuple[float, ...] | None) -> torch.Tensor:
    """Returns text states, or with starts those of several prompts: the first, half of it, a third of it, and so on."""
    return torch.stack([text / (place + 1) for place in range(len(starts))], dim=1) if starts else text


def demo_job(width: int, height: int, frames: int, **settings) -> SampleJob:
    """Returns a job for the demo. Its steps resemble each other; those of random weights differ too much for some tests."""
    checkpoint = Checkpoint.open(bundled.find(bundled.DEMO))
    encoder = TextEncoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    positive, negative = (encoder.encode([encoder.tokenize(text)]) for text in ("a red circle moves left", NEGATIVE))
    latent = empty_latent(width=width, height=height, frames=frames)
    return SampleJob(Model(str(checkpoint.path)), positive, latent, negative, seed=1, scheduler="ddim", **settings)


@pytest.fixture(scope="session")
def local() -> LocalExecutor:
    """An executor in the test's own process."""
    return LocalExecutor(torch.device("cpu"))


@pytest.fixture
def start_group():
    """Starts groups on the CPU and closes them after the test: ``start_group("cfg2")``."""
    started = []

    def start(plan: str) -> GroupExecutor:
        parsed = Plan.parse(plan)
        executor = GroupExecutor(parsed, Devices("cpu", tuple(range(parsed.world_size))))
        started.append(executor)
        return executor

    yield start
    for executor in started:
        executor.close()


@pytest.fixture(scope="session")
def comfy_runtime(checkpoints, tmp_path_factory):
    """The pack on comfy-runtime."""
    runtime = ComfyRuntime(tmp_path_factory.mktemp("comfy-runtime"), checkpoints["5b"])
    yield runtime
    runtime.close()


@pytest.fixture
def in_comfyui(comfy_runtime) -> Callable[[str], tuple[dict, str]]:
    """Runs code in a process where the pack is loaded. Returns what it shows and the log."""
    return comfy_runtime.run


@pytest.fixture
def nodes(in_comfyui, checkpoints):
    """Runs code that uses the nodes with small models named ``text_model`` and ``image_model``."""
    paths = f"text_model, image_model = {str(checkpoints['5b'])!r}, {str(checkpoints['5b-i2v'])!r}\n"
    return lambda code: in_comfyui(NODES + paths + code)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command line in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "parallel_backend", *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@dataclass
class Done:
    """The exit status and output of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys) -> Callable[..., Done]:
    """Runs a command in this process: for most commands another import of torch takes longer than the command."""

    def run_main(*arguments) -> Done:
        capsys.readouterr()
        status = main(list(map(str, arguments)))
        return Done(status, *capsys.readouterr())

    return run_main


def workers() -> list[int]:
    """Returns the process IDs of all ranks of this test run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_rank = process.name().startswith("xdit rank")
            if is_rank and process.environ().get("XDIT_RUNTIME_DIR") == os.environ["XDIT_RUNTIME_DIR"]:
                found.append(process.pid)
    return found


def is_alive(pid: int) -> bool:
    """Returns whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def rank_processes(address: GroupAddress) -> dict[int, int]:
    """Returns the process IDs of a group's ranks, by rank."""
    description = address.describe()
    return dict(enumerate(description["ranks"], description["first_rank"]))


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Waits for a condition. Returns whether it became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
