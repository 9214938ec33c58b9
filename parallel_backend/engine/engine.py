"""What runs a job on one rank: the same code in the caller's process and in every worker of a group."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..cogvideox import offload as memory
from ..cogvideox.checkpoint import weights
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.facts import SPATIAL
from ..cogvideox.kernels import probe
from ..cogvideox.pipeline.denoise import StepCallback, WindowCallback, denoise, predict_window
from ..cogvideox.pipeline.windows import advice
from ..cogvideox.stopping import check, stoppable
from ..cogvideox.transformer import attention, block, fp8_linear, lora
from ..cogvideox.vae import codec, layers
from ..cogvideox.vae.preview import PictureListener, Previews, why_none
from ..devices import current
from ..errors import Cancelled, OutOfMemory, RequestError
from ..jobs import DecodeJob, EncodeJob, Job, LoadJob, Progress, Report, Result, SampleJob, WindowJob
from ..model import Model
from ..parallel.rank import RankContext
from ..parallel.vae_rows import Strips, shared
from ..plan import IN_PARTS


@contextmanager
def exact_float32(dtype: torch.dtype):
    """In float32 keeps convolutions from TF32, torch's default on GPUs: its 3e-4 would show between plans."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def go_on(*progress: Progress | int) -> bool:
    """The callback, of steps and of windows, of a job that nobody watches."""
    return True


SHORT_SECONDS = 2.0
"""After a step this short the next one begins before it is reported, so that the device does not wait; stopping then takes one step more."""
STRIP_MARGIN = 1.2
"""What the estimate of a strip's memory is multiplied by: a rank that runs out there takes the group with it."""


