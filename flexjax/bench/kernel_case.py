"""KernelCase: one operation at one shape, with what must be moved and computed, and other ways to compute it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexjax.bench.timing import Call

PREFERRED = {True: ("mosaic_gpu", "reference"), False: ("reference",)}
"""Implementations in the order in which they are taken, with a GPU and without."""

LEAST_CALLS, MOST_CALLS = 6, 32
"""In one program: enough that its own begin and end hardly count; as many as a step of a model of 32 layers makes."""


def as_they_are(state: Any, arguments: Any) -> Any:
    return arguments


@dataclass(frozen=True)
class Alternative:
    """Another way to compute a case, with the compiler's own choices instead of the engine's unless it says otherwise.

    Attributes:
        call: as in ``timing``.
        adapt: (state, arguments) of the case to the arguments of ``call``; not timed.
        comparable: its output is that of the operation.
        on_gpu_only: it needs cuDNN or a kernel of the GPU's.
        engine_options: it is compiled as the engine compiles, as the case itself is.
    """

    call: Call
    adapt: Callable[[Any, Any], Any] = as_they_are
    comparable: bool = True
    on_gpu_only: bool = False
    engine_options: bool = False


@dataclass(frozen=True)
class KernelCase:
    """Attributes:
    operation: of ``pallas_kernels``.
    shape: sizes in words.
    bytes: that must move once; flops: of the products, both of one call.
    calls: in one program, each on data of its own.
    prepare: implementation name to (state, arguments) on the device; the state is what the operation changes in place.
    call: implementation name to the call.
    implementations: of the operation.
    alternatives: by name.
    beside_reference: the operation's other implementations are alternatives too; not where they take very long.
    """

    name: str
    operation: str
    shape: str
    bytes: float
    flops: float
    calls: int
    prepare: Callable[[str], tuple[Any, Any]]
    call: Callable[[str], Call]
    implementations: tuple[str, ...] = ("reference",)
    alternatives: Mapping[str, Alternative] = field(default_factory=dict)
    beside_reference: bool = True

    def chosen(self, on_gpu: bool) -> str:
        """The implementation that is measured."""
        return next(name for name in PREFERRED[on_gpu] if name in self.implementations)

    def rivals(self, on_gpu: bool) -> dict[str, Alternative]:
        """The alternatives that this machine can run."""
        runnable = [name for name in PREFERRED[on_gpu] if name in self.implementations and self.beside_reference]
        others = [name for name in runnable if name != self.chosen(on_gpu)]
        rivals = {name: Alternative(self.call(name)) for name in others}
        return rivals | {name: rival for name, rival in self.alternatives.items() if on_gpu or not rival.on_gpu_only}


def calls_for(bytes_of_a_call: float, cold_bytes: float) -> int:
    """So many calls that together they touch ``cold_bytes``; the next program finds nothing of its own in a cache."""
    return max(LEAST_CALLS, min(MOST_CALLS, round(cold_bytes / bytes_of_a_call)))
