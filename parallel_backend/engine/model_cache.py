"""The weights that a rank holds: read, kept where there is room, brought to the device, and let go of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint import weights
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.kernels import probe
from ..cogvideox.pipeline.denoise import WindowCallback
from ..cogvideox.stopping import check
from ..cogvideox.transformer import attention, block, fp8_linear, lora
from ..errors import Cancelled, RequestError
from ..jobs import SampleJob, WindowJob
from ..model import Model
from ..parallel.rank import RankContext
from ..plan import IN_PARTS

Note = Callable[[str | None], None]
"""Takes a line for the report of the job that runs; None is no line."""


def can_compile(note: Note, otherwise: str, reasons: list[str | None]) -> bool:
    """Whether no rank has a reason against; says the first, and what is the case for it."""
    against = [reason for reason in reasons if reason]
    note(f"{otherwise}, so slower: {against[0]}" if against else None)
    return not against


class ModelCache:
    """Holds at most one transformer and one VAE, and reads one again only when another is asked for.

    Args:
        context: the rank's share of each forward, and its device.
        note: gets a line for each fallback.
    """

    def __init__(self, context: RankContext, note: Note):
        self.context = context
        self.device = context.device
        self.note = note
        self.loads = 0
        """Times that weights were read from disk."""
        self.held: dict[str, tuple[Any, torch.nn.Module]] = {}
        """The module of each part, with what it was made for."""
        self.offload: str | None = None
        """The mode of the last sampling job."""
        self.merged: tuple[lora.LoraFile, ...] = ()
        """The LoRAs in the transformer's weights."""

    def free(self) -> None:
        """Lets go of all weights."""
        self.held.clear()
        self.offload = None
        offload.release(self.device)
        offload.reset_peak(self.device)

    def transformer(
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
        if mode != "none" and "vae" in self.held:
            self.held["vae"][1].to("cpu")  # its own job brings it back
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
                del self.held["transformer"], transformer  # it still lacks its LoRAs and hooks
            offload.release(self.device)
            raise Cancelled("stopped while weights were read")
        if self.loads > before:
            self.merged = ()
        self._merge(loras, transformer, checkpoint)
        if self.loads > before:
            offload.place(transformer, mode, self.device)
        elif hooks is None:
            transformer.to(self.device)
        attention.agree(self.device, dtype, checkpoint.head_dim, self.context.collect)
        self.note(attention.note(self.device, dtype, checkpoint.head_dim, fp8=job.model.fp8 == "all"))
        if job.model.dtype == "auto" and checkpoint.native_dtype == "bf16" and dtype == torch.float16:
            self.note("in fp16, as this GPU is too old for bf16")
        compiled = hoped and can_compile(
            self.note, "not compiled", self.context.collect(self._why_not_compiled(checkpoint, dtype))
        )
        block.use(transformer, compiled=compiled)
        self.offload = mode
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

    def _hopes_compiled(self, model: Model, checkpoint: Checkpoint, dtype, mode: str) -> bool:
        """Whether the blocks are to run compiled where that can be done; says why not where that was to be expected."""
        large = self.device.type == "cuda" and checkpoint.weight_bytes("transformer", dtype) >= block.WORTH_COMPILING
        if model.compile == "off" or (model.compile == "auto" and not large):
            return False
        if mode == "sequential":
            self.note("not compiled: offload 'sequential' brings weights to layers alone, and kernels ask for some themselves")
            return False
        return True

    def _open_loras(self, model: Model, checkpoint: Checkpoint) -> tuple[lora.LoraFile, ...]:
        """The LoRAs that change something."""
        opened = lora.open_all(model.loras, checkpoint)
        for file in opened:
            self.note(file.note)
        return tuple(file for file in opened if file.strength)

    def _merge(self, loras: tuple[lora.LoraFile, ...], transformer, checkpoint: Checkpoint) -> None:
        """Makes these the LoRAs in the transformer's weights."""
        if loras == self.merged:
            return
        held = self.held.pop("transformer")  # when this fails half-way it is nobody's
        lora.merge(transformer, checkpoint, loras, device=self.device, before=self.merged, shard=self.context.shard)
        self.merged = loras
        self.held["transformer"] = held

    def _choose_offload(self, job: SampleJob | WindowJob, checkpoint: Checkpoint, dtype) -> str:
        held = sum(offload.bytes_on(self.device, module) for _, module in self.held.values())
        if self.device.type == "mps" and job.model.offload == "auto":
            return "none"  # what waits on the CPU takes the same memory
        mode, note = offload.choose_offload(
            job.model.offload,
            weights=offload.transformer_bytes(checkpoint, self.context.plan, dtype, fp8=job.model.fp8 != "off"),
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
        """The part from the cache, or newly ``read``.

        Args:
            made: settings that ``read`` puts into the module, so that other ones need another module. All other settings of a
                model are applied to the module that is there.
        """
        key = (checkpoint.path, dtype, made, weights.fingerprint(checkpoint.files(part)))
        held = self.held.get(part)
        if held and held[0] == key:
            return held[1]
        del held  # or the old weights would live until the new ones are read
        self.held.pop(part, None)
        offload.release(self.device)
        module = read()
        self.loads += 1
        self.held[part] = (key, module)
        return module

    def vae(self, checkpoint: Checkpoint, dtype) -> torch.nn.Module:
        """The VAE, on this rank's device."""
        return self._load("vae", checkpoint, dtype, lambda: checkpoint.load_vae(dtype)).to(self.device)

    def make_room(self) -> None:
        """Brings everything but the VAE off the device; a job that needs it brings it back."""
        if "transformer" in self.held and self.offload not in IN_PARTS:
            self.held["transformer"][1].to("cpu")
        offload.release(self.device)
