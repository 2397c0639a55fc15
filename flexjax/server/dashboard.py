"""/ and /dashboard.json: a page that shows what the service does, and the numbers that it asks for every second."""

import time
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from flexjax.server.dashboard_jobs import jobs_of
from flexjax.server.engine_view import EngineNow
from flexjax.server.owner import owner_of
from flexjax.server.recent import Served, Spread, quantile
from flexjax.server.service import Service, service_of
from flexjax.version import __version__

PAGE = files("flexjax.server").joinpath("dashboard.html").read_text(encoding="utf-8")
SCRIPT = b64encode(sha256(PAGE.split("<script>")[1].split("</script>")[0].encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{SCRIPT}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
"""Of its contents: all is in the page, which runs no other script and asks nobody but this server."""

LATENCIES = ("ttft", "tpot", "itl")

MOST_ADAPTERS = 50


def latency(spreads: list[Spread]) -> dict[str, Any]:
    """Milliseconds; null where nothing was observed."""
    values = {name: quantile(spreads, part) for name, part in (("p50", 0.5), ("p99", 0.99))}
    found = {name: None if value is None else round(1e3 * value, 3) for name, value in values.items()}
    return {**found, "count": sum(each.counts.total() for each in spreads)}


def pages(now: EngineNow) -> dict[str, int]:
    """Of the pool, by what they are for; they add up to the total."""
    facts = now.statistics
    return {
        "requests": facts.pages - facts.available_pages - facts.tape_pages,
        "tapes": facts.tape_pages,
        "cached": facts.available_pages - facts.free_pages,
        "free": facts.free_pages,
        "total": facts.pages,
    }


def adapters(service: Service, now: EngineNow, owner: str) -> dict[str, Any]:
    """How many there are, and the names of those that the owner may know."""
    shown = {engine_name: name for name, engine_name in service.catalog.names(owner).items()}
    names = sorted({shown[name] for name in now.resident if name in shown})
    counts = {"places": now.places, "resident": len(now.resident), "host_bytes": now.host_bytes}
    return {**counts, "names": names[:MOST_ADAPTERS]}


def objective(service: Service) -> dict[str, float | None]:
    """Milliseconds; None where nothing is aimed at. The policy's own is what `Engine.set_objective` changes; where only
    gaps between tokens have an objective, it begins as that one and says nothing of a sequence's mean."""
    config, policy = service.engine.config, service.engine.scheduler.policy
    found = {name: getattr(config, f"{name}_objective_ms") for name in LATENCIES}
    seconds = getattr(policy, "objective", None)
    if seconds is not None and (found["tpot"] is not None or seconds != policy.itl):
        found["tpot"] = round(1e3 * seconds, 3)
    return found


def snapshot(service: Service, now: EngineNow, owner: str) -> dict[str, Any]:
    """All but the jobs, on the event loop."""
    moment = time.perf_counter()
    served = [slot or Served() for slot in service.totals.recent.whole(moment)]
    waiting = now.statistics.waiting + now.unstarted
    return {
        "object": "dashboard",
        "version": __version__,
        "model": service.base_name,
        "time": round(time.time(), 3),
        "started": service.started,
        "objective": objective(service),
        "requests": {"running": now.statistics.running, "waiting": waiting, "rows": service.engine.config.max_rows},
        "latency": {name: latency([getattr(each, name) for each in served]) for name in LATENCIES},
        "seconds": {"output_tokens": [each.tokens for each in served], **service.view.spent(moment)},
        "iterations": service.view.iterations(),
        "pages": pages(now),
        "memory": [{"purpose": purpose, "bytes": size} for purpose, size in service.engine.memory_plan.rows()],
        "adapters": adapters(service, now, owner),
    }


async def dashboard(request: Request) -> Response:
    service, owner = service_of(request), owner_of(request)
    now = await service.view.look()
    parts = service.store, service.curves, service.configured
    jobs = await run_in_threadpool(jobs_of, *parts, owner)  # since the database may wait for the disk
    content = {**snapshot(service, now, owner), "jobs": jobs}
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


async def page(_: Request) -> Response:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(PAGE, headers=headers)


ROUTES = (Route("/", page), Route("/dashboard.json", dashboard))