class Engine:
    """Holds at most one transformer and one VAE, and reloads one only when another is asked for.

    Args:
        context: the rank's share of each forward, and its device.
    """

    def __init__(self, context: RankContext):
        self.context = context
        self.device = context.device
        self.together = False
        """Whether the ranks exchange data in this job, so that one that fails alone leaves the others waiting."""
        self.loads = 0
        """Times that weights were read from disk."""
        self.model: Model | None = None
        self._held: dict[str, tuple[Any, torch.nn.Module]] = {}
        self._offload: str | None = None
        """The mode of the last sampling job."""
        self._merged: tuple[lora.LoraFile, ...] = ()
        """The LoRAs in the transformer's weights."""
        self._notes: list[str] = []
        self._status: dict[str, Any] = {}
        self._describe()

    def run(
        self,
        job: Job,
        on_step: StepCallback = go_on,
        on_window: WindowCallback = go_on,
        on_picture: PictureListener | None = None,
    ) -> Result:
        """Runs one job.

        Args:
            job: checked against its checkpoint by the caller.
            on_step, on_window: see :func:`parallel_backend.cogvideox.pipeline.denoise.denoise`.
            on_picture: called with previews where a job asks for them, on rank 0.
        Returns:
            The job's tensor, on the CPU, and the report of this rank.
        Raises:
            Cancelled: when ``on_step`` or ``on_window`` asked to stop.
        """
        checkpoint = Checkpoint.open(job.model.path)
        dtype = checkpoint.dtype(job.model.dtype, self.device)
        self.model, self._notes = job.model, []
        self.together = isinstance(job, SampleJob | WindowJob)
        memory.reset_peak(self.device)
        run = {
            SampleJob: partial(self._sample, on_picture=on_picture),
            LoadJob: self._load_only,
            WindowJob: self._window,
            DecodeJob: self._decode,
            EncodeJob: self._encode,
        }[type(job)]
        try:
            with current(self.device), exact_float32(dtype):
                result = run(job, checkpoint, dtype, on_step, on_window)
        finally:
            self._describe()
        report = replace(
            result.report,
            plan=str(self.context.plan),
            world_size=self.context.plan.world_size,
            peak_memory=(memory.used_bytes(self.device) + self.context.outside_bytes,),
            notes=tuple(self._notes),
        )
        return replace(result, report=report)

    def free(self) -> None:
        """Lets go of all weights."""
        self._held.clear()
        self.model = self._offload = None
        memory.release(self.device)
        memory.reset_peak(self.device)
        self._describe()

    def status(self) -> dict[str, Any]:
        """What is held, its bytes on the device, how often weights were loaded, and memory in use, in plain values.

        Any thread may ask. What is held is as it was when the last job ended.
        """
        return {**self._status, "memory": memory.used_bytes(self.device)}

    def _describe(self) -> None:
        """Notes what is held, for other threads: they must not look at weights while this one changes them."""
        self._status = {
            "model": self.model.path if self.model else None,
            "held": sorted(self._held),
            "weights": {part: memory.bytes_on(self.device, module) for part, (_, module) in self._held.items()},
            "loads": self.loads,
        }

    @property
    def _advice(self) -> str:
        """What makes room for a job beside the weights."""
        if not self.context.plan.can_offload("group"):
            return f"fp8 'linears' or more {'fsdp' if self.context.plan.fsdp > 1 else 'pipefusion'}"
        return f"offload 'group' (now '{self._offload}')"

    def _note(self, line: str | None) -> None:
        if line:
            self._notes.append(line)

    def _sample(self, job: SampleJob, checkpoint: Checkpoint, dtype, on_step, on_window, on_picture) -> Result:
        started = time.perf_counter()
        transformer = self._transformer(job, checkpoint, dtype, on_window)
        previews = self._previews(job, checkpoint, dtype, on_picture, on_window)
        self.context.synchronize()
        loaded = time.perf_counter()
        if not job.guided and self.context.plan.cfg > 1:
            self._note(f"cfg is {job.cfg}: both halves of plan '{self.context.plan}' compute the same")
        self._note(advice(job, checkpoint))
        steps: list[float] = []
        began, ahead = loaded, False

        def mark(progress: Progress, total: int) -> bool:
            nonlocal began, ahead
            ended = time.perf_counter()
            steps.append(ended - began)
            under_way = ahead
            short = self.device.type == "cuda" and steps[-1] < SHORT_SECONDS
            go_on = on_step(progress, total)
            if previews and go_on:
                previews.look(progress.clean)
                go_on = on_window()
            go_on, ahead = self.context.agree(go_on, short)
            began = ended if under_way else time.perf_counter()  # where the device waits for it, telling is no part of a step
            return go_on

        caches = self.context.caches(job)
        if job.progress is not None and caches.restarted:
            self._note(f"{caches.restarted}, so this is not quite the video of an undisturbed run")
        place = {"device": self.device, "dtype": dtype, "context": self.context}
        callbacks = {
            "caches": caches,
            "on_step": mark,
            "on_window": partial(self._may_go_on, on_window),
            "may_begin": lambda: ahead,
        }
        try:
            with memory.one_kind_of_error():
                latent = denoise(transformer, checkpoint, job, **place, **callbacks)
        except torch.OutOfMemoryError as error:
            where = f"a step after {len(steps)}" if steps else "step 1"
            raise self._out_of_memory(where, job, checkpoint, dtype) from error
        finally:
            if self._offload == "model":
                transformer.to("cpu")
                memory.release(self.device)
        self._note(caches.note)
        self._note(previews and previews.note)
        self._note(attention.note_of_twice(self.device))
        return Result(
            latent,
            Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded, step_seconds=tuple(steps)),
        )

    def _previews(
        self, job: SampleJob, checkpoint: Checkpoint, dtype, show: PictureListener | None, go_on: WindowCallback
    ) -> Previews | None:
        """The pictures of a job, where its caller is to be shown some and this rank is to make them."""
        if not job.preview or show is None:
            return None
        if "vae" not in checkpoint.elements:
            self._note("no previews: the model has no VAE of its own")
            return None
        if self._offload != "none":
            self._note(f"no previews: offload is '{self._offload}', and they need the VAE beside the transformer")
            return None
        try:
            module = self._vae(checkpoint, dtype)
        except Exception as error:  # a job that needs no VAE must not fail for it, and on one rank alone
            self._held.pop("vae", None)
            self._note(why_none(error))
            return None
        module.disable_tiling()
        layers.use(module, compiled=False)
        skipped = checkpoint.padding_frames(job.latent.shape[2])
        return Previews(module, scaling=checkpoint.scaling_factor, skipped=skipped, show=show, go_on=go_on)

    def _load_only(self, job: LoadJob, checkpoint: Checkpoint, dtype, on_step, on_window) -> Result:
        """What a sampling job begins with; that one says what there is to say of it."""
        started = time.perf_counter()
        self._transformer(job, checkpoint, dtype, on_window)
        self.context.synchronize()
        self._notes.clear()
        return Result(torch.empty(0), Report(load_seconds=time.perf_counter() - started))

    def _window(self, job: WindowJob, checkpoint: Checkpoint, dtype, on_step, on_window) -> Result:
        started = time.perf_counter()
        transformer = self._transformer(job, checkpoint, dtype, on_window)
        self.context.synchronize()
        loaded = time.perf_counter()
        try:
            with memory.one_kind_of_error():
                predicted = predict_window(transformer, checkpoint, job, device=self.device, dtype=dtype, context=self.context)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory("a window", job, checkpoint, dtype) from error
        return Result(predicted, Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded))

    def _out_of_memory(self, what: str, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype) -> OutOfMemory:
        """The error for a forward that does not fit."""
        free, need = memory.free_bytes(self.device), memory.working_bytes(job, checkpoint, self.context.plan, dtype)
        return OutOfMemory(
            f"{what} ran out of memory on {self.device}: it needs about {need / 2**30:.1f} GiB beside the weights and "
            f"{free / 2**30:.1f} GiB are free; use {self._advice}, a smaller size, or a plan with more ulysses, ring or tensor"
            + (", or turn previews off" if isinstance(job, SampleJob) and job.preview else "")
        )

    def _may_go_on(self, on_window: WindowCallback) -> bool:
        """Whether the job is still wanted; in one that the ranks do together, what rank 0 says."""
        self.context.synchronize()  # or the device would be given all of the work before the first part has run
        return self.context.agree(on_window())[0] if self.together else on_window()

    def _decode(self, job: DecodeJob, checkpoint: Checkpoint, dtype, on_step, on_window) -> Result:
        return self._with_vae(
            job, checkpoint, dtype, on_window, lambda module, strips: codec.decode(module, job.latent, strips)
        )

    def _encode(self, job: EncodeJob, checkpoint: Checkpoint, dtype, on_step, on_window) -> Result:
        return self._with_vae(
            job, checkpoint, dtype, on_window, lambda module, strips: codec.encode(module, job.pixels, strips)
        )

    def _with_vae(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype, on_window: WindowCallback, use) -> Result:
        started = time.perf_counter()
        strips = self._strips(job, checkpoint, dtype)
        self.together = strips is not None
        if strips is None and self.context.rank != 0:
            return Result(torch.empty(0))
        module = self._vae(checkpoint, dtype)
        layers.use(module, compiled=self._wants_compiled_vae(job, dtype, shared=self.together))
        loaded = time.perf_counter()
        go_on = partial(self._may_go_on, on_window)
        with layers.searching(), stoppable(codec.stops(module), go_on, "the VAE was at work"):
            tensor = self._alone(job, dtype, module, use) if strips is None else self._in_strips(job, module, strips, use)
        return Result(tensor, Report(load_seconds=loaded - started, run_seconds=time.perf_counter() - loaded))

    def _vae(self, checkpoint: Checkpoint, dtype) -> torch.nn.Module:
        """The VAE, on this rank's device."""
        return self._load("vae", checkpoint, dtype, lambda: checkpoint.load_vae(dtype)).to(self.device)

    def _in_strips(self, job: DecodeJob | EncodeJob, module, strips: Strips, use) -> torch.Tensor:
        codec.set_tiling(module, tiled=False, tile=job.tile, overlap=0)
        try:
            with shared(module.layers, strips), memory.one_kind_of_error():
                return use(module, strips)
        except torch.OutOfMemoryError as error:
            free = memory.free_bytes(self.device)
            raise OutOfMemory(
                f"the VAE ran out of memory in a strip on {self.device}: {free / 2**30:.1f} GiB are free; use tiling on"
            ) from error

    def _alone(self, job: DecodeJob | EncodeJob, dtype, module, use) -> torch.Tensor:
        """Whole where that fits, then in smaller and smaller tiles."""
        need, free = codec.working_bytes(job, dtype), memory.free_bytes(self.device)
        tiled = job.tiling == "on" or (job.tiling == "auto" and need > memory.HEADROOM * free)
        if tiled and job.tiling == "auto":
            self._note(f"VAE in tiles of {job.tile}: whole needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        for tile in codec.ways_out(job, tiled=tiled):
            overlap = min(job.overlap, (tile or job.tile) // 2)
            codec.set_tiling(module, tiled=tile is not None, tile=tile or job.tile, overlap=overlap)
            try:
                with memory.one_kind_of_error():
                    return use(module, None)
            except torch.OutOfMemoryError:
                free = memory.free_bytes(self.device)
                where = f"in tiles of {tile}" if tile else "whole"
                self._note(f"VAE {where} ran out of memory ({free / 2**30:.1f} GiB free); the transformer made room")
            self._make_room()
        raise OutOfMemory(
            f"the VAE ran out of memory {where}: {free / 2**30:.1f} GiB are free; use tiling auto, or unload models"
        )

    def _strips(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype) -> Strips | None:
        """How the ranks share the picture's rows, or None: one rank alone, in tiles asked for, or too little memory on one.

        In tiles a rank that runs out of memory can try smaller ones; in a strip all the others would wait for it.
        """
        rows = job.latent.shape[3] if isinstance(job, DecodeJob) else job.pixels.shape[1] // SPATIAL
        strips = self.context.strips(rows)
        if strips is None or job.tiling == "on":
            return None
        weights = 0 if "vae" in self._held else checkpoint.weight_bytes("vae", dtype)
        need = weights + codec.working_bytes(job, dtype) * max(strips.counts) / rows

        def enough() -> bool:
            return all(self.context.collect(memory.free_bytes(self.device) * memory.HEADROOM >= STRIP_MARGIN * need))

        if enough():
            return strips
        self._make_room()
        if enough():
            self._note("the transformer made room for the VAE")
            return strips
        self._note("rank 0 works the VAE alone: a strip on each rank does not fit")
        return None

    def _make_room(self) -> None:
        """Brings everything but the VAE off the device; a job that needs it brings it back."""
        if "transformer" in self._held and self._offload not in IN_PARTS:
            self._held["transformer"][1].to("cpu")
        memory.release(self.device)

    def _transformer(
        self, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype, on_window: WindowCallback
    ) -> torch.nn.Module:
        """The transformer, its weights where this job can afford them.

        Raises:
            Cancelled: when ``on_window`` asked to stop before rank 0 had read its weights.
        """
        mode = self._choose_offload(job, checkpoint, dtype)
        before, stopped = self.loads, False
        hooks = mode if mode in IN_PARTS else None
        loras = self._open_loras(job.model, checkpoint)
        self._check_fp8(job.model)
        if mode != "none" and "vae" in self._held:
            self._held["vae"][1].to("cpu")  # its own job brings it back
        hoped = self._hopes_compiled(job.model, checkpoint, dtype, mode)

        def read() -> torch.nn.Module:
            return self._read_transformer(job, checkpoint, dtype, on_window, in_parts=hooks is not None, hoped=hoped)

        made = (job.model.fp8, hooks, loras if hooks else None)  # LoRAs cannot be merged into weights that hooks hold
        try:
            transformer = self._load("transformer", checkpoint, dtype, read, made)
        except Cancelled:
            stopped = True
        if not self.context.agree(not stopped)[0]:
            if self.loads > before:
                del self._held["transformer"], transformer  # it still lacks its LoRAs and hooks
            memory.release(self.device)
            raise Cancelled("stopped while weights were read")
        if self.loads > before:
            self._merged = ()
        self._merge(loras, transformer, checkpoint)
        if self.loads > before:
            memory.place(transformer, mode, self.device)
        elif hooks is None:
            transformer.to(self.device)
        attention.agree(self.device, dtype, checkpoint.head_dim, self.context.collect)
        self._note(attention.note(self.device, dtype, checkpoint.head_dim, fp8=job.model.fp8 == "all"))
        if job.model.dtype == "auto" and checkpoint.native_dtype == "bf16" and dtype == torch.float16:
            self._note("in fp16, as this GPU is too old for bf16")
        compiled = hoped and self._can_compile("not compiled", self.context.collect(self._why_not_compiled(checkpoint, dtype)))
        block.use(transformer, compiled=compiled)
        self._offload = mode
        return transformer

    def _check_fp8(self, model: Model) -> None:
        """Raises RequestError, on all ranks, where FP8 is asked for and the device of one has none."""
        if model.fp8 != "off" and (
            reasons := [reason for reason in self.context.collect(fp8_linear.missing(self.device)) if reason]
        ):
            raise RequestError(reasons[0])

    def _read_transformer(
        self,
        job: SampleJob | WindowJob,
        checkpoint: Checkpoint,
        dtype,
        on_window: WindowCallback,
        *,
        in_parts: bool,
        hoped: bool,
    ) -> torch.nn.Module:
        """The transformer with this rank's weights, on the device, or on the CPU where they come in parts; its kernels are made meanwhile
        where that is ``hoped`` for."""

        def prepare(skeleton: torch.nn.Module) -> None:
            if job.model.fp8 != "off":
                fp8_linear.convert(skeleton)
            self.context.attach(skeleton, fp8_attention=job.model.fp8 == "all")
            if hoped:  # not sooner: what this thread imports until here, another one must not be in the middle of importing
                probe.beside(
                    partial(self._why_not_compiled, checkpoint, dtype),
                    partial(attention.prepare, self.device, dtype, checkpoint.head_dim, fp8=job.model.fp8 == "all"),
                )

        def look() -> None:
            check(lambda: self.context.heard(on_window()), "weights were read")

        home = torch.device("cpu") if in_parts else self.device
        return checkpoint.load_transformer(dtype, self.device, home=home, shard=self.context.shard, prepare=prepare, look=look)

    def _why_not_compiled(self, checkpoint: Checkpoint, dtype) -> str | None:
        """See :func:`parallel_backend.cogvideox.transformer.block.why_not_compiled`."""
        features = checkpoint.heads * checkpoint.head_dim
        return block.why_not_compiled(self.device, dtype, features, checkpoint.head_dim, checkpoint.rotary)

    def _hopes_compiled(self, model: Model, checkpoint: Checkpoint, dtype, offload: str) -> bool:
        """Whether the blocks are to run compiled where that can be done; says why not where that was to be expected."""
        large = self.device.type == "cuda" and checkpoint.weight_bytes("transformer", dtype) >= block.WORTH_COMPILING
        if model.compile == "off" or (model.compile == "auto" and not large):
            return False
        if offload == "sequential":
            self._note("not compiled: offload 'sequential' brings weights to layers alone, and kernels ask for some themselves")
            return False
        return True

    def _wants_compiled_vae(self, job: DecodeJob | EncodeJob, dtype, *, shared: bool) -> bool:
        """Whether the VAE's layers are to run compiled, the same on all ranks that are in it."""
        large = self.device.type == "cuda" and codec.working_bytes(job, dtype) >= layers.WORTH_COMPILING
        if job.model.compile == "off" or (job.model.compile == "auto" and not large):
            return False
        reason = layers.why_not_compiled(self.device)
        return self._can_compile("VAE not compiled", self.context.collect(reason) if shared else [reason])

    def _can_compile(self, otherwise: str, reasons: list[str | None]) -> bool:
        """Whether no rank has a reason against; says the first, and what is the case for it."""
        against = [reason for reason in reasons if reason]
        self._note(f"{otherwise}, so slower: {against[0]}" if against else None)
        return not against

    def _open_loras(self, model: Model, checkpoint: Checkpoint) -> tuple[lora.LoraFile, ...]:
        """The LoRAs that change something."""
        opened = lora.open_all(model.loras, checkpoint)
        for file in opened:
            self._note(file.note)
        return tuple(file for file in opened if file.strength)

    def _merge(self, loras: tuple[lora.LoraFile, ...], transformer, checkpoint: Checkpoint) -> None:
        """Makes these the LoRAs in the transformer's weights."""
        if loras == self._merged:
            return
        held = self._held.pop("transformer")  # when this fails half-way it is nobody's
        lora.merge(transformer, checkpoint, loras, device=self.device, before=self._merged, shard=self.context.shard)
        self._merged = loras
        self._held["transformer"] = held

    def _choose_offload(self, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype) -> str:
        held = sum(memory.bytes_on(self.device, module) for _, module in self._held.values())
        if self.device.type == "mps" and job.model.offload == "auto":
            return "none"  # what waits on the CPU takes the same memory
        mode, note = memory.choose_offload(
            job.model.offload,
            weights=memory.transformer_bytes(checkpoint, self.context.plan, dtype, fp8=job.model.fp8 != "off"),
            working=memory.working_bytes(job, checkpoint, self.context.plan, dtype),
            others=checkpoint.weight_bytes("vae", dtype),
            layers=checkpoint.layers,
            free=min(self.context.collect(memory.free_bytes(self.device) + held)),  # one mode for all ranks
            in_parts=self.context.plan.can_offload("group"),
        )
        self._note(note)
        if job.model.offload == "auto" and self._offload not in (None, mode):
            self._note(f"offload was '{self._offload}' for the job before and is '{mode}' for this one")
        return mode

    def _load(
        self, part: str, checkpoint: Checkpoint, dtype, read: Callable[[], torch.nn.Module], made: tuple = ()
    ) -> torch.nn.Module:
        """The part from the cache, or newly ``read``.

        Args:
            made: settings that ``read`` puts into the module, so that other ones need another module. All other settings of a
                model are applied to the module that is there.
        """
        key = (checkpoint.path, dtype, made, weights.fingerprint(checkpoint.files(part)))
        held = self._held.get(part)
        if held and held[0] == key:
            return held[1]
        del held  # or the old weights would live until the new ones are read
        self._held.pop(part, None)
        memory.release(self.device)
        module = read()
        self.loads += 1
        self._held[part] = (key, module)
        return module
