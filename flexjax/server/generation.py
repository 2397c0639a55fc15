"""Generation: what one HTTP request has the engine generate, from its body to the last token."""

import asyncio
import queue
import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

import flexjax
from flexjax.engine.adapters import NoRoomForAdapter, UnknownAdapter
from flexjax.engine.submission import Submission
from flexjax.request import RequestOutput
from flexjax.server.bodies import parse_body, read_body
from flexjax.server.bridge import Bridge
from flexjax.server.delivery import Delivery, split_delivery
from flexjax.server.disconnect import until_gone
from flexjax.server.errors import ApiError, api_error_of, cut_short, internal_error, model_not_found, no_room
from flexjax.server.loaded_adapters import cannot_be_loaded
from flexjax.server.outputs import Outputs
from flexjax.server.owner import owner_of
from flexjax.server.prompts import BodyError, chat_encoder
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

    def __init__(
        self,
        service: Service,
        owner: str,
        request: GenerationRequest,
        adapter: str | None,
        delivery: Delivery,
        arrival: float,
    ):
        """On a worker's thread: encode and submit, for a request that admission has let in as one sequence.

        Args:
            adapter: the engine's name for the adapter that the request means.

        Raises:
            ValueError: the prompts cannot be continued (BodyError names the field). ApiError: there is no room.
        """
        engine = service.engine
        self._owner = owner
        self.request, self.delivery, self._service, self._adapter = request, delivery, service, adapter
        self.prompts = encoded_prompts(request, engine)
        self.count = len(self.prompts) * request.sampling.n
        self.outputs = Outputs(self.count, Timeline(service.totals, arrival, request.sampling, self.count))
        self._allowed = self._allowed_tokens()
        with ExitStack() as undo:
            service.rates.take_tokens(owner, self._allowed)
            undo.callback(service.rates.give_back, owner, self._allowed)
            service.admission.widen(owner, self.count)
            undo.callback(service.admission.leave, owner, self.count - 1)
            self._submitted: Future[list[list[int]]] = engine.submit_soon(self._submissions())
            undo.pop_all()

    def _allowed_tokens(self) -> int:
        """Of the prompts, and as many more as the body names."""
        params, limit = self.request.sampling, self._service.engine.config.max_model_len
        more = 0 if params.max_tokens is None else params.max_tokens
        return sum(len(prompt) + params.n * min(more, limit - len(prompt)) for prompt in self.prompts)

    def _used_tokens(self) -> int:
        generated = sum(len(each.token_ids) for each in self.outputs.newest if each is not None)
        return sum(map(len, self.prompts)) + generated

    def _submissions(self) -> list[Submission]:
        request, n = self.request, self.request.sampling.n
        listeners: list[queue.SimpleQueue | PromptListener] = [
            PromptListener(self._service.bridge, self.outputs, position * n) for position in range(len(self.prompts))
        ]
        pairs = zip(self.prompts, listeners, strict=True)
        settings = request.sampling, self._adapter
        return [Submission(ids, *settings, each, request.priority, self._owner) for ids, each in pairs]

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._service.admission.leave(self._owner, self.count)
        self._service.rates.give_back(self._owner, self._allowed - self._used_tokens())
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
            catalog = self._service.catalog
            raise no_room(await run_in_threadpool(catalog.readable, self._owner, str(error))) from error
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
            self.require_success(output)

    def require_success(self, output: RequestOutput) -> None:
        """Raises ApiError if a sequence did not end by itself; those of a client that has gone are not looked at."""
        if output.finish_reason == "abort":
            raise cut_short()
        if output.finish_reason == "error":
            fault = None if self._adapter is None else self._service.loaded.fault(self._adapter)
            raise internal_error() if fault is None else cannot_be_loaded(self.request.adapter, fault)


def encoded_prompts(request: GenerationRequest, engine: "flexjax.Engine") -> list[list[int]]:
    """Token ids of each. Raises ApiError, BodyError for one that cannot be continued."""
    field = "messages" if request.messages else "prompt"
    try:
        prompts = request.encode(engine.encode, chat_encoder(engine))
    except ValueError as error:
        raise BodyError(str(error), field) from error
    if not all(prompts):
        raise BodyError("the prompt has no tokens; it needs at least one", field)
    require_context(prompts, engine.config.max_model_len, field)
    return prompts


def require_context(prompts: list[list[int]], limit: int, field: str) -> None:
    """Raises ApiError for a prompt that leaves no room, in the words by which clients know that it is too long."""
    longest = max(map(len, prompts))
    if longest >= limit:
        message = f"This model's maximum context length is {limit} tokens (max_model_len); the prompt has {longest}."
        raise ApiError(400, message, field, "context_length_exceeded")


async def begin(request: Request, chat: bool) -> Generation:
    """The generation that a request asks for, accepted by the engine.

    Raises:
        ApiError: why not. ClientDisconnect: the client has gone.
    """
    arrival, service, owner = time.perf_counter(), service_of(request), owner_of(request)
    service.rates.take_request(owner)
    service.admission.enter(owner)
    try:
        raw = await read_body(request, service.config.max_body_bytes)
        generation = await run_in_threadpool(submit, service, owner, raw, chat, arrival)
    except BaseException:
        service.admission.leave(owner, 1)
        raise
    try:
        await generation.accepted()
    except BaseException:
        generation.close()
        raise
    return generation


def submit(service: Service, owner: str, raw: bytes, chat: bool, arrival: float) -> Generation:
    """On a worker's thread, since long prompts take long to encode and a program may have to be compiled."""
    try:
        delivery, body = split_delivery(parse_body(raw), chat)
        defaults = service.engine.defaults.sampling
        request = translate(body, chat=chat, base_names=service.base_names, defaults=defaults)
        asked = None if body.get("priority") is None else request.priority
        request = replace(request, priority=service.limits.priority(owner, asked))
        adapter = adapter_of(service, owner, request.adapter)
        return Generation(service, owner, request, adapter, delivery, arrival)
    except (ValueError, ApiError) as error:
        raise api_error_of(error) from error


def adapter_of(service: Service, owner: str, name: str | None) -> str | None:
    """The engine's name for the adapter that an owner means, which is on the device then. Raises ApiError."""
    if name is None:
        return None
    found = service.catalog.bring(owner, name)
    if found is None:
        raise model_not_found(name)  # the engine would say so too, after much work
    return found
