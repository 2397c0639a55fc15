"""Patience: how long a request waits for the engine's thread, which may be stuck."""

import asyncio
from typing import Any

from flexjax.server.errors import ApiError


async def answer_of(asked: asyncio.Future, seconds: float) -> Any:
    """What it answers, or raises. It goes on when the time is up, so that several can wait for the same.

    Raises:
        ApiError: 503, there is no answer after so many seconds.
    """
    done, _ = await asyncio.wait((asked,), timeout=seconds)
    if not done:
        raise ApiError(503, f"The engine has not answered for {seconds:g} seconds.", code="engine_busy")
    return asked.result()
