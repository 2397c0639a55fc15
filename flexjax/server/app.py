"""create_app: the HTTP service as an ASGI application. Each area of the API is a module that brings its routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware

import flexjax
from flexjax.server import adapters, chat, completions, health, models, monitoring, tokenization
from flexjax.server.config import ServerConfig
from flexjax.server.errors import EXCEPTION_HANDLERS
from flexjax.server.request_log import RequestLog
from flexjax.server.service import Service

AREAS = (models, completions, chat, tokenization, adapters, monitoring, health)


def create_app(engine: "flexjax.Engine", config: ServerConfig) -> Starlette:
    """The service of an engine, which the caller closes after it. Its parts are in ``app.state.service``."""
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.bridge.open(asyncio.get_running_loop())
        yield

    app = Starlette(
        routes=[route for area in AREAS for route in area.ROUTES],
        middleware=[Middleware(RequestLog)],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.state.service = service
    return app
