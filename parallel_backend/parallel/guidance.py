"""Classifier-free guidance over two ranks (``cfg2``): each runs one of a step's two prompts."""

from collections.abc import Sequence

import torch

from ..plan import Plan


class GuidanceSplit:
    """This rank's share of a step's prompts.

    Args:
        degree: ranks of the group, 1 or 2.
        group: xDiT's group of these ranks.
    """

    def __init__(self, degree: int, group):
        self.degree = degree
        self.group = group

    @property
    def half(self) -> int:
        """Which of the two prompts this rank runs; 0 if guidance is not split."""
        return self.group.rank_in_group

    def share(self, prompts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Returns those prompts of a step that this rank runs. A single prompt is run by every rank."""
        if self.degree == len(prompts):
            return prompts[self.group.rank_in_group :][:1]
        return prompts

    def gather(self, mine: Sequence[torch.Tensor], *, of: int) -> Sequence[torch.Tensor]:
        """Returns the predictions for all ``of`` prompts, in order, given this rank's."""
        if len(mine) == of:
            return mine
        (own,) = mine
        return self.group.all_gather(own.contiguous(), separate_tensors=True)


def why_not_joined(plan: Plan, heads: int, gpus: Sequence[tuple[int, str]]) -> str | None:
    """Returns why the ranks of both halves cannot share the tokens of one prompt, in one line, or None.

    Args:
        plan: with ``cfg2``, without PipeFusion.
        heads: of a rank's transformer.
        gpus: half and name of the GPU of each rank.
    """
    ranks = plan.cfg * plan.ulysses
    if plan.ring > 1:
        return "a ring cannot take in the other half's ranks"
    if heads % ranks:
        return f"{heads} heads do not divide by {ranks} ranks"
    of_halves = [sorted(gpu for half, gpu in gpus if half == number) for number in range(plan.cfg)]
    if of_halves[0] != of_halves[1]:
        return "the halves' GPUs differ, and so may their attention functions"
    return None
