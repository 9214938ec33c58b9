"""Compiles a transformer's blocks while its weights are read: both take seconds, and neither needs the other.

What is compiled asks of weights and tokens only what they are like. So one block with weights of no meaning, given tokens such as
a job's, does it for all blocks.
"""

import copy
import logging
import sys
import threading

import torch

from ..errors import first_line
from ..jobs import SampleJob, WindowJob
from ..parallel.split import Split
from ..parallel.transformer import JointSequence
from . import blocks
from .checkpoint import Checkpoint
from .denoise import prompts_of, rotary_tables
from .windows import forward_size

logger = logging.getLogger(__name__)
SWITCH_SECONDS = 1e-4
"""Python's threads take turns so often meanwhile: whoever reads weights lets go for each copy, and would wait 5 ms to go on."""
USUAL_SWITCH_SECONDS = sys.getswitchinterval()
MIDDLE = 1
"""A block that is neither the first nor the last, which have hooks."""


class Rehearsal:
    """One block's forward, in a thread of its own.

    Args:
        transformer: without weights so far; with three blocks or more.
        sequence: attached to it.
        job: that it is going to do.
        checkpoint: of the transformer.
        split: this rank's share.
        dtype: of tokens.
    """

    def __init__(
        self, transformer, sequence: JointSequence, job: SampleJob | WindowJob, checkpoint: Checkpoint, split: Split, dtype
    ):
        self.block = copy.deepcopy(transformer.transformer_blocks[MIDDLE])
        self.time_features = transformer.config.time_embed_dim
        self.sequence, self.job, self.checkpoint, self.split, self.dtype = sequence, job, checkpoint, split, dtype
        self._thread = threading.Thread(target=self._run, name="rehearsal")
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def wait(self) -> None:
        """Waits for its end."""
        self._thread.join()
        sys.setswitchinterval(USUAL_SWITCH_SECONDS)

    def _run(self) -> None:
        device = self.split.device
        # What a stream of its own used goes back whole; else weights would come to lie in the middle of it.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                if blocks.why_not_compiled(device) is None:
                    self._forward(device)
                self.split.synchronize()
        except Exception as error:
            logger.warning(
                "blocks were not compiled beside the reading of weights, so the first step does it: %s", first_line(error)
            )
        self.block.to_empty(device="meta")  # its forward holds on to it until Python looks for cycles

    def _forward(self, device: torch.device) -> None:
        job, checkpoint = self.job, self.checkpoint
        videos, frames, height, width = forward_size(job, checkpoint)
        blocks.use_in(self.block.to_empty(device=device), compiled=True)
        batch = videos * len(self.split.share(prompts_of(job)))
        like = {"device": device, "dtype": self.dtype}
        with torch.inference_mode():
            self.sequence.rehearse(
                self.block,
                torch.empty(batch, frames, 1, height, width, **like),
                torch.empty(batch, job.positive.shape[1], checkpoint.heads * checkpoint.head_dim, **like),
                rotary_tables(checkpoint, frames, height, width, device),
                torch.empty(batch, self.time_features, **like),
            )
