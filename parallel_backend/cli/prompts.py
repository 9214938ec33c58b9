"""Encodes prompts, and loads the transformer at the same time if both fit in memory."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.text import TextEncoder, find_place
from ..errors import reason_of
from ..executor.base import Executor
from ..jobs import Report, SampleJob

logger = logging.getLogger(__name__)


def encode_prompts(
    texts: Sequence[str], job: SampleJob, checkpoint: Checkpoint, executor: Executor
) -> tuple[dict[str, torch.Tensor], Report]:
    """Encodes prompts and frees the text encoder.

    Args:
        texts: the prompts; duplicates are encoded once.
        job: the job they are for; its own text does not matter.
        checkpoint: the job's.
        executor: will run the job; the text encoder may use its devices.
    Returns:
        Text states by prompt, and the report of loading the transformer, if that was done at the same time.
    """
    devices = executor.torch_devices
    place = find_place(checkpoint, devices, job.model.dtype, transformer_bytes=job_bytes(job, checkpoint, executor))
    if place.note:
        logger.warning(place.note)
    encoder = TextEncoder(checkpoint, device=place.device, dtype=place.dtype)
    encoder.read()
    thread, stop = ThreadPoolExecutor(1, thread_name_prefix="load"), Event()
    loaded = thread.submit(executor.load, job, should_stop=stop.is_set) if place.alongside else None
    thread.shutdown(wait=False)
    try:
        states = {text: encoder.encode_prompt(text) for text in dict.fromkeys(texts)}
        encoder.unload()
        return states, report_of(loaded) if loaded else Report()
    finally:
        stop.set()  # after Ctrl-C, closing the executor would otherwise wait for the weights


def job_bytes(job: SampleJob, checkpoint: Checkpoint, executor: Executor) -> int:
    """Returns the bytes that a rank needs for a job, the VAE included."""
    plan, dtype = executor.plan.replica, checkpoint.dtype(job.model.dtype, executor.torch_devices[0])
    weights = offload.job_weight_bytes(job, checkpoint, plan, dtype) + checkpoint.weight_bytes("vae", dtype)
    return weights + offload.working_bytes(job, checkpoint, plan, dtype)


def report_of(loaded: Future) -> Report:
    """Waits for loading and returns its report. An empty one if it failed: the job that needs the weights reports the error."""
    if error := loaded.exception():
        logger.info("the transformer was not loaded while the text was encoded: %s", reason_of(error))
        return Report()
    return loaded.result()
