"""Runs decode and encode jobs: whole, in tiles, or in strips of rows, one strip a rank."""

from functools import partial

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.compression import SPATIAL
from ..cogvideox.pipeline.denoise import WindowCallback
from ..cogvideox.stopping import stoppable
from ..cogvideox.vae import codec, layers, tiling
from ..cogvideox.vae.frames import FramesListener
from ..cogvideox.vae.tiling import STRIP_MARGIN
from ..errors import OutOfMemory
from ..jobs import DecodeJob, EncodeJob
from ..parallel.rank import RankContext
from ..parallel.vae_rows import Strips, shared
from .model_cache import ModelCache, Note, can_compile


class VaeJobs:
    """Runs decode and encode jobs on one rank.

    Args:
        context: the rank, its device and its share of a frame's rows.
        cache: holds the VAE and frees memory for it.
        note: receives a line for each fallback.
    """

    def __init__(self, context: RankContext, cache: ModelCache, note: Note):
        self.context = context
        self.device = context.device
        self.cache = cache
        self.note = note

    def rows_shared(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype) -> Strips | None:
        """Divides a frame's rows among the ranks.

        Returns:
            None if rank 0 works alone: with one rank, with tiling on, or if a strip does not fit on every rank. A rank that
            runs out of memory alone can try smaller tiles; in a strip it would leave the others hanging.
        """
        rows = job.latent.shape[3] if isinstance(job, DecodeJob) else job.pixels.shape[1] // SPATIAL
        strips = self.context.strips(rows)
        if strips is None or job.tiling == "on":
            return None
        weights = 0 if "vae" in self.cache.held else checkpoint.weight_bytes("vae", dtype)
        need = weights + tiling.working_bytes(job, dtype) * max(strips.counts) / rows

        def enough() -> bool:
            return all(self.context.collect(offload.free_bytes(self.device) * offload.HEADROOM >= STRIP_MARGIN * need))

        if enough():
            return strips
        self.cache.make_room()
        if enough():
            self.note("the transformer was moved to the CPU to free memory for the VAE")
            return strips
        self.note("rank 0 runs the VAE alone: a strip on each rank does not fit into memory")
        return None

    def module(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype, *, shared: bool) -> torch.nn.Module:
        """Returns the VAE with the kernels for a job.

        Args:
            job: decode or encode.
            checkpoint, dtype: of the VAE.
            shared: whether the ranks work on strips.
        """
        module = self.cache.vae(checkpoint, dtype)
        layers.use(module, compiled=self._wants_compiled(job, dtype, shared=shared))
        return module

    def compute(
        self,
        job: DecodeJob | EncodeJob,
        dtype,
        module: torch.nn.Module,
        strips: Strips | None,
        go_on: WindowCallback,
        on_frames: FramesListener | None = None,
    ) -> torch.Tensor:
        """Decodes a latent to frames, or encodes frames to a latent.

        Args:
            job: decode or encode.
            dtype: of the VAE.
            module: from :meth:`module`.
            strips: from :meth:`rows_shared`.
            go_on: called between layers; False cancels the job.
            on_frames: receives decoded frames; the result is then empty.
        """
        if isinstance(job, DecodeJob):
            use = partial(codec.decode, module, job.latent, on_frames=on_frames)
        else:
            use = partial(codec.encode, module, job.pixels)
        with layers.searching(), stoppable(codec.stops(module), go_on, "the VAE was at work"):
            return self._alone(job, dtype, module, use) if strips is None else self._in_strips(job, module, strips, use)

    def _in_strips(self, job: DecodeJob | EncodeJob, module, strips: Strips, use) -> torch.Tensor:
        tiling.set_tiling(module, tiled=False, tile=job.tile, overlap=0)
        try:
            with shared(module.layers, strips), offload.one_kind_of_error():
                return use(strips)
        except torch.OutOfMemoryError as error:
            free = offload.free_bytes(self.device)
            raise OutOfMemory(
                f"the VAE ran out of memory in a strip on {self.device}: {free / 2**30:.1f} GiB are free; use tiling on"
            ) from error

    def _alone(self, job: DecodeJob | EncodeJob, dtype, module, use) -> torch.Tensor:
        """Tries it whole if that should fit, then in smaller and smaller tiles."""
        need, free = tiling.working_bytes(job, dtype), offload.free_bytes(self.device)
        tiled = tiling.starts_tiled(job, need, offload.HEADROOM * free)
        if tiled and job.tiling == "auto":
            self.note(f"VAE in tiles of {job.tile}: whole needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        for tile in tiling.tiles_to_try(job, tiled=tiled):
            overlap = min(job.overlap, (tile or job.tile) // 2)
            tiling.set_tiling(module, tiled=tile is not None, tile=tile or job.tile, overlap=overlap)
            try:
                with offload.one_kind_of_error():
                    return use(None)
            except torch.OutOfMemoryError:
                free = offload.free_bytes(self.device)
                where = f"in tiles of {tile}" if tile else "whole"
                self.note(
                    f"VAE {where} ran out of memory ({free / 2**30:.1f} GiB free); other weights were moved off the device"
                )
            self.cache.make_room()
        raise OutOfMemory(
            f"the VAE ran out of memory {where}: {free / 2**30:.1f} GiB are free; use tiling auto, or unload models"
        )

    def _wants_compiled(self, job: DecodeJob | EncodeJob, dtype, *, shared: bool) -> bool:
        """Returns whether to compile the VAE's layers, the same on all ranks that take part."""
        large = self.device.type == "cuda" and tiling.working_bytes(job, dtype) >= layers.WORTH_COMPILING
        if job.model.compile == "off" or (job.model.compile == "auto" and not large):
            return False
        reason = layers.why_not_compiled(self.device)
        return can_compile(self.note, "VAE not compiled", self.context.collect(reason) if shared else [reason])
