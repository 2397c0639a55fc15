"""cross_origin: lets pages of other sites, where those are named, use the service from a browser (CORS).

A browser asks beforehand whether it may send a key and JSON; that question has no key itself, so it is answered before
the guard. Keys come in a header that a page must know, never with cookies.
"""

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from flexjax.server.rates import KINDS
from flexjax.server.request_log import ID_HEADER

METHODS = ("GET", "HEAD", "POST", "DELETE")
SHOWN = (ID_HEADER, "Retry-After", *(f"x-ratelimit-{what}-{kind}" for kind in KINDS for what in ("limit", "remaining")))
"""Headers of answers that such a page may read."""


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """The outermost application, so that such a page can read refusals too; nothing where no origin is named."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=SHOWN,
        )
    ]
