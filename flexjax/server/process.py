"""ServerProcess: the service on a port, until it is told to stop; then it drains."""

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from flexjax.fields import ConfigError
from flexjax.server.config import ServerConfig
from flexjax.server.service import Service

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
LAST_WORDS_SECONDS = 5
"""For answers on their way to clients, once no request runs any more."""

BACKLOG = 2048


def bind(config: ServerConfig) -> socket.socket:
    """The port, taken before the model is loaded, so that a port in use shows at once.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on host {config.host} port {config.port}: {error.strerror}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class ServerProcess(uvicorn.Server):
    """One worker. The first SIGTERM or SIGINT has it refuse new work with status 503 while running requests end, for
    at most ``drain_seconds``; the second ends it at once. It also ends when the engine has failed.

    Args:
        app: made by `create_app`.
    """

    def __init__(self, app: Starlette, config: ServerConfig):
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                access_log=False,
                log_config=None,
                backlog=BACKLOG,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
                server_header=False,
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds = config.drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came; or somebody in this process asks to stop (with any number)."""
        if self._service.admission.draining:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: refusing new work, %d sequences end", signal.Signals(sig).name, self._service.admission.open)
        self._service.admission.draining = True

    async def main_loop(self) -> None:
        """Until told to stop, and then until nothing runs or the time is up; what still runs is ended."""
        loop = asyncio.get_running_loop()
        ticks = asyncio.create_task(super().main_loop())
        try:
            while not self.should_exit:
                await asyncio.sleep(LOOK_SECONDS)
                self._look(loop.time())
        finally:
            self.should_exit = True
            await ticks
        if self._service.admission.open:
            await run_in_threadpool(self._service.engine.close)  # which tells every client

    def _look(self, now: float) -> None:
        admission, failure = self._service.admission, self._service.engine.loop.failure
        if failure is not None:  # its clients have been told; another process can go on with its jobs
            logger.critical("the engine has failed, the service stops: %s", failure)
            self.should_exit = True
        if not admission.draining:
            return
        self._deadline = now + self._drain_seconds if self._deadline is None else self._deadline
        if now >= self._deadline and admission.open:
            logger.warning("drain_seconds is %s: %d sequences are ended", self._drain_seconds, admission.open)
        if now >= self._deadline or not admission.open:
            self.should_exit = True
