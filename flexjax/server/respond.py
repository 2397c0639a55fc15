"""respond: what is generated for one request, as one object or as a stream of events."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flexjax.server.generation import Generation, begin
from flexjax.server.owner import owner_of
from flexjax.server.request_log import note_answer
from flexjax.server.service import service_of
from flexjax.server.streaming import Answer, EventStream
from flexjax.tokenizer import Tokenizer


async def respond(
    request: Request, *, chat: bool, answer_of: Callable[[Generation, Tokenizer | None, str], Answer]
) -> Response:
    """Generate what the body asks for.

    Args:
        answer_of: makes the answer from the generation, the tokenizer and the base model's name.

    Raises:
        ApiError: the request is refused or fails. ClientDisconnect: the client has gone.
    """
    service = service_of(request)
    generation = await begin(request, chat)
    answer = answer_of(generation, service.engine.tokenizer, service.base_name)
    note_answer(request, generation)
    if generation.delivery.stream:
        return EventStream(generation, answer, service.rates.headers(owner_of(request)))
    with generation:
        await generation.until_ended(request)
    return JSONResponse(answer.body(), headers=service.rates.headers(owner_of(request)))
