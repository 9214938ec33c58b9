"""How one forward pass is split: checked arithmetic, importable without torch."""

import re
from dataclasses import dataclass, fields

from .errors import RequestError

SINGLE = "single"
AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """Degrees that multiply to the number of processes.

    Raises:
        RequestError: for a degree that no forward pass can be split by.
    """

    cfg: int = 1
    """1, or 2 to compute the negative and the positive prompt on different ranks."""
    ulysses: int = 1
    """Ranks that share the attention heads; must divide them."""
    ring: int = 1
    """Ranks that pass keys and values around; takes any number."""

    def __post_init__(self):
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or degree < 1:
                raise RequestError(f"plan: {field.name} is {degree}; a degree is a whole number from 1")
        if self.cfg > 2:
            raise RequestError(f"plan: cfg is {self.cfg}; there are two halves to share, so it is 1 or 2")

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
        parts = [f"{f.name}{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return "-".join(parts) or SINGLE

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence of tokens."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Processes the plan needs."""
        return self.cfg * self.sequence

    def check_heads(self, heads: int) -> None:
        """Refuses an Ulysses degree that the model's heads do not divide by.

        Raises:
            RequestError: naming the legal degrees.
        """
        if heads % self.ulysses:
            legal = [str(n) for n in range(1, heads + 1) if heads % n == 0 and n <= 16]
            raise RequestError(
                f"plan '{self}': ulysses{self.ulysses} does not divide this model's {heads} heads; "
                f"use ulysses {', '.join(legal)}, or ring{self.ulysses}"
            )

    def check_world(self, world_size: int) -> None:
        """Refuses a plan whose degrees do not multiply to the devices given.

        Raises:
            RequestError: printing every factor.
        """
        if self.world_size != world_size:
            factors = " x ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))
            raise RequestError(
                f"plan '{self}' needs {self.world_size} devices ({factors}) but {world_size} were given; "
                f"change the plan, or the devices"
            )
