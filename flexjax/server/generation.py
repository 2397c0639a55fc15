"""Generation: what one HTTP request has the engine generate, from its body to the last token."""

import asyncio
import queue
import time
from concurrent.futures import Future
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from flexjax.engine.adapters import NoRoomForAdapter, UnknownAdapter
from flexjax.engine.engine import Submission
from flexjax.request import RequestOutput
from flexjax.server.bodies import parse_body, read_body
from flexjax.server.bridge import Bridge
from flexjax.server.delivery import Delivery, split_delivery
from flexjax.server.disconnect import until_gone
from flexjax.server.errors import ApiError, api_error_of, internal_error, model_not_found, no_room, stopping
from flexjax.server.outputs import Outputs
from flexjax.server.prompts import chat_encoder
from flexjax.server.protocol import GenerationRequest, translate
from flexjax.server.service import Service, service_of
from flexjax.server.timeline import Timeline


@dataclass(frozen=True, slots=True)
class PromptListener:
    """What the engine tells of one prompt's sequences; ``first`` is the index of the first of them."""

    bridge: Bridge
    outputs: Outputs
    first: int

    def put(self, output: RequestOutput) -> None:
        self.bridge.put(self.outputs, self.first + output.index, output)


class Generation:
    """A context manager: leaving it ends what still runs, and makes room for others.

    Attributes:
        prompts: token ids of each.
        outputs: as they grow; prompt p's sample s has the index p * n + s.
    """

    def __init__(self, service: Service, request: GenerationRequest, delivery: Delivery, arrival: float):
        """On a worker's thread: encode and submit, for a request that admission has let in as one sequence.

        Raises:
            ValueError: the prompts cannot be continued. ApiError: there is no room.
        """
        engine = service.engine
        self.request, self.delivery, self._service = request, delivery, service
        self.prompts = request.encode(engine.encode, chat_encoder(engine))
        require_context(self.prompts, engine.config.max_model_len, "messages" if request.messages else "prompt")
        self.count = len(self.prompts) * request.sampling.n
        self.outputs = Outputs(self.count, Timeline(service.totals, arrival, self.count))
        service.admission.widen(self.count)
        try:
            self._submitted: Future[list[list[int]]] = engine.submit_soon(self._submissions())
        except BaseException:
            service.admission.leave(self.count - 1)
            raise

    def _submissions(self) -> list[Submission]:
        request, n = self.request, self.request.sampling.n
        listeners: list[queue.SimpleQueue | PromptListener] = [
            PromptListener(self._service.bridge, self.outputs, position * n) for position in range(len(self.prompts))
        ]
        pairs = zip(self.prompts, listeners, strict=True)
        return [Submission(ids, request.sampling, request.adapter, each, request.priority) for ids, each in pairs]

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._service.admission.leave(self.count)
        if not self.outputs.ended:
            self._submitted.add_done_callback(self._cancel)

    def _cancel(self, submitted: Future[list[list[int]]]) -> None:
        if submitted.exception() is None:
            self._service.engine.cancel_soon([each for ids in submitted.result() for each in ids])

    async def accepted(self) -> None:
        """Wait until the engine's thread has taken the sequences. Raises ApiError."""
        try:
            # shielded, since the engine's thread could not answer a cancelled future
            await asyncio.shield(asyncio.wrap_future(self._submitted))
        except UnknownAdapter as error:
            raise model_not_found(self.request.adapter) from error
        except NoRoomForAdapter as error:
            raise no_room(error) from error
        except ValueError as error:
            raise api_error_of(error) from error

    async def until_ended(self, request: Request) -> None:
        """Wait for the last token, but no longer than the client does.

        Raises:
            ClientDisconnect: it has gone. ApiError: a sequence failed.
        """
        gone = asyncio.create_task(until_gone(request.receive))
        ended = asyncio.create_task(self.outputs.until_ended())
        try:
            await asyncio.wait((gone, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            ended.cancel()
        if not self.outputs.ended:
            raise ClientDisconnect
        for output in self.outputs.newest:
            require_success(output)


def require_context(prompts: list[list[int]], limit: int, field: str) -> None:
    """Raises ApiError for a prompt that leaves no room, in the words by which clients know that it is too long."""
    longest = max(map(len, prompts))
    if longest >= limit:
        message = f"This model's maximum context length is {limit} tokens (max_model_len); the prompt has {longest}."
        raise ApiError(400, message, field, "context_length_exceeded")


def require_success(output: RequestOutput) -> None:
    """Raises ApiError if a sequence did not end by itself; those of a client that has gone are not looked at."""
    if output.finish_reason == "abort":
        raise stopping()
    if output.finish_reason == "error":
        raise internal_error()


async def begin(request: Request, chat: bool) -> Generation:
    """The generation that a request asks for, accepted by the engine.

    Raises:
        ApiError: why not. ClientDisconnect: the client has gone.
    """
    arrival, service = time.perf_counter(), service_of(request)
    service.admission.enter()
    try:
        raw = await read_body(request, service.config.max_body_bytes)
        generation = await run_in_threadpool(submit, service, raw, chat, arrival)
    except BaseException:
        service.admission.leave(1)
        raise
    try:
        await generation.accepted()
    except BaseException:
        generation.close()
        raise
    return generation


def submit(service: Service, raw: bytes, chat: bool, arrival: float) -> Generation:
    """On a worker's thread, since long prompts take long to encode and a program may have to be compiled."""
    try:
        delivery, body = split_delivery(parse_body(raw), chat)
        defaults = service.engine.defaults.sampling
        request = translate(body, chat=chat, base_names=service.base_names, defaults=defaults)
        if request.adapter is not None and not service.trained.find(request.adapter):
            raise model_not_found(request.adapter)  # the engine would say so too, after much work
        return Generation(service, request, delivery, arrival)
    except (ValueError, ApiError) as error:
        raise api_error_of(error) from error
