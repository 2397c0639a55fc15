"""page_of: a part of a list as OpenAI's API gives it: so many after that one."""

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from flexjax.config import nearest
from flexjax.server.prompts import BodyError, shortened
from flexjax.server.store import Store

LARGEST = 10_000


def query_of(request: Request, allowed: tuple[str, ...]) -> dict[str, str]:
    """Raises BodyError for a parameter that is not known."""
    for name in request.query_params:
        if name not in allowed:
            raise BodyError(f"unknown parameter {name!r}{nearest(name, allowed)}", name)
    return dict(request.query_params)


def limit_of(query: Mapping[str, str], default: int) -> int:
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= LARGEST:
        raise BodyError(f"limit is {shortened(text)}; it must be a whole number from 1 to {LARGEST}", "limit")
    return int(text)


def page_of(
    store: Store,
    table: str,
    where: Mapping[str, Any],
    query: Mapping[str, str],
    describe: Callable[[dict[str, Any]], dict[str, Any]],
    default_limit: int,
) -> dict[str, Any]:
    """The newest first, or the oldest with ``order=asc``. Raises BodyError."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BodyError(f"order is {shortened(order)}; it must be asc or desc", "order")
    limit, beyond = limit_of(query, default_limit), None
    if "after" in query:
        last = store.find(table, id=query["after"], **where)
        if last is None:
            raise BodyError(f"after is {shortened(query['after'])}, which is not in this list", "after")
        beyond = last["seq"]
    rows = store.rows(table, where, limit=limit + 1, newest_first=order == "desc", beyond=beyond)
    data = [describe(row) for row in rows[:limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(rows) > limit, **ends}
