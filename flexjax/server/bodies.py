"""Bodies of requests: read up to a limit, and parsed as one JSON object."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from flexjax.server.errors import ApiError
from flexjax.server.prompts import BodyError, kind_of

BODY_SECONDS = 60
"""In which a body must have come: meanwhile it takes room from others."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request.

    Raises:
        ApiError: 413 if it is longer than ``limit`` bytes, 415 if it says that it is something else than JSON, 408 if
            it does not come.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The content type is {kind or 'absent'!r}; it must be application/json.")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_long(limit)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await whole_body(request, limit)
    except TimeoutError as error:
        message = f"The body did not come within {BODY_SECONDS} seconds."
        raise ApiError(408, message, code="body_too_slow", headers={"Connection": "close"}) from error


async def whole_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_long(limit)
    return bytes(body)


def too_long(limit: int) -> ApiError:
    """The rest of the body is not read, so the connection cannot be used again."""
    message = f"The body is longer than {limit} bytes, the server's max_body_bytes."
    return ApiError(413, message, code="body_too_long", headers={"Connection": "close"})


def parse_body(raw: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises BodyError."""
    try:
        body = json.loads(raw, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise BodyError(f"the body is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise BodyError(f"the body is not valid JSON ({place}): {error.msg}") from error
    except RecursionError as error:
        raise BodyError("the body is nested too deeply") from error
    if not isinstance(body, dict):
        raise BodyError(f"the body is {kind_of(body)}; it must be an object")
    require_characters(raw, body)
    return body


def require_characters(raw: bytes, body: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair, which is no character: no tokenizer and no answer can hold it."""
    if rb"\ud" in raw.lower():
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BodyError("the body holds half of a surrogate pair, which is no character") from error


def refuse_constant(name: str) -> NoReturn:
    raise BodyError(f"the body holds {name}, which is not JSON")
