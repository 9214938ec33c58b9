"""Decode and encode jobs: whole, in tiles, or in strips of rows that the ranks share."""

from functools import partial

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.facts import SPATIAL
from ..cogvideox.pipeline.denoise import WindowCallback
from ..cogvideox.stopping import stoppable
from ..cogvideox.vae import codec, layers
from ..errors import OutOfMemory
from ..jobs import DecodeJob, EncodeJob
from ..parallel.rank import RankContext
from ..parallel.vae_rows import Strips, shared
from .model_cache import ModelCache, Note, can_compile

STRIP_MARGIN = 1.2
"""What the estimate of a strip's memory is multiplied by: a rank that runs out there takes the group with it."""


class VaeJobs:
    """Runs decode and encode jobs on one rank.

    Args:
        context: the rank's share of a picture's rows, and its device.
        cache: has the VAE, and makes room for it.
        note: gets a line for each fallback.
    """

    def __init__(self, context: RankContext, cache: ModelCache, note: Note):
        self.context = context
        self.device = context.device
        self.cache = cache
        self.note = note

    def rows_shared(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype) -> Strips | None:
        """How the ranks share the picture's rows, or None: one rank alone, in tiles asked for, or too little memory on one.

        In tiles a rank that runs out of memory can try smaller ones; in a strip all the others would wait for it.
        """
        rows = job.latent.shape[3] if isinstance(job, DecodeJob) else job.pixels.shape[1] // SPATIAL
        strips = self.context.strips(rows)
        if strips is None or job.tiling == "on":
            return None
        weights = 0 if "vae" in self.cache.held else checkpoint.weight_bytes("vae", dtype)
        need = weights + codec.working_bytes(job, dtype) * max(strips.counts) / rows

        def enough() -> bool:
            return all(self.context.collect(offload.free_bytes(self.device) * offload.HEADROOM >= STRIP_MARGIN * need))

        if enough():
            return strips
        self.cache.make_room()
        if enough():
            self.note("the transformer made room for the VAE")
            return strips
        self.note("rank 0 works the VAE alone: a strip on each rank does not fit")
        return None

    def module(self, job: DecodeJob | EncodeJob, checkpoint: Checkpoint, dtype, *, shared: bool) -> torch.nn.Module:
        """The VAE, its layers with the kernels that the job runs with."""
        module = self.cache.vae(checkpoint, dtype)
        layers.use(module, compiled=self._wants_compiled(job, dtype, shared=shared))
        return module

    def compute(
        self, job: DecodeJob | EncodeJob, dtype, module: torch.nn.Module, strips: Strips | None, go_on: WindowCallback
    ) -> torch.Tensor:
        """What a job's tensor becomes: frames, or a latent.

        Args:
            job: decode or encode.
            dtype: of the VAE.
            module: from :meth:`module`.
            strips: from :meth:`rows_shared`.
            go_on: asked between layers whether the job is still wanted.
        """
        if isinstance(job, DecodeJob):
            use = partial(codec.decode, module, job.latent)
        else:
            use = partial(codec.encode, module, job.pixels)
        with layers.searching(), stoppable(codec.stops(module), go_on, "the VAE was at work"):
            return self._alone(job, dtype, module, use) if strips is None else self._in_strips(job, module, strips, use)

    def _in_strips(self, job: DecodeJob | EncodeJob, module, strips: Strips, use) -> torch.Tensor:
        codec.set_tiling(module, tiled=False, tile=job.tile, overlap=0)
        try:
            with shared(module.layers, strips), offload.one_kind_of_error():
                return use(strips)
        except torch.OutOfMemoryError as error:
            free = offload.free_bytes(self.device)
            raise OutOfMemory(
                f"the VAE ran out of memory in a strip on {self.device}: {free / 2**30:.1f} GiB are free; use tiling on"
            ) from error

    def _alone(self, job: DecodeJob | EncodeJob, dtype, module, use) -> torch.Tensor:
        """Whole where that fits, then in smaller and smaller tiles."""
        need, free = codec.working_bytes(job, dtype), offload.free_bytes(self.device)
        tiled = job.tiling == "on" or (job.tiling == "auto" and need > offload.HEADROOM * free)
        if tiled and job.tiling == "auto":
            self.note(f"VAE in tiles of {job.tile}: whole needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        for tile in codec.ways_out(job, tiled=tiled):
            overlap = min(job.overlap, (tile or job.tile) // 2)
            codec.set_tiling(module, tiled=tile is not None, tile=tile or job.tile, overlap=overlap)
            try:
                with offload.one_kind_of_error():
                    return use(None)
            except torch.OutOfMemoryError:
                free = offload.free_bytes(self.device)
                where = f"in tiles of {tile}" if tile else "whole"
                self.note(f"VAE {where} ran out of memory ({free / 2**30:.1f} GiB free); the transformer made room")
            self.cache.make_room()
        raise OutOfMemory(
            f"the VAE ran out of memory {where}: {free / 2**30:.1f} GiB are free; use tiling auto, or unload models"
        )

    def _wants_compiled(self, job: DecodeJob | EncodeJob, dtype, *, shared: bool) -> bool:
        """Whether the VAE's layers are to run compiled, the same on all ranks that are in it."""
        large = self.device.type == "cuda" and codec.working_bytes(job, dtype) >= layers.WORTH_COMPILING
        if job.model.compile == "off" or (job.model.compile == "auto" and not large):
            return False
        reason = layers.why_not_compiled(self.device)
        return can_compile(self.note, "VAE not compiled", self.context.collect(reason) if shared else [reason])
