"""What a plan runs on: the rates of a device, and of the links between its ranks. Importable without torch."""

from dataclasses import dataclass

SLOW_LINK = 2e9
"""Bytes a second between GPUs. A step of CogVideoX-5b at its own size sends 9 GB a rank with ulysses2 and 2 MB with cfg2."""


@dataclass(frozen=True)
class Link:
    """What one rank sends to others through."""

    bandwidth: float
    """Bytes a second, one way, as one rank reaches it while all send."""
    latency: float
    """Seconds that an exchange takes at least."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind, as the planner sees them."""

    name: str
    matrix: float
    """Operations a second of a large product in 16 bits."""
    attention: float
    """Operations a second of one attention in bf16."""
    bandwidth: float
    """Bytes a second of the memory."""
    link: Link
    """Between devices of one machine."""
    network: Link
    """Between machines."""
    attention_fp16: float | None = None
    """As ``attention``, in fp16; None where it is the same."""
    matrix_fp8: float = 1.0
    """How many times as fast products are in FP8."""
    attention_fp8: float = 1.0
    """How many times as fast attention is in FP8."""
    compiles: bool = True
    """Whether blocks are compiled where the model says ``auto``."""
    free: int | None = None
    """Bytes that each device can give; None where that is not known, and everything fits."""
    per_machine: int = 8
    """Devices in one machine."""
    knows_seconds: bool = True
    """Whether rates are a GPU's own; else only the order of plans is to be believed."""
    can_shard: bool = True
    """Whether ``fsdp`` and ``pipefusion`` may be used: they do not go with weights that wait on the CPU in parts."""
    rates_from: str = "assumed"
    """Where the rates come from, for a person."""
    link_from: str = "assumed"
    """Where the link's come from."""
    knows_link: bool = False
    """Whether the link's are not assumed."""
    together: tuple["Machine", ...] = ()
    """Where devices are unequal: what the first one, two, … of them are together; empty where all are alike."""

    @property
    def describe(self) -> str:
        """What is known of them and from where, in one line."""
        return (
            f"rates of {self.name}: {self.matrix / 1e12:.3g} TFLOP/s in products, {self.attention / 1e12:.3g} in attention, memory "
            f"{self.bandwidth / 1e12:.3g} TB/s ({self.rates_from}); link: {self.link.bandwidth / 1e9:.3g} GB/s, "
            f"{self.link.latency * 1e6:.0f} us ({self.link_from})"
        )

    def first(self, count: int) -> "Machine":
        """So many of the devices, the fastest."""
        return self.together[count - 1] if self.together else self


GLOO = Link(1e9, 1e-6)
"""Between processes of one CPU: assumed, with a latency so small that bytes decide, and Ulysses comes before a ring."""
CPU = Machine("cpu", matrix=1e11, attention=5e10, bandwidth=1e10, link=GLOO, network=GLOO, compiles=False, knows_seconds=False)
"""Processes on a CPU: the order of plans matters there, not their seconds."""
