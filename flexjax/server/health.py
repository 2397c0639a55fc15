"""/health and /version."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flexjax.server.patience import answer_of
from flexjax.server.service import service_of
from flexjax.version import __version__

PATIENCE = 10.0
"""Seconds in which the engine's thread has to answer; an iteration takes a fraction of one."""


async def health(request: Request) -> Response:
    """Status 200 while the engine's thread answers and new work is taken, else 503."""
    service = service_of(request)
    service.admission.require_open()
    await answer_of(asyncio.wrap_future(service.engine.loop.post(lambda: None)), PATIENCE)
    return Response()


async def version(_: Request) -> Response:
    return JSONResponse({"version": __version__})


ROUTES = (Route("/health", health), Route("/version", version))
