"""EventStream: an answer as server-sent events, that ends when its client goes away."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexjax.request import RequestOutput
from flexjax.server.disconnect import until_gone
from flexjax.server.errors import ApiError
from flexjax.server.generation import Generation

DONE = b"data: [DONE]\n\n"
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # made once: every token of every stream needs it


class Answer(Protocol):
    """The objects of an answer, whole or in pieces; see `CompletionAnswer`."""

    def body(self) -> dict[str, Any]: ...

    def opening(self) -> Iterator[dict[str, Any]]: ...

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]: ...

    def closing(self) -> dict[str, Any]: ...

    def usage(self) -> dict[str, Any]: ...


class EventStream(Response):
    """Owns its generation. A slow client is waited for; what its answer grows meanwhile is sent as one piece."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, answer: Answer, headers: Mapping[str, str]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._generation, self._answer = generation, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation:
            gone = asyncio.create_task(until_gone(receive))
            writing = asyncio.create_task(self._write(send))
            try:
                await asyncio.wait((gone, writing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                written = writing.done()
                writing.cancel()
                await asyncio.gather(gone, writing, return_exceptions=True)
            if written:
                writing.result()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        """One piece of bytes for all that one output has to say."""
        delivery = self._generation.delivery
        if opening := b"".join(self._event(each) for each in self._answer.opening()):
            yield opening
        try:
            async for index, output in self._generation.outputs.changes():
                self._generation.require_success(output)
                if data := b"".join(self._event(each) for each in self._answer.chunks(index, output)):
                    yield data
            if delivery.usage:
                yield encoded(self._answer.closing())
        except ApiError as error:
            yield encoded(error.body)
        yield DONE

    def _event(self, chunk: dict[str, Any]) -> bytes:
        """With usage asked for, chunks before the last say that they have none, as OpenAI's do."""
        delivery = self._generation.delivery
        if delivery.usage:
            chunk["usage"] = self._answer.usage() if delivery.running_usage else None
        return encoded(chunk)


def encoded(value: dict[str, Any]) -> bytes:
    return b"data: " + JSON.encode(value).encode() + b"\n\n"
