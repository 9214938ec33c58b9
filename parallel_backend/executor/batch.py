"""A batch cut into its videos, each a job that can be run apart, and put together again."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from ..jobs import DecodeJob, EncodeJob, Job, SampleJob


def cut(job: Job) -> list[Job]:
    """A job for each video of the batch.

    One that goes on from some step is left whole, for the state that it goes on from is of the whole batch.
    """
    if isinstance(job, EncodeJob) or (isinstance(job, SampleJob) and job.progress is not None):
        return [job]
    batch = job.latent.shape[0]
    if batch == 1:
        return [job]
    return [piece(job, index, batch) for index in range(batch)]


def piece(job: SampleJob | DecodeJob, index: int, batch: int) -> Job:
    """One video's job; of what is there once for all videos it has all."""
    tensors = {item.name: getattr(job, item.name) for item in fields(job)}
    own = {
        name: tensor[index : index + 1].contiguous()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.shape[0] == batch
    }
    place = {"batch_size": batch, "batch_index": index} if isinstance(job, SampleJob) else {}
    return replace(job, **own, **place)


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batch of the videos' tensors."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
