"""Splits a batch into one job per video, and joins the results."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from ..jobs import DecodeJob, EncodeJob, Job, SampleJob


def cut(job: Job) -> list[Job]:
    """Returns a job for each video of the batch.

    A job that resumes from a step is not split, as its state is that of the whole batch.
    """
    if isinstance(job, EncodeJob) or (isinstance(job, SampleJob) and job.progress is not None):
        return [job]
    batch = job.latent.shape[0]
    if batch == 1:
        return [job]
    return [one_video(job, index, batch) for index in range(batch)]


def one_video(job: SampleJob | DecodeJob, index: int, batch: int) -> Job:
    """Returns the job of one video of a batch. Tensors that all videos share are kept whole."""
    tensors = {item.name: getattr(job, item.name) for item in fields(job)}
    own = {
        name: tensor[index : index + 1].contiguous()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.shape[0] == batch
    }
    place = {"batch_size": batch, "batch_index": index} if isinstance(job, SampleJob) else {}
    return replace(job, **own, **place)


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joins the videos' tensors to a batch."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
