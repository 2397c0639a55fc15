"""create_app: the HTTP service as an ASGI application. Each area of the API is a module that brings its routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware

import flexjax
from flexjax.server import (
    adapters,
    chat,
    completions,
    dashboard,
    files,
    fine_tuning,
    health,
    models,
    monitoring,
    openapi,
    tokenization,
)
from flexjax.server.config import ServerConfig
from flexjax.server.errors import EXCEPTION_HANDLERS
from flexjax.server.guard import Guard
from flexjax.server.keys import read_keys
from flexjax.server.origins import cross_origin
from flexjax.server.request_log import RequestLog
from flexjax.server.service import Service

AREAS = (models, completions, chat, tokenization, adapters, files, fine_tuning, monitoring, dashboard, health, openapi)


def create_app(engine: "flexjax.Engine", config: ServerConfig) -> Starlette:
    """The service of an engine. Its parts are in ``app.state.service``, which the caller closes after the engine.

    Raises:
        ConfigError: the data folder cannot be used, or the file of keys.
    """
    keys = read_keys(config)
    service = Service(engine, config, keys)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.bridge.open(asyncio.get_running_loop())
        service.keeper.open()
        yield
        await run_in_threadpool(service.keeper.close)

    app = Starlette(
        routes=[route for area in AREAS for route in area.ROUTES],
        middleware=[*cross_origin(config.allowed_origins), Middleware(RequestLog), Middleware(Guard, keys=keys)],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.state.service = service
    return app
