"""Terms: what the latency model's table calls the programs of an iteration, and the positions that they attend to.

    program   ("forward", layout)   ("loss", window)   ("backward", window)   ("lean_backward", window)   ("update",)
    position  ("rows", layout)                         ("span", window)       ("lean_span", window)
              ("tiles", layout)

A file of `LatencyModel.save` has these names. A window counts in slots.
"""

from types import MappingProxyType

PROGRAMS = ("forward", "loss", "backward", "lean_backward", "update")
"""Kinds of terms that are compiled programs; the others are prices of a position in them."""

SPANS = MappingProxyType({"backward": "span", "lean_backward": "lean_span"})
"""Of programs whose time grows with the positions that their window attends to, the kind of a position's price."""


def unit_term(kind: str, window: int = 0, lean: bool = False) -> tuple:
    """A call of the program of a unit.

    Args:
        kind: a `UnitKind`.
        window: 0 for an update, which has none.
        lean: of a backward unit: its tape keeps less.
    """
    name = "lean_backward" if lean else str(kind)
    return (name, window) if window else (name,)


def span_of(program: tuple) -> tuple | None:
    """A position that the window of this program attends to; None if it attends to nothing."""
    kind = SPANS.get(program[0])
    return None if kind is None else (kind, *program[1:])
