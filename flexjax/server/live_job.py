"""Live: a job of a client that the engine has, and how much of it is written down."""

from concurrent.futures import Future
from dataclasses import dataclass

from flexjax.engine.handles import FinetuneHandle
from flexjax.weights.adapter import LoraAdapter


@dataclass(eq=False)
class Live:
    """Attributes:
    handle: None while the engine takes the job in.
    trained: its adapter, from its success on. It is the job's own: clients may unload what its name means.
    seen, status: what of it is written down.
    written: is done when its last checkpoints are on the disk; None before its end.
    cancelling: a client asked for the end; else a cancelled job is one that the engine gave up when it stopped.
    ended: its end is written down.
    """

    id: str
    handle: FinetuneHandle | None = None
    trained: LoraAdapter | None = None
    seen: int = 0
    status: str = ""
    written: Future | None = None
    cancelling: bool = False
    ended: bool = False

    def take(self, trained: LoraAdapter) -> None:
        """On the engine's thread."""
        self.trained = trained
