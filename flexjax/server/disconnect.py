"""Waiting for a client to go away."""

from starlette.types import Receive


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
