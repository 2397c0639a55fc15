"""ApiError: a refusal as OpenAI's API words it, and which of our exceptions becomes which."""

import errno
import sqlite3
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from flexjax.engine.loop import EngineStopped
from flexjax.server.prompts import BodyError

CLIENT_GONE = 499
"""Status in the log of a request whose client did not wait for the answer (nginx's number for it)."""

NO_ROOM_SECONDS = 60
"""After which a client may ask again for a model that jobs leave no room for."""

RESTART_SECONDS = 5
"""After which a client may look whether another server has taken the place of one that stops."""

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Args:
    status: of HTTP.
    param: the field of the body at fault.
    code: a word for programs, such as "model_not_found".
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


def model_not_found(name: str) -> ApiError:
    return ApiError(404, f"The model {name!r} does not exist.", "model", "model_not_found")


def not_found(method: str, path: str) -> ApiError:
    return ApiError(404, f"There is no {method} {path} here; /openapi.json has what there is.", code="unknown_url")


def stopping() -> ApiError:
    headers = {"Retry-After": str(RESTART_SECONDS)}
    return ApiError(503, "The server is stopping and takes no new work.", code="stopping", headers=headers)


def cut_short() -> ApiError:
    return ApiError(503, "The server has stopped before the answer was whole.", code="stopping")


def no_room(message: str) -> ApiError:
    """Jobs hold the places that a model needs, to their end."""
    return ApiError(503, message, "model", "no_room", headers={"Retry-After": str(NO_ROOM_SECONDS)})


def is_full(error: Exception) -> bool:
    """Whether the disk, or what of it the server may have, is full."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_full() -> ApiError:
    return ApiError(507, "The server's disk is full; nothing of this was kept.", code="storage_full")


def internal_error() -> ApiError:
    return ApiError(500, "The server made a mistake; its log says more under this request's id.", code="internal_error")


def api_error_of(error: Exception) -> ApiError:
    """What a client is told of an exception that is not our mistake; others are raised again."""
    match error:
        case ApiError():
            return error
        case BodyError():
            return ApiError(400, str(error), error.field)
        case ValueError():
            return ApiError(400, str(error))
        case EngineStopped():
            return ApiError(503, "The engine has stopped.", code="engine_stopped")
        case OSError() | sqlite3.Error() if is_full(error):
            return storage_full()
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    raise error


async def answer_error(_: Request, error: Exception) -> Response:
    return api_error_of(error).response()


async def answer_not_found(request: Request, _: Exception) -> Response:
    """No route has the path; what a route does not find is an ApiError."""
    return not_found(request.method, request.url.path).response()


async def answer_wrong_method(request: Request, _: Exception) -> Response:
    """With all that the path allows; a path may have several routes."""
    allowed: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            allowed |= route.methods
    message = f"The method is {request.method}; {request.url.path} takes {', '.join(sorted(allowed))}."
    return ApiError(405, message, headers={"Allow": ", ".join(sorted(allowed))}).response()


async def answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


EXCEPTION_HANDLERS = {
    ClientDisconnect: answer_nobody,
    **dict.fromkeys((ApiError, BodyError, EngineStopped, HTTPException, OSError, sqlite3.Error), answer_error),
    404: answer_not_found,
    405: answer_wrong_method,
}
"""Where an exception that is none of these gets out of a route, that is our mistake: status 500. So a ValueError of the
engine, which may be the client's, is translated beside the call."""
