"""note: what the line in the log says of a request beside what is always there."""

from typing import Any

from starlette.types import Scope

KEY = "flexjax.notes"
"""Of the ASGI scope."""


def note(scope: Scope, **notes: Any) -> None:
    """Have the request's line say this too; of a function, what it returns when the line is written."""
    scope[KEY].update(notes)
