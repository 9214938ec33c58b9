"""The text states of the prompts that a command line asks for, encoded while the transformer is read where there is room for both."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import torch

from ..cogvideox import offload
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline.text import TextEncoder, find_place
from ..errors import first_line
from ..executor.base import Executor
from ..jobs import Report, SampleJob

logger = logging.getLogger(__name__)


def encode_prompts(
    texts: Sequence[str], job: SampleJob, checkpoint: Checkpoint, executor: Executor
) -> tuple[dict[str, torch.Tensor], Report]:
    """Text states of each prompt; the encoder's memory is free again.

    Args:
        texts: the prompts; what is there twice is encoded once.
        job: what they are for, with any text.
        checkpoint: that the job names.
        executor: that will run it; its devices may be used for the text.
    Returns:
        States by prompt, and what reading the transformer cost, if that was done meanwhile.
    """
    devices = executor.torch_devices
    place = find_place(checkpoint, devices, job.model.dtype, beside=beside(job, checkpoint, executor))
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
        stop.set()  # where this ends early, by Ctrl-C, closing the executor would wait for the weights


def beside(job: SampleJob, checkpoint: Checkpoint, executor: Executor) -> int:
    """Bytes that a rank needs for a job, the VAE, which stays there too, counted in."""
    plan, dtype = executor.plan.replica, checkpoint.dtype(job.model.dtype, executor.torch_devices[0])
    transformer = offload.transformer_bytes(checkpoint, plan, dtype, fp8=job.model.fp8 != "off")
    return transformer + offload.working_bytes(job, checkpoint, plan, dtype) + checkpoint.weight_bytes("vae", dtype)


def report_of(loaded: Future) -> Report:
    """What reading cost, once it is done. Where it failed, the job that needs it says why."""
    if error := loaded.exception():
        logger.info("the transformer was not read while the text was encoded: %s", first_line(error))
        return Report()
    return loaded.result()
