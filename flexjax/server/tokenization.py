"""/tokenize and /detokenize, as vLLM has them."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flexjax.config import nearest
from flexjax.server.bodies import parse_body, read_body
from flexjax.server.errors import ApiError, model_not_found
from flexjax.server.owner import owner_of
from flexjax.server.prompts import BodyError, messages_of
from flexjax.server.protocol import is_chat, typed
from flexjax.server.service import Service, service_of
from flexjax.tokenizer import Tokenizer

TOKENIZE = {
    "model": str,
    "prompt": str,
    "messages": list,
    "add_special_tokens": bool,
    "add_generation_prompt": bool,
    "return_token_strs": bool,
}
DETOKENIZE = {"model": str, "tokens": tuple[int, ...]}


async def fields_of(request: Request, hints: dict[str, Any]) -> dict[str, Any]:
    """Those that have a value. Raises BodyError, ApiError."""
    service = service_of(request)
    body = parse_body(await read_body(request, service.config.max_body_bytes))
    for name, value in body.items():
        if name not in hints:
            raise BodyError(f"unknown field {name!r}{nearest(name, hints)}", name)
        if value is not None:
            typed(name, value, hints[name])
    model = body.get("model")
    if model is not None and model not in service.base_names:
        if model not in await run_in_threadpool(service.catalog.names, owner_of(request)):
            raise model_not_found(model)
    return {name: value for name, value in body.items() if value is not None}


def tokenizer_of(service: Service) -> Tokenizer:
    if service.engine.tokenizer is None:
        raise ApiError(400, "The model was loaded without a tokenizer.")
    return service.engine.tokenizer


def encode(tokenizer: Tokenizer, body: dict[str, Any]) -> list[int]:
    """Token ids of a text or a conversation. Raises ApiError."""
    try:
        if is_chat(body):
            generation_prompt = body.get("add_generation_prompt", True)
            text = tokenizer.render_chat(list(messages_of(body["messages"])), generation_prompt)
            return tokenizer.encode(text, body.get("add_special_tokens", False))
        return tokenizer.encode(body["prompt"], body.get("add_special_tokens", True))
    except BodyError:
        raise
    except ValueError as error:  # the template refuses the conversation
        raise ApiError(400, str(error)) from error


async def tokenize(request: Request) -> Response:
    body, service = await fields_of(request, TOKENIZE), service_of(request)
    tokenizer = tokenizer_of(service)
    ids = await run_in_threadpool(encode, tokenizer, body)
    texts = [tokenizer.token_text(each) for each in ids] if body.get("return_token_strs") else None
    limit = service.engine.config.max_model_len
    return JSONResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})


async def detokenize(request: Request) -> Response:
    body, service = await fields_of(request, DETOKENIZE), service_of(request)
    ids, last = body.get("tokens"), service.engine.model.vocab_size - 1
    if ids is None:
        raise BodyError("tokens is absent; it must be a list of token ids", "tokens")
    wrong = next((each for each in ids if not 0 <= each <= last), None)
    if wrong is not None:
        raise BodyError(f"tokens holds {wrong}; the model's ids are 0 to {last}", "tokens")
    text = await run_in_threadpool(tokenizer_of(service).decode, ids, False)
    return JSONResponse({"prompt": text})


ROUTES = (Route("/tokenize", tokenize, methods=["POST"]), Route("/detokenize", detokenize, methods=["POST"]))
