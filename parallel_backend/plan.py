"""Plans: how a forward pass is split over ranks. Importable without torch."""

import re
from dataclasses import dataclass, fields, replace

from .errors import RequestError

SINGLE = "single"
AUTO = "auto"
IN_PARTS = ("group", "sequential")
"""Offload modes that load weights from the CPU in parts, by hooks. The hooks stay: to leave a mode, weights are read again."""
MOST_RANKS = 1024
"""Ranks of a plan, and of each of its degrees, at most. What is typed while a workflow is edited must not become a loop without end."""


@dataclass(frozen=True)
class Plan:
    """Degrees that multiply to the number of ranks, except ``fsdp``.

    Raises:
        RequestError: for a degree that is not possible, alone or together with the others.
    """

    cfg: int = 1
    """1, or 2 to compute the negative and the positive prompt on different ranks."""
    tensor: int = 1
    """Tensor parallelism: ranks that split attention heads and feed-forward with their weights. Must divide the heads."""
    ulysses: int = 1
    """Ulysses: ranks that split the sequence and exchange it for heads by all-to-all. Must divide the heads that ``tensor``
    leaves a rank."""
    ring: int = 1
    """Ring attention: ranks that split the sequence and pass keys and values around. Any number."""
    pipefusion: int = 1
    """PipeFusion: stages of consecutive blocks that pass patches of the sequence on. A stage is a rank, or ``ulysses`` ranks.
    Not exact."""
    fsdp: int = 1
    """Fully sharded data parallelism: ranks, among those of the other degrees, that hold a shard of each block's weights and
    gather the block when it runs."""
    replicas: int = 1
    """Groups with the rest of the plan each. They share the videos of a batch, not a forward pass."""

    def __post_init__(self):
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or degree < 1:
                raise RequestError(f"plan: {field.name} is {degree}; use a whole number from 1")
        if self.cfg > 2:
            raise RequestError(f"plan: cfg is {self.cfg}; guidance has two halves, so use 1 or 2")
        if max(self.world_size, self.fsdp) > MOST_RANKS:
            raise RequestError(f"plan '{self}' is for more than {MOST_RANKS} devices; use lower degrees")
        self._check_pipefusion()
        self._check_fsdp()

    def _check_pipefusion(self) -> None:
        """Refuses degrees that split what a stage keeps: the keys and values of a token, and the weights of a block."""
        if self.pipefusion == 1:
            return
        if self.ring > 1:
            other = replace(self, ulysses=self.sequence, ring=1)
            why = (
                "ring passes keys and values around and pipefusion keeps them; "
                f"use '{other}', or '{replace(self, pipefusion=1)}'"
            )
        elif self.tensor > 1:
            other = replace(self, pipefusion=self.pipefusion * self.tensor, tensor=1)
            why = (
                "tensor has all-reduces in every block, which pipefusion avoids; "
                f"use '{other}', or '{replace(self, pipefusion=1)}'"
            )
        elif self.fsdp > 1:
            why = (
                "pipefusion splits the weights already, and fsdp would gather them for every patch; "
                f"use '{replace(self, fsdp=1)}', or a higher pipefusion degree"
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
                f"plan '{self}': fsdp shards weights over ranks that have the same weights, and here there is only one; "
                f"use '{replace(self, cfg=2, fsdp=2)}', or '{replace(self, ulysses=2, fsdp=2)}'"
            )
        legal = ", ".join(str(n) for n in range(2, holders + 1) if holders % n == 0)
        raise RequestError(
            f"plan '{self}': fsdp{self.fsdp} does not divide the {holders} ranks that have the same weights; use fsdp {legal}"
        )

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads ``single`` or degrees such as ``cfg2-ulysses4``.

        Raises:
            RequestError: for other text, with the part that is not understood.
        """
        known = [field.name for field in fields(cls)]
        degrees: dict[str, int] = {}
        for part in [] if text == SINGLE else text.split("-"):
            match = re.fullmatch(r"([a-z]+)(\d{1,9})", part)
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
        """Ranks that split one sequence of tokens."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Number of processes of the plan."""
        return self.replicas * self.replica_size

    @property
    def replica_size(self) -> int:
        """Number of processes that split one forward pass."""
        return self.cfg * self.tensor * self.sequence * self.pipefusion

    @property
    def replica(self) -> "Plan":
        """The plan of one replica."""
        return replace(self, replicas=1)

    @property
    def talks_much(self) -> bool:
        """Whether ranks exchange tokens or weights in every block, not only once in a step."""
        return self.replica_size > self.cfg * self.pipefusion or self.fsdp > 1

    @property
    def is_exact(self) -> bool:
        """Whether the video is that of ``single``, except for rounding."""
        return self.pipefusion == 1

    def fits(self, heads: int) -> bool:
        """Returns whether the heads of a model can be split. The width of its feed-forward is a multiple of the heads."""
        return heads % (self.tensor * self.ulysses) == 0

    def check_heads(self, heads: int) -> None:
        """Refuses degrees that do not divide the model's heads.

        Raises:
            RequestError: with the possible degrees.
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
            RequestError: with the highest possible degree.
        """
        if self.pipefusion > layers:
            raise RequestError(
                f"plan '{self}': pipefusion{self.pipefusion} is {self.pipefusion} stages and this model has {layers} blocks; "
                f"use '{replace(self, pipefusion=layers)}'"
            )

    @property
    def without_pipefusion(self) -> "Plan":
        """The nearest exact plan with the same number of devices."""
        return replace(self, ulysses=self.ulysses * self.pipefusion, pipefusion=1)

    def can_offload(self, mode: str) -> bool:
        """Returns whether the plan works with an offload mode.

        With ``fsdp`` or ``pipefusion`` weights cannot be loaded in parts: ``fsdp`` gathers them in parts itself, and
        ``pipefusion`` uses all blocks of its rank for every patch.
        """
        return (self.fsdp == 1 and self.pipefusion == 1) or mode not in IN_PARTS

    def check_offload(self, mode: str) -> None:
        """Refuses an offload mode that does not work with the plan; see :meth:`can_offload`.

        Raises:
            RequestError: with the nearest plan and the modes that work.
        """
        if self.can_offload(mode):
            return
        if self.fsdp > 1:
            why, other = "keeps weights on the CPU and fsdp keeps them on the devices", replace(self, fsdp=1)
        else:
            why, other = "would load all blocks of a rank again for every patch", self.without_pipefusion
        raise RequestError(f"plan '{self}': offload '{mode}' {why}; use plan '{other}', or offload 'auto', 'none' or 'model'")

    def check_world(self, devices: int, nodes: int = 1) -> None:
        """Refuses a plan whose degrees do not multiply to the number of devices.

        Args:
            devices: on each machine.
            nodes: number of machines.
        Raises:
            RequestError: with the degrees that multiply to its devices.
        """
        if self.world_size != devices * nodes:
            given = "1 was given" if devices * nodes == 1 else f"{devices * nodes} were given"
            given += f", {devices} on each of {nodes} machines" if nodes > 1 else ""
            degrees = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "fsdp"}
            factors = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
            product = f" ({' x '.join(factors)})" if len(factors) > 1 else ""
            need = f"{self.world_size} devices{product}" if factors else "1 device"
            raise RequestError(f"plan '{self}' needs {need} but {given}; change the plan, or the devices")


def divisors(heads: int) -> str:
    """Returns the degrees up to 16 that divide a number of heads, as text."""
    return ", ".join(str(n) for n in range(1, min(heads, 16) + 1) if heads % n == 0)
