"""RequestLog: every request has an id, and leaves one line of JSON in the log when it has ended."""

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexjax.server.errors import internal_error
from flexjax.server.generation import Generation
from flexjax.server.service import service_of

logger = logging.getLogger("flexjax.requests")
mistakes = logging.getLogger(__name__)

KEY = "flexjax.notes"
"""Of the ASGI scope: what the routes add to the line."""

ID_HEADER = "X-Request-Id"
GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestLog:
    """The outermost application. An exception that reaches it is our mistake: it is logged with its traceback and
    answered with status 500."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(ID_HEADER, "")
        entry = Entry(scope, given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex, send)
        try:
            await self._app(scope, receive, entry.send)
        except Exception:
            mistakes.exception("request %s failed", entry.request_id)
            if entry.status is None:
                await internal_error().response()(scope, receive, entry.send)
        finally:
            entry.write()
            service_of(Request(scope)).answered.take(scope, entry.status)


class Entry:
    """One request on its way through.

    Attributes:
        status: that was sent; None before.
    """

    def __init__(self, scope: Scope, request_id: str, send: Send):
        self.request_id, self.status = request_id, None
        self._scope, self._send = scope, send
        self._began, self._whole = time.perf_counter(), False
        scope[KEY] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[ID_HEADER] = self.request_id
        elif not message.get("more_body"):
            self._whole = True
        await self._send(message)

    def write(self) -> None:
        line = {
            "request_id": self.request_id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            "seconds": round(time.perf_counter() - self._began, 6),
            **({} if self._whole else {"client_gone": True}),
            **{name: value() if callable(value) else value for name, value in self._scope[KEY].items()},
        }
        logger.info("%s", json.dumps(line))


def note(scope: Scope, **notes: Any) -> None:
    """Have the request's line say this too; of a function, what it returns when the line is written."""
    scope[KEY].update(notes)


def note_answer(request: Request, generation: Generation) -> None:
    """Have the request's line say what was generated; the numbers are read when it is written."""
    outputs = generation.outputs.newest
    note(
        request.scope,
        adapter=generation.request.adapter,
        stream=generation.delivery.stream,
        prompt_tokens=sum(map(len, generation.prompts)),
        generated_tokens=lambda: sum(len(each.token_ids) for each in outputs if each is not None),
        finish_reasons=lambda: [None if each is None else each.finish_reason for each in outputs],
    )
