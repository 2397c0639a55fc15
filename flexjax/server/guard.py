"""Guard: lets in who has a key, and says whose request it is. What is whose, the routes decide."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from flexjax.server.errors import ApiError
from flexjax.server.keys import ApiKeys
from flexjax.server.owner import OWNER
from flexjax.server.request_log import note

OPEN_PATHS = ("/", "/health", "/version", "/metrics", "/openapi.json")
"""Those that a load balancer and Prometheus ask, who have no key, and what is no secret, as the page that asks for a
key; all others need one."""


class Guard:
    """Between the log and the routes."""

    def __init__(self, app: ASGIApp, keys: ApiKeys):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            try:
                scope[OWNER] = self._owner(Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            note(scope, owner=scope[OWNER])
        await self._app(scope, receive, send)

    def _owner(self, headers: Headers) -> str:
        """Raises ApiError (401)."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise unauthorized("There is no API key; send the header 'Authorization: Bearer KEY'.", None)
        owner = self._keys.owner(key.strip())
        if owner is None:
            raise unauthorized("The API key is not one of this server's.", "invalid_api_key")
        return owner


def unauthorized(message: str, code: str | None) -> ApiError:
    """What else a stranger has to say is not read."""
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer", "Connection": "close"})
