"""How one forward pass is split: checked arithmetic, importable without torch."""

import re
from dataclasses import dataclass, fields, replace

from .errors import RequestError

SINGLE = "single"
AUTO = "auto"
IN_PARTS = ("group", "sequential")
"""Offload modes that bring weights from the CPU a part at a time, by hooks that stay: to leave one, weights are read again."""


@dataclass(frozen=True)
class Plan:
    """Degrees that multiply to the number of processes, ``fsdp`` aside.

    Raises:
        RequestError: for a degree that no forward pass can be split by, or that does not go with the others.
    """

    cfg: int = 1
    """1, or 2 to compute the negative and the positive prompt on different ranks."""
    tensor: int = 1
    """Ranks that share the weights of attention heads and feed-forward, and the work with them; must divide the heads."""
    ulysses: int = 1
    """Ranks that share the attention heads of their tokens; must divide those that ``tensor`` leaves a rank."""
    ring: int = 1
    """Ranks that pass keys and values around; takes any number."""
    pipefusion: int = 1
    """Ranks, or rows of ``ulysses`` ranks, that have some blocks each and pass patches of the tokens on; not exact."""
    fsdp: int = 1
    """Ranks, of those that the other degrees make, that keep a part of each block's weights and gather it when it runs."""
    replicas: int = 1
    """Groups of their own, each with the rest of the plan; they share videos, not a forward pass."""

    def __post_init__(self):
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or degree < 1:
                raise RequestError(f"plan: {field.name} is {degree}; a degree is a whole number from 1")
        if self.cfg > 2:
            raise RequestError(f"plan: cfg is {self.cfg}; there are two halves to share, so it is 1 or 2")
        self._check_pipefusion()
        self._check_fsdp()

    def _check_pipefusion(self) -> None:
        """Stages keep whole tokens' keys and values, and whole blocks."""
        if self.pipefusion == 1:
            return
        if self.ring > 1:
            other = replace(self, ulysses=self.sequence, ring=1)
            why = (
                f"a ring passes keys and values around that pipefusion keeps; use '{other}', or '{replace(self, pipefusion=1)}'"
            )
        elif self.tensor > 1:
            other = replace(self, pipefusion=self.pipefusion * self.tensor, tensor=1)
            why = (
                "tensor adds up over ranks in every block, which pipefusion is there to avoid; "
                f"use '{other}', or '{replace(self, pipefusion=1)}'"
            )
        elif self.fsdp > 1:
            why = (
                "pipefusion keeps its blocks' weights on a rank already and would gather them for every patch; "
                f"use '{replace(self, fsdp=1)}', or more pipefusion"
            )
        else:
            return
        raise RequestError(f"plan '{self}': {why}")

    def _check_fsdp(self) -> None:
        holders = self.replica_size // self.tensor
        if holders % self.fsdp == 0:
            return
        if holders == 1:
            raise RequestError(
                f"plan '{self}': fsdp shares weights over ranks that other degrees use, and there is one with the same weights; "
                f"use '{replace(self, cfg=2, fsdp=2)}', or '{replace(self, ulysses=2, fsdp=2)}'"
            )
        legal = ", ".join(str(n) for n in range(2, holders + 1) if holders % n == 0)
        raise RequestError(
            f"plan '{self}': fsdp{self.fsdp} does not divide the {holders} ranks that would have the same weights; use fsdp {legal}"
        )

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads ``single`` or degrees such as ``cfg2-ulysses4``.

        Raises:
            RequestError: for anything else, naming the part that is not understood.
        """
        known = [field.name for field in fields(cls)]
        degrees: dict[str, int] = {}
        for part in [] if text == SINGLE else text.split("-"):
            match = re.fullmatch(r"([a-z]+)(\d+)", part)
            if not match or match[1] not in known:
                raise RequestError(
                    f"plan '{text}': '{part}' is not understood; use '{SINGLE}', '{AUTO}', or degrees of "
                    f"{', '.join(known)} such as 'cfg2-ulysses2'"
                )
            if match[1] in degrees:
                raise RequestError(f"plan '{text}': {match[1]} is given twice")
            degrees[match[1]] = int(match[2])
        return cls(**degrees)

    def __str__(self) -> str:
        names = ["replicas", *(f.name for f in fields(self) if f.name != "replicas")]
        return "-".join(f"{name}{getattr(self, name)}" for name in names if getattr(self, name) > 1) or SINGLE

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence of tokens."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Processes the plan needs."""
        return self.replicas * self.replica_size

    @property
    def replica_size(self) -> int:
        """Processes that split one forward pass."""
        return self.cfg * self.tensor * self.sequence * self.pipefusion

    @property
    def replica(self) -> "Plan":
        """How each replica splits its forward passes."""
        return replace(self, replicas=1)

    @property
    def talks_much(self) -> bool:
        """Whether ranks exchange tokens or weights in every block, and not once in a step."""
        return self.replica_size > self.cfg * self.pipefusion or self.fsdp > 1

    @property
    def is_exact(self) -> bool:
        """Whether it gives the video of ``single``, to rounding."""
        return self.pipefusion == 1

    def fits(self, heads: int) -> bool:
        """Whether a model of so many heads can be split so. Its feed-forward is a multiple of the heads."""
        return heads % (self.tensor * self.ulysses) == 0

    def check_heads(self, heads: int) -> None:
        """Refuses degrees that the model's heads do not divide by.

        Raises:
            RequestError: naming the legal degrees.
        """
        if self.fits(heads):
            return
        if heads % self.tensor:
            raise RequestError(
                f"plan '{self}': tensor{self.tensor} does not divide this model's {heads} heads; use tensor {divisors(heads)}"
            )
        left, whose = heads // self.tensor, f"this model's {heads} heads"
        if self.tensor > 1:
            whose = f"the {left} of this model's {heads} heads that tensor{self.tensor} leaves a rank"
        raise RequestError(
            f"plan '{self}': ulysses{self.ulysses} does not divide {whose}; use ulysses {divisors(left)}, or ring{self.ulysses}"
        )

    def check_layers(self, layers: int) -> None:
        """Refuses more stages than the model has blocks.

        Raises:
            RequestError: naming the most that there can be.
        """
        if self.pipefusion > layers:
            raise RequestError(
                f"plan '{self}': pipefusion{self.pipefusion} is {self.pipefusion} stages and this model has {layers} blocks; "
                f"use '{replace(self, pipefusion=layers)}'"
            )

    @property
    def without_pipefusion(self) -> "Plan":
        """The nearest that is exact, of as many devices."""
        return replace(self, ulysses=self.ulysses * self.pipefusion, pipefusion=1)

    def can_offload(self, mode: str) -> bool:
        """Whether weights can wait as a mode says: ``fsdp`` brings them in parts itself, and ``pipefusion`` uses all of its own
        for every patch."""
        return (self.fsdp == 1 and self.pipefusion == 1) or mode not in IN_PARTS

    def check_offload(self, mode: str) -> None:
        """Refuses to move weights in parts that are gathered in parts, or needed for every patch.

        Raises:
            RequestError: naming the nearest plan and modes that work.
        """
        if self.can_offload(mode):
            return
        if self.fsdp > 1:
            why, other = "keeps weights on the CPU and fsdp keeps them on the devices", replace(self, fsdp=1)
        else:
            why, other = "would bring a rank's blocks anew for every patch", self.without_pipefusion
        raise RequestError(f"plan '{self}': offload '{mode}' {why}; use plan '{other}', or offload 'auto', 'none' or 'model'")

    def check_world(self, devices: int, nodes: int = 1) -> None:
        """Refuses a plan whose degrees do not multiply to the devices given: so many on each of so many hosts.

        Raises:
            RequestError: printing every factor.
        """
        if self.world_size != devices * nodes:
            given = f"{devices * nodes} were given" + (f", {devices} on each of {nodes} hosts" if nodes > 1 else "")
            factors = " x ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self) if f.name != "fsdp")
            raise RequestError(
                f"plan '{self}' needs {self.world_size} devices ({factors}) but {given}; change the plan, or the devices"
            )


def divisors(heads: int) -> str:
    """Degrees up to 16 that divide so many heads, for a person."""
    return ", ".join(str(n) for n in range(1, min(heads, 16) + 1) if heads % n == 0)
