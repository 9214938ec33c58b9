"""Forward passes of the transformer: the inputs that all steps of a job share, and the prediction for one window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...jobs import SampleJob, WindowJob
from ...model import ControlNet
from ..attention.function import AttentionFunction
from ..attention.registry import FUNCTIONS, LAST_RESORT
from ..checkpoint.checkpoint import Checkpoint
from ..transformer.controlnet import Control, ControlBranch
from ..transformer.positions import rotary_tables


@dataclass(frozen=True)
class Runtime:
    """What a rank computes with."""

    device: torch.device
    """Where latents are stored."""
    dtype: torch.dtype
    """Of latents and text states."""
    context: Any
    """How ranks share the work; a :class:`parallel_backend.parallel.rank.RankContext`."""
    attention: AttentionFunction = FUNCTIONS[LAST_RESORT]
    """Of the blocks."""
    branches: tuple[ControlBranch, ...] = ()
    """The job's ControlNets, on the device."""


def prompts_of(job: SampleJob | WindowJob, numbers: tuple[int, int] = (0, 0)) -> list[torch.Tensor]:
    """Returns the text states that a step runs the model on: negative and positive if it is guided, else positive only.

    Args:
        job: with text states.
        numbers: indices of the negative and the positive prompt, if the job has several; see :meth:`SampleJob.prompts_of`.
    """
    sides = list(zip((job.negative, job.positive), numbers))
    return [text if text.ndim == 3 else text[:, number] for text, number in (sides if job.guided else sides[1:])]


@dataclass(frozen=True)
class Text:
    """The prompts of a forward pass. Create it with :meth:`of`."""

    states: torch.Tensor
    """Of this rank's prompts, ``[prompts * batch, tokens, features]``."""
    prompts: int
    """Number of prompts that all ranks together run: 2 if guided, else 1."""
    spared: bool = False
    """Whether the step is guided, but its unconditional half is spared."""

    @classmethod
    def of(cls, prompts: Sequence[torch.Tensor], videos: int, runtime: Runtime, *, spared: bool = False) -> "Text":
        """Prepares prompts as returned by :func:`prompts_of`, each for so many videos; with ``spared`` the positive one only."""
        wanted = prompts[-1:] if spared else prompts
        states = torch.cat([prompt.expand(videos, -1, -1) for prompt in runtime.context.share(wanted)])
        return cls(states.to(device=runtime.device, dtype=runtime.dtype), len(wanted), spared)


def guide(halves: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """Returns the guided velocity from both predictions, or the only one. The scale is ignored then."""
    if len(halves) == 1:
        return halves[0]
    negative, positive = halves
    return negative + scale * (positive - negative)


@dataclass(frozen=True)
class Forward:
    """The transformer with the inputs that all forward passes of a job share. Create it with :meth:`of`."""

    transformer: Any
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    """Position tables for the window's length."""
    ofs: torch.Tensor | None
    """See ``Checkpoint.ofs``."""
    runtime: Runtime
    token: int = 1
    """Latent frames per token."""

    @classmethod
    def of(
        cls, transformer, checkpoint: Checkpoint, job: SampleJob | WindowJob, latents: torch.Tensor, runtime: Runtime
    ) -> "Forward":
        """Prepares a job's forward passes for ``latents`` ``[batch, frames, channels, height, width]`` of one window."""
        _, frames, _, height, width = latents.shape
        rotary = rotary_tables(checkpoint, frames, height, width, runtime.device, riflex=job.riflex)
        ofs = None if checkpoint.ofs is None else latents.new_tensor([checkpoint.ofs])
        return cls(transformer, rotary, ofs, runtime, checkpoint.patch_size_t or 1)

    def predict(
        self,
        seen: torch.Tensor,
        timestep: torch.Tensor,
        text: Text,
        *,
        nets: Sequence[ControlNet] = (),
        cache=None,
    ) -> list[torch.Tensor]:
        """Predicts the velocity of one window for each prompt, float32. The result depends on the arguments only.

        Frames that do not fill a token are followed by zeros: VideoX-Fun's models of CogVideoX 1.5 make a single frame so.

        Args:
            seen: noisy latents concatenated with the condition and the control videos, ``[batch, frames, channels, height, width]``.
            timestep: of all frames; a tensor on the device, as copying it there would synchronize.
            text: the prompts.
            nets: the runtime's ControlNets as they are in this step.
            cache: of this window, or None.
        """
        mine, frames = len(text.states) // len(seen), seen.shape[1]
        seen, controls = self._split(seen, nets, mine)
        if lacking := -frames % self.token:
            seen = torch.cat([seen, torch.zeros_like(seen[:, :1]).repeat(1, lacking, 1, 1, 1)], dim=1)
        predicted = self.transformer(
            hidden_states=torch.cat([seen] * mine),
            encoder_hidden_states=text.states,
            timestep=timestep.expand(len(text.states)).to(seen.device),
            ofs=self.ofs,
            image_rotary_emb=self.rotary,
            attention_kwargs={"cache": cache, "attention": self.runtime.attention, "controls": controls, "spared": text.spared},
            return_dict=False,
        )[0]
        return [half[:, :frames].float() for half in self.runtime.context.gather(predicted.chunk(mine), of=text.prompts)]

    def _split(self, seen: torch.Tensor, nets: Sequence[ControlNet], prompts: int) -> tuple[torch.Tensor, list[Control]]:
        """Returns the transformer's input, and what each ControlNet that is on gets for so many prompts."""
        branches = self.runtime.branches
        channels = [branch.channels for branch in branches]
        seen, *videos = seen.split([seen.shape[2] - sum(channels), *channels], dim=2)
        parts = zip(branches, videos, nets)
        return seen, [
            Control(branch, torch.cat([video] * prompts), net.strength) for branch, video, net in parts if net.strength
        ]


@torch.inference_mode()
def predict_window(transformer, checkpoint: Checkpoint, job: WindowJob, runtime: Runtime) -> torch.Tensor:
    """Runs one window's forward pass for a denoise loop in another process; see :meth:`Forward.predict`."""
    seen = job.seen.to(device=runtime.device, dtype=runtime.dtype)
    text = Text.of(prompts_of(job), len(seen), runtime)
    forward = Forward.of(transformer, checkpoint, job, seen, runtime)
    return guide(forward.predict(seen, torch.tensor(job.timestep), text, nets=job.controlnets), job.scale).cpu()
