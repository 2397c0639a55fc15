"""What a collective costs: latency plus bytes over bandwidth, and how often a training step pays it."""

from dataclasses import dataclass

RING_PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""Times that an array travels a ring: an all-reduce is a reduce-scatter and an all-gather (Patarasuk and Yuan 2009)."""


@dataclass(frozen=True)
class Collective:
    """One collective over the shards.

    Attributes:
        kind: a key of RING_PASSES.
        bytes: of the whole array, per token or, for those of an update, in all.
    """

    kind: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.kind} {self.bytes:,} B"


@dataclass(frozen=True)
class CommunicationModel:
    """Cost of collectives between the devices of one host.

    The defaults are round figures for GPUs joined by NVLink 4, not measurements; give the ones of the machine (for
    example from nccl-tests) where they differ.

    Attributes:
        latency: seconds from the start of a small collective to its end.
        bandwidth: bytes per second that each device sends.
    """

    latency: float = 1e-5
    bandwidth: float = 3.5e11

    def seconds(self, collective: Collective, tokens: int, tp: int) -> float:
        """One call for so many tokens over ``tp`` devices in a ring, each sending 1/tp of the array at a time."""
        sent = RING_PASSES[collective.kind] * (tp - 1) / tp * collective.bytes * tokens
        return self.latency + sent / self.bandwidth


@dataclass(frozen=True)
class Traffic:
    """How many tokens share a call.

    Attributes:
        step_tokens: of a forward step or a backward window.
        update_tokens: between two updates of the adapter.
    """

    step_tokens: int = 512
    update_tokens: int = 8192
