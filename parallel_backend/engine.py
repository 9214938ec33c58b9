"""What runs a job on one rank: the same code in the caller's process and in every worker of a group."""

import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .cogvideox import memory, vae, weights
from .cogvideox.checkpoint import Checkpoint
from .cogvideox.denoise import StepCallback, denoise
from .jobs import DecodeJob, EncodeJob, Job, Model, Report, Result, SampleJob
from .parallel.split import Split


@contextmanager
def exact_float32(dtype: torch.dtype):
    """In float32 keeps convolutions from TF32, torch's default on GPUs: its 3e-4 would show between plans."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def go_on(step: int, steps: int) -> bool:
    """The step callback of a job that nobody watches."""
    return True


class Engine:
    """Holds at most one transformer and one VAE, and reloads one only when another is asked for.

    Args:
        split: the rank's share of each forward, and its device.
    """

    def __init__(self, split: Split):
        self.split = split
        self.device = split.device
        self.loads = 0
        """Times that weights were read from disk."""
        self.model: Model | None = None
        self._held: dict[str, tuple[Any, torch.nn.Module]] = {}
        self._offload = "none"
        self._notes: list[str] = []

    def run(self, job: Job, on_step: StepCallback = go_on) -> Result:
        """Runs one job.

        Args:
            job: checked against its checkpoint by the caller.
            on_step: see :func:`parallel_backend.cogvideox.denoise.denoise`.
        Returns:
            The job's tensor, on the CPU, and the report of this rank.
        Raises:
            Cancelled: when ``on_step`` asked to stop.
        """
        checkpoint = Checkpoint.open(job.model.path)
        dtype = checkpoint.dtype(job.model.dtype, self.device)
        self.model, self._notes = job.model, []
        memory.reset_peak(self.device)
        run = {SampleJob: self._sample, DecodeJob: self._decode, EncodeJob: self._encode}[type(job)]
        with exact_float32(dtype):
            result = run(job, checkpoint, dtype, on_step)
        report = replace(
            result.report,
            plan=str(self.split.plan),
            world_size=self.split.plan.world_size,
            peak_memory=(memory.used_bytes(self.device),),
            notes=tuple(self._notes),
        )
        return replace(result, report=report)

    def free(self) -> None:
        """Lets go of all weights."""
        self._held.clear()
        self.model = None
        memory.release(self.device)
        memory.reset_peak(self.device)

    def status(self) -> dict[str, Any]:
        """What is held, how often weights were loaded, and memory in use, in plain values."""
        return {
            "model": self.model.path if self.model else None,
            "held": sorted(self._held),
            "loads": self.loads,
            "memory": memory.used_bytes(self.device),
        }

    def _note(self, line: str | None) -> None:
        if line:
            self._notes.append(line)

    def _sample(self, job: SampleJob, checkpoint: Checkpoint, dtype, on_step) -> Result:
        started = time.perf_counter()
        transformer = self._transformer(job, checkpoint, dtype)
        self.split.synchronize()
        loaded = time.perf_counter()
        if not job.guided and self.split.plan.cfg > 1:
            self._note(f"cfg is {job.cfg}: both halves of plan '{self.split.plan}' compute the same")
        steps: list[float] = []
        began = loaded

        def mark(step: int, total: int) -> bool:
            nonlocal began
            steps.append(time.perf_counter() - began)
            go_on = self.split.agree(on_step(step, total))
            began = time.perf_counter()  # reporting and agreeing are no part of a step
            return go_on

        try:
            latent = denoise(transformer, checkpoint, job, device=self.device, dtype=dtype, split=self.split, on_step=mark)
        finally:
            if self._offload == "model":
                transformer.to("cpu")
                memory.release(self.device)
        return Result(
            latent,
            Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded, step_seconds=tuple(steps)),
        )

    def _decode(self, job: DecodeJob, checkpoint: Checkpoint, dtype, on_step) -> Result:
        need = vae.decode_bytes(job.latent.shape, dtype)
        return self._with_vae(job, checkpoint, dtype, need, lambda module: vae.decode(module, job.latent))

    def _encode(self, job: EncodeJob, checkpoint: Checkpoint, dtype, on_step) -> Result:
        frames, height, width, _ = job.pixels.shape
        need = vae.decode_bytes((1, 16, (frames - 1) // 4 + 1, height // 8, width // 8), dtype)
        return self._with_vae(job, checkpoint, dtype, need, lambda module: vae.encode(module, job.pixels))

    def _with_vae(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype, need: int, use) -> Result:
        started = time.perf_counter()
        module = self._load("vae", job.model, checkpoint, dtype).to(self.device)
        free = memory.free_bytes(self.device)
        tiled = job.tiling == "on" or (job.tiling == "auto" and need > memory.HEADROOM * free)
        if tiled and job.tiling == "auto":
            self._note(f"VAE in tiles of {job.tile}: whole needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        vae.set_tiling(module, tiled=tiled, tile=job.tile, overlap=job.overlap)
        loaded = time.perf_counter()
        tensor = use(module)
        return Result(tensor, Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded))

    def _transformer(self, job: SampleJob, checkpoint: Checkpoint, dtype) -> torch.nn.Module:
        before = self.loads
        transformer = self._load("transformer", job.model, checkpoint, dtype)
        if self.loads > before:
            self.split.attach(transformer)
            self._offload, note = self._choose_offload(job, checkpoint, dtype)
            self._note(note)
            memory.place(transformer, self._offload, self.device)
        elif self._offload == "model":
            transformer.to(self.device)
        return transformer

    def _choose_offload(self, job: SampleJob, checkpoint: Checkpoint, dtype) -> tuple[str, str | None]:
        batch, _, frames, height, width = job.latent.shape
        halves = 2 // self.split.plan.cfg if job.guided else 1
        tokens = checkpoint.tokens(frames, height, width) + checkpoint.text_tokens
        return memory.choose_offload(
            job.model.offload,
            weights=checkpoint.weight_bytes("transformer", dtype),
            working=memory.working_bytes(
                batch=batch * halves,
                tokens=tokens // self.split.plan.sequence,
                features=checkpoint.heads * checkpoint.head_dim,
                dtype=dtype,
            ),
            others=checkpoint.weight_bytes("vae", dtype),
            layers=checkpoint.layers,
            free=min(self.split.collect(memory.free_bytes(self.device))),  # one mode for all ranks
        )

    def _load(self, part: str, model: Model, checkpoint: Checkpoint, dtype) -> torch.nn.Module:
        """The part, from before or newly read onto the CPU."""
        key = (model, dtype, weights.fingerprint(checkpoint.path / part))
        held = self._held.get(part)
        if held and held[0] == key:
            return held[1]
        del held  # or the old weights would live until the new ones are read
        self._held.pop(part, None)
        memory.release(self.device)
        load = {"transformer": checkpoint.load_transformer, "vae": checkpoint.load_vae}[part]
        module = load(dtype)
        self.loads += 1
        self._held[part] = (key, module)
        return module
