"""What a job computes and keeps, for the planner."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from .cogvideox.attention.registry import can_ring
from .cogvideox.checkpoint import controlnet
from .cogvideox.checkpoint.checkpoint import Checkpoint
from .cogvideox.checkpoint.compression import SPATIAL, frames_of, latent_frames_of
from .cogvideox.offload import block_parts
from .cogvideox.pipeline.upscaling import blank_parts, tiles_of
from .cogvideox.pipeline.windows import Layout, forward_size
from .jobs import Job, SampleJob, UpscaleJob, WindowJob
from .model import Model
from .planner.work import Work


@dataclass(frozen=True)
class Workload:
    """What a plan is chosen and checked for. Make it with :meth:`of` or :meth:`of_job`."""

    heads: int
    """Attention heads of the model."""
    layers: int | None = None
    """Blocks of the model; None if unknown."""
    guided: bool = True
    """Whether each step runs the model on both prompts."""
    offload: str = "auto"
    """As in :class:`parallel_backend.model.Model`."""
    work: Callable[[torch.device], Work] | None = None
    """One step on a device, or a window of it if ``jobs`` counts windows; None assumes a published model at its own size."""
    jobs: int = 1
    """Jobs that run one after the other, or windows or tiles of one job."""
    unit: str = "videos"
    """What ``jobs`` counts, for the user."""
    batch: int | None = None
    """Videos in each job; None for a job that does not sample."""
    can_share: bool = True
    """Whether replicas may share the jobs and the videos of a batch."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, can_share: bool = True) -> "Workload":
        """Returns the workload of a checkpoint at its own size."""
        return cls(checkpoint.heads, checkpoint.layers, work=partial(work_of, checkpoint), can_share=can_share)

    @classmethod
    def of_job(cls, job: Job, checkpoint: Checkpoint, *, jobs: int = 1) -> "Workload":
        """Returns the workload of a job, or of several jobs of its size."""
        if isinstance(job, UpscaleJob):
            return cls.of_tiles(job, checkpoint)
        if not isinstance(job, SampleJob):
            return cls.of(checkpoint, can_share=False)
        windows, is_shared = windows_of(job, checkpoint), jobs == 1 and has_windows_to_share(job, checkpoint)
        return cls(
            heads=checkpoint.heads,
            layers=checkpoint.layers,
            guided=job.guided,
            offload=job.model.offload,
            work=partial(work_of_job, job, checkpoint, windows=1 if is_shared else windows),
            jobs=windows if is_shared else jobs,
            unit="windows" if is_shared else "videos",
            batch=len(job.latent),
            # With a step cache a video of a batch differs a little from one made alone.
            can_share=jobs > 1 or not job.model.step_cache,
        )

    @classmethod
    def of_tiles(cls, job: UpscaleJob, checkpoint: Checkpoint) -> "Workload":
        """Returns the workload of enlarging a video. A step is a tile: the VAE encodes it, the transformer sees it, the VAE decodes it."""
        forward, _ = blank_parts(job, checkpoint)
        tiles = tiles_of(job)
        return cls(
            heads=checkpoint.heads,
            layers=checkpoint.layers,
            guided=False,
            offload=job.model.offload,
            work=lambda device: replace(work_of_job(forward, checkpoint, device), pixels=math.prod(tiles[0].size)),
            jobs=len(tiles),
            unit="tiles",
            batch=1,
        )


def has_windows_to_share(job: SampleJob, checkpoint: Checkpoint) -> bool:
    """Whether a job is one video in several windows, each of which any replica can predict. Caches stay where they were filled.

    Windows that continue a start image wait for each other.
    """
    cached = job.model.step_cache or (job.guided and job.model.guidance_cache)
    return len(job.latent) == 1 and job.image is None and not cached and windows_of(job, checkpoint) > 1


def windows_of(job: SampleJob, checkpoint: Checkpoint) -> int:
    """Returns the number of windows in the first step."""
    return len(Layout.of(job, checkpoint).at(0))


def work_of(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    size: tuple[int, int, int] | None = None,
    guided: bool = True,
    batch: int = 1,
    model: Model | None = None,
) -> Work:
    """Returns what one step computes and keeps. Reads no weights.

    Args:
        checkpoint: the model.
        device: where it runs; decides what ``auto`` means for dtype.
        size: width and height in pixels, and frames; None for the checkpoint's own.
        guided: whether cfg is above 1.
        batch: videos in the step.
        model: its dtype, quantisation, compilation and attention; None for the defaults.
    """
    width, height, frames = size or checkpoint.default_size
    tokens = checkpoint.tokens(latent_frames_of(frames), height // SPATIAL, width // SPATIAL) + checkpoint.text_tokens
    model = model or Model(str(checkpoint.path))
    found = checkpoint.dtype(model.dtype, device)
    vectors, matrices = block_parts(checkpoint, found, quantized=model.quantization != "off")
    whole = sum(block_parts(checkpoint, found))
    return Work(
        layers=checkpoint.layers,
        heads=checkpoint.heads,
        head_dim=checkpoint.head_dim,
        tokens=tokens,
        prompts=batch * (2 if guided else 1),
        itemsize=found.itemsize,
        matrices=matrices,
        vectors=vectors,
        rest=checkpoint.weight_bytes("transformer", found) - whole,
        guided=guided,
        dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(found, "fp32"),
        quantize=model.quantization,
        attention_fp8=model.attention_function == "fp8",
        compile=model.compile,
        can_ring=can_ring(model.attention),
    )


def work_of_job(job: SampleJob | WindowJob, checkpoint: Checkpoint, device: torch.device, *, windows: int = 1) -> Work:
    """Returns the work of one step of a job.

    Args:
        job, checkpoint: what is computed.
        device: see :func:`work_of`.
        windows: those of the job's windows that the step runs one after the other.
    """
    batch, frames, height, width = forward_size(job, checkpoint)
    size = (width * SPATIAL, height * SPATIAL, frames_of(frames))
    work = work_of(checkpoint, device, size=size, guided=job.guided, batch=batch, model=job.model)
    files = controlnet.open_all(job.controlnets, checkpoint)
    beside = controlnet.weight_bytes(job.controlnets, checkpoint.dtype(job.model.dtype, device))
    return replace(work, rest=work.rest + beside, beside=sum(file.layers for file in files), windows=windows)
