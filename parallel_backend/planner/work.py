"""The work of one step, and the share of each rank under a plan. Importable without torch."""

from dataclasses import dataclass

from ..plan import Plan
from .machine import Machine

PATCHES, PATCHES_PER_STAGE = 8, 2
"""Patches of a sequence under ``pipefusion``, and patches for each stage; the larger number counts. With more patches the pipeline's
bubble is smaller, but more keys come from the previous step."""
VAE_OPERATIONS = 27.4e6
"""Floating-point operations per pixel of a video that the VAE encodes (8.8e6) and decodes (18.6e6); counted."""


@dataclass(frozen=True)
class Work:
    """One step of a job, for all prompts."""

    layers: int
    heads: int
    head_dim: int
    tokens: int
    """Text and video tokens of one prompt."""
    prompts: int
    """Two for each video with guidance, else one."""
    itemsize: int
    """Bytes per element of the compute dtype."""
    matrices: int
    """Bytes of the matrices of all blocks as they are stored, quantised or not."""
    vectors: int
    """Bytes of the other weights of all blocks."""
    rest: int
    """Bytes of the weights outside the blocks."""
    guided: bool = True
    """Whether each step runs the model on both prompts."""
    dtype: str = "bf16"
    quantize: str = "off"
    """What linear layers are rounded to: ``off``, ``fp8`` or ``int8``."""
    attention_fp8: bool = False
    """Whether attention is in FP8 where that is supported."""
    compile: str = "auto"
    """``auto``, ``on`` or ``off``."""
    can_ring: bool = True
    """Whether its attention function works in a ring."""
    beside: int = 0
    """Blocks of ControlNets, whose weights count as ``rest``: every rank has them whole."""
    windows: int = 1
    """Windows of the video that the step runs the model on, one after the other; the other fields are of one of them."""
    pixels: int = 0
    """Pixels of all frames that the VAE encodes and decodes in the step, as for a tile of a video that is enlarged."""

    @property
    def videos(self) -> int:
        """Videos that are sampled together."""
        return self.prompts // (2 if self.guided else 1)

    @property
    def features(self) -> int:
        """Features of one token."""
        return self.heads * self.head_dim

    @property
    def products(self) -> float:
        """Floating-point operations of a step's matrix products."""
        return 24 * self.tokens * self.features**2 * (self.layers + self.beside) * self.prompts

    @property
    def attention(self) -> float:
        """Floating-point operations of a step's attention."""
        return 4 * self.tokens**2 * self.features * (self.layers + self.beside) * self.prompts

    def is_compiled(self, machine: Machine) -> bool:
        """Whether blocks run compiled on this machine."""
        return machine.compiles if self.compile == "auto" else self.compile == "on"


def states_bytes(plan: Plan, work: Work) -> float:
    """Returns the bytes of the hidden states of a rank's prompts and tokens."""
    return work.prompts / plan.cfg * work.tokens / plan.sequence * work.features * work.itemsize


def stage_layers(plan: Plan, layers: int) -> int:
    """Returns the number of blocks of the largest stage."""
    return -(-layers // plan.pipefusion)


def patches(tokens: int, stages: int, ranks: int = 1) -> int:
    """Returns the number of patches that a sequence is split into for a pipeline.

    It is ``PATCHES`` or ``PATCHES_PER_STAGE`` for each stage, or less if there are fewer tokens: no patch is all padding.

    Args:
        tokens: text and video tokens of the sequence.
        stages: stages of the pipeline.
        ranks: ranks that share each patch.
    """
    length = -(-tokens // (max(PATCHES, PATCHES_PER_STAGE * stages) * ranks))
    return -(-tokens // (length * ranks))


def plan_patches(plan: Plan, work: Work) -> int:
    """Returns the number of patches of a step under a plan; 1 without a pipeline."""
    return patches(work.tokens, plan.pipefusion, plan.ulysses) if plan.pipefusion > 1 else 1


def bubble_factor(plan: Plan, work: Work) -> float:
    """Returns a step's time relative to a rank's own work: above 1 with a pipeline, as stages wait at its start and its end."""
    count = plan_patches(plan, work)
    return (count + plan.pipefusion - 1) / count
