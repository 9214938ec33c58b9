"""Loads a rank's weights, keeps them between jobs, moves them to and from the device, and frees them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..cogvideox import offload
from ..cogvideox.attention import choice, registry
from ..cogvideox.attention.function import AttentionFunction, Kind
from ..cogvideox.checkpoint import controlnet, weights
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.kernels import probe
from ..cogvideox.pipeline.denoise import WindowCallback
from ..cogvideox.pipeline.windows import forward_size
from ..cogvideox.stopping import check
from ..cogvideox.transformer import block, int8_choice, lora, positions, quantized_linear
from ..cogvideox.transformer.controlnet import ControlBranch, load
from ..errors import Cancelled, RequestError
from ..jobs import SampleJob, WindowJob
from ..model import Model
from ..parallel.rank import RankContext
from ..plan import IN_PARTS

Note = Callable[[str | None], None]
"""Adds a line to the report of the running job; None adds nothing."""


def can_compile(note: Note, otherwise: str, reasons: list[str | None]) -> bool:
    """Returns whether kernels can be compiled on all ranks, and notes the first reason why not.

    Args:
        note: receives ``otherwise`` with the reason.
        otherwise: what is the case without compiled kernels, such as "not compiled".
        reasons: of each rank; None where it can compile.
    """
    against = [reason for reason in reasons if reason]
    note(f"{otherwise}, so slower: {against[0]}" if against else None)
    return not against


def tokens_of(job: SampleJob | WindowJob, checkpoint: Checkpoint) -> int:
    """Returns the text and video tokens of a forward pass."""
    return checkpoint.tokens(*forward_size(job, checkpoint)[1:]) + checkpoint.text_tokens


class ModelCache:
    """Holds at most one transformer with its ControlNets, and one VAE, and loads one again only when a job needs another.

    Args:
        context: the rank, its device and its share of each forward.
        note: receives a line for each fallback.
        stage: receives what is being done, for the user who waits.
    """

    def __init__(self, context: RankContext, note: Note, stage: Callable[[str], None]):
        self.context = context
        self.device = context.device
        self.note = note
        self.stage = stage
        self.loads = 0
        """How often weights were read from disk."""
        self.held: dict[str, tuple[Any, torch.nn.Module]] = {}
        """The key and the module of each part; see :meth:`_load`."""
        self.has_failed = False
        """Whether a part could not be read, or not changed: what is left of it is garbage that nothing has collected yet."""
        self.offload: str | None = None
        """The offload mode of the last sampling job."""
        self.offload_note: str | None = None
        """A note for every job while the transformer that is held is offloaded more slowly than it could be."""
        self.attention: AttentionFunction = registry.FUNCTIONS[registry.LAST_RESORT]
        """The attention function of the last sampling job."""
        self.ranks = choice.Ranks(context.collect, context.alike)
        self.merged: tuple[lora.LoraFile, ...] = ()
        """The LoRAs merged into the transformer's weights."""

    def free(self) -> None:
        """Frees all weights."""
        self.held.clear()
        self.offload = None
        offload.release(self.device)
        offload.reset_peak(self.device)

    def transformer(
        self, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype, on_window: WindowCallback
    ) -> torch.nn.Module:
        """Returns the transformer, with the offload mode that fits this job.

        Raises:
            Cancelled: when ``on_window`` returned False before rank 0 had read its weights.
        """
        mode = self._choose_offload(job, checkpoint, dtype)
        before, stopped = self.loads, False
        hooks = mode if mode in IN_PARTS else None
        loras = self._open_loras(job.model, checkpoint)
        self._check_quantization(job.model)
        kind = Kind(self.device, dtype, checkpoint.head_dim)
        choice.check(job.model.attention, kind, self.ranks)
        if mode != "none" and "vae" in self.held:
            self.held["vae"][1].to("cpu")  # the next VAE job moves it back
        hoped = self._hopes_compiled(job.model, checkpoint, dtype, mode)

        def read() -> torch.nn.Module:
            return self._read_transformer(job, checkpoint, dtype, on_window, in_parts=hooks is not None, hoped=hoped)

        kept = loras if hooks else None  # LoRAs cannot be merged into weights that offload hooks manage
        made = (job.model.quantization, hooks, kept)
        try:
            transformer = self._load("transformer", checkpoint, dtype, read, made)
        except Cancelled:
            stopped = True
        if not self.context.agree(not stopped)[0]:
            if self.loads > before:
                del self.held["transformer"], transformer  # it still lacks its LoRAs and hooks
            offload.release(self.device)
            raise Cancelled("stopped while weights were read")
        if self.loads > before:
            self.merged = ()
        self._merge(loras, transformer, checkpoint)
        if self.loads > before:
            self.offload_note = offload.place(transformer, mode, self.device, ranks=self.context.plan.world_size)
        elif hooks is None:
            transformer.to(self.device)
        self.note(self.offload_note)
        chosen = choice.choose(job.model.attention_function, kind, tokens_of(job, checkpoint), self.ranks)
        self.attention = chosen.function
        for line in chosen.notes:
            self.note(line)
        if job.model.dtype == "auto" and checkpoint.native_dtype == "bf16" and dtype == torch.float16:
            self.note("in fp16, as this GPU is too old for bf16")
        compiled = hoped and can_compile(
            self.note, "not compiled", self.context.collect(self._why_not_compiled(checkpoint, dtype))
        )
        block.use(transformer, compiled=compiled)
        self.note(int8_choice.use(transformer, self.device, dtype, self.context.collect, compiled=compiled))
        positions.use(transformer, interpolated=checkpoint.interpolates_positions)
        for branch in self._load_branches(job, checkpoint, dtype, mode):
            block.use(branch, compiled=compiled and mode not in IN_PARTS)
        self.offload = mode
        return transformer

    @property
    def branches(self) -> tuple[ControlBranch, ...]:
        """The ControlNets of the last sampling job."""
        return tuple(self.held["controlnets"][1]) if "controlnets" in self.held else ()

    def _load_branches(self, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype, mode: str) -> tuple[ControlBranch, ...]:
        """Loads a job's ControlNets and frees others. Weights that wait on the CPU are loaded layer by layer."""
        files = controlnet.open_all(job.controlnets, checkpoint)
        hooks = mode in IN_PARTS
        key = (dtype, hooks, *((file.path, weights.fingerprint(file.files)) for file in files))
        if "controlnets" in self.held and self.held["controlnets"][0] != key:
            self.held.pop("controlnets")
            offload.release(self.device)
        if files and "controlnets" not in self.held:
            self.stage("reading the ControlNet")
            home = torch.device("cpu") if hooks else self.device
            found = torch.nn.ModuleList(load(file, dtype, home) for file in files)
            offload.place(found, "sequential" if hooks else mode, self.device)
            self.held["controlnets"] = (key, found)
        elif files and not hooks:
            self.held["controlnets"][1].to(self.device)
        if files and mode == "group":
            self.note("offload 'group': the ControlNet's weights are loaded layer by layer, which is slower than by blocks")
        return self.branches

    def _check_quantization(self, model: Model) -> None:
        """Raises RequestError on all ranks if a rank's device does not support the quantised layers that the job asks for."""
        if model.quantization != "off":
            reasons = self.context.collect(quantized_linear.missing(model.quantization, self.device))
            if found := next(filter(None, reasons), None):
                raise RequestError(found)

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
        """Loads the transformer with this rank's weights.

        Args:
            job, checkpoint, dtype, on_window: see :meth:`transformer`.
            in_parts: loads to the CPU, from where offload hooks move parts to the device.
            hoped: compiles kernels while weights are read; see :meth:`_hopes_compiled`.
        """

        def prepare(skeleton: torch.nn.Module) -> None:
            if job.model.quantization != "off":
                quantized_linear.convert(skeleton, job.model.quantization)
            self.context.attach(skeleton)
            if hoped:  # not earlier: two threads must not import the same modules at the same time
                probe.in_background(
                    partial(self._why_not_compiled, checkpoint, dtype),
                    partial(choice.prepare, Kind(self.device, dtype, checkpoint.head_dim), job.model.attention_function),
                )

        def look(share: float) -> None:
            self.stage(f"reading weights: {share:.0%}")
            check(lambda: self.context.heard(on_window()), "weights were read")

        home = torch.device("cpu") if in_parts else self.device
        return checkpoint.load_transformer(dtype, self.device, home=home, shard=self.context.shard, prepare=prepare, look=look)

    def _why_not_compiled(self, checkpoint: Checkpoint, dtype) -> str | None:
        """See :func:`parallel_backend.cogvideox.transformer.block.why_not_compiled`."""
        features = checkpoint.heads * checkpoint.head_dim
        return block.why_not_compiled(self.device, dtype, features, checkpoint.head_dim, checkpoint.rotary)

    def _hopes_compiled(self, model: Model, checkpoint: Checkpoint, dtype, mode: str) -> bool:
        """Returns whether to compile the blocks if that is possible. Notes why not if the user could expect it."""
        large = self.device.type == "cuda" and checkpoint.weight_bytes("transformer", dtype) >= block.WORTH_COMPILING
        if model.compile == "off" or (model.compile == "auto" and not large):
            return False
        if mode == "sequential":
            self.note("not compiled: offload 'sequential' moves the weights of one layer at a time, and some kernels read more")
            return False
        return True

    def _open_loras(self, model: Model, checkpoint: Checkpoint) -> tuple[lora.LoraFile, ...]:
        """Opens the LoRAs of a model; those with strength 0 are left out."""
        opened = lora.open_all(model.loras, checkpoint)
        for file in opened:
            for note in file.notes:
                self.note(note)
        return tuple(file for file in opened if file.strength)

    def _merge(self, loras: tuple[lora.LoraFile, ...], transformer, checkpoint: Checkpoint) -> None:
        """Replaces the LoRAs merged into the transformer's weights."""
        if loras == self.merged:
            return
        held, self.has_failed = self.held.pop("transformer"), True  # a merge that fails half-way must not leave it in the cache
        lora.merge(transformer, checkpoint, loras, device=self.device, before=self.merged, shard=self.context.shard)
        self.merged = loras
        self.held["transformer"], self.has_failed = held, False

    def _choose_offload(self, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype) -> str:
        held = sum(offload.bytes_on(self.device, module) for _, module in self.held.values())
        if self.device.type == "mps" and job.model.offload == "auto":
            return "none"  # the CPU shares the GPU's memory
        mode, note = offload.choose_offload(
            job.model.offload,
            weights=offload.job_weight_bytes(job, checkpoint, self.context.plan, dtype),
            working=offload.working_bytes(job, checkpoint, self.context.plan, dtype),
            others=checkpoint.weight_bytes("vae", dtype),
            layers=checkpoint.layers,
            free=min(self.context.collect(offload.free_bytes(self.device) + held)),  # one mode for all ranks
            in_parts=self.context.plan.can_offload("group"),
        )
        self.note(note)
        if job.model.offload == "auto" and self.offload not in (None, mode):
            self.note(f"offload was '{self.offload}' for the job before and is '{mode}' for this one")
        return mode

    def _load(
        self, part: str, checkpoint: Checkpoint, dtype, read: Callable[[], torch.nn.Module], made: tuple = ()
    ) -> torch.nn.Module:
        """Returns a part from the cache, or loads it.

        Args:
            part: ``transformer`` or ``vae``.
            checkpoint, dtype: of the part.
            read: loads the module.
            made: settings that are fixed when the module is loaded, so a change of them loads it again. All other settings are
                applied to the cached module.
        """
        key = (checkpoint.path, dtype, made, weights.fingerprint(checkpoint.files(part)))
        held = self.held.get(part)
        if held and held[0] == key:
            return held[1]
        if held or self.has_failed:
            del held  # else the old weights would stay in memory until the new ones are read
            self.held.pop(part, None)
            offload.release(self.device)
        self.has_failed = True
        module = read()
        self.has_failed = False
        self.loads += 1
        self.held[part] = (key, module)
        return module

    def vae(self, checkpoint: Checkpoint, dtype) -> torch.nn.Module:
        """Returns the VAE on this rank's device."""
        return self._load("vae", checkpoint, dtype, lambda: checkpoint.load_vae(dtype)).to(self.device)

    def make_room(self) -> None:
        """Moves the transformer and its ControlNets off the device, to free memory; the next job that needs them moves them back."""
        for part in ("transformer", "controlnets"):
            if part in self.held and self.offload not in IN_PARTS:
                self.held[part][1].to("cpu")
        offload.release(self.device)
