"""The hardware as the planner sees it: rates of devices and of the links between them. Importable without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

RATES = ("matrix", "attention", "bandwidth")
"""The fields of :class:`Machine` that are measured."""
SLOW_LINK = 2e9
"""Bandwidth between GPUs below which the user is warned, in bytes per second. In a step of CogVideoX-5b at its own size each rank sends
9 GB with ulysses2 and 2 MB with cfg2."""


@dataclass(frozen=True)
class Link:
    """The link between one rank and the others."""

    bandwidth: float
    """Bytes per second in one direction that one rank reaches while all send."""
    latency: float
    """Minimum seconds of an exchange."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind and their links."""

    name: str
    matrix: float
    """Operations per second of a large matrix product in 16 bits."""
    attention: float
    """Operations per second of one attention in bf16."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    link: Link
    """Link between devices of one host."""
    network: Link
    """Link between hosts."""
    attention_fp16: float | None = None
    """Like ``attention``, in fp16; None if it is the same."""
    matrix_fp8: float = 1.0
    """Speedup of matrix products in FP8."""
    matrix_int8: float = 1.0
    """Speedup of matrix products in int8."""
    attention_fp8: float = 1.0
    """Speedup of attention in FP8."""
    compiles: bool = True
    """Whether blocks are compiled when the model says ``auto``."""
    free: int | None = None
    """Free bytes of each device; None if unknown, and then everything fits."""
    per_machine: int = 8
    """Devices in one host."""
    knows_seconds: bool = True
    """Whether the rates are those of a real GPU. If not, only the order of plans is meaningful."""
    can_shard: bool = True
    """Whether ``fsdp`` and ``pipefusion`` may be used: they cannot be combined with offload by parts."""
    rates_from: str = "assumed"
    """Source of the rates, for the user."""
    link_from: str = "assumed"
    """Source of the link's rates, for the user."""
    knows_link: bool = False
    """Whether the link was measured."""
    together: tuple["Machine", ...] = ()
    """If devices are unequal: the machine that the first one, the first two, … of them form. Empty if all are equal."""

    @property
    def describe(self) -> str:
        """The rates and their sources in one line."""
        return (
            f"rates of {self.name}: {self.matrix / 1e12:.3g} TFLOP/s in products, {self.attention / 1e12:.3g} in attention, memory "
            f"{self.bandwidth / 1e12:.3g} TB/s ({self.rates_from}); link: {self.link.bandwidth / 1e9:.3g} GB/s, "
            f"{self.link.latency * 1e6:.0f} us ({self.link_from})"
        )

    def first(self, count: int) -> "Machine":
        """Returns the machine that the fastest ``count`` devices form."""
        return self.together[count - 1] if self.together else self


def as_slow_as(each: Sequence[Machine]) -> Machine:
    """Returns the machine that devices form when they wait for each other in every step; its links are those of the slowest."""
    slowest = min(each, key=lambda machine: machine.matrix)
    return replace(
        slowest,
        name=" and ".join(dict.fromkeys(machine.name for machine in each)),
        rates_from="; ".join(dict.fromkeys(machine.rates_from for machine in each)),
        knows_seconds=all(machine.knows_seconds for machine in each),
        free=min((machine.free for machine in each if machine.free is not None), default=None),
        **{name: min(getattr(machine, name) for machine in each) for name in RATES},
    )


GLOO = Link(1e9, 1e-6)
"""Link between processes on one CPU: assumed, with a latency so small that bytes decide and Ulysses is preferred to a ring."""
CPU = Machine("cpu", matrix=1e11, attention=5e10, bandwidth=1e10, link=GLOO, network=GLOO, compiles=False, knows_seconds=False)
"""Processes on a CPU. Only the order of plans is meaningful."""
