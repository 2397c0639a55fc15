"""owner_of: whose request it is, as the guard has found out."""

from starlette.requests import Request

from flexjax.server.keys import OPERATOR

OWNER = "flexjax.owner"
"""Of the ASGI scope."""


def owner_of(request: Request) -> str:
    """The operator where no keys are asked for."""
    return request.scope.get(OWNER, OPERATOR)
