"""/v1/fine_tuning/jobs: adapters that clients have trained beside everybody's requests."""

import secrets
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flexjax.server.bodies import parse_body, read_body
from flexjax.server.errors import ApiError, model_not_found
from flexjax.server.files import PURPOSE
from flexjax.server.job_objects import checkpoint_object, event_object, job_object
from flexjax.server.job_request import JobRequest, translate_job
from flexjax.server.owner import owner_of
from flexjax.server.paging import page_of, query_of
from flexjax.server.prompts import BodyError, shortened
from flexjax.server.service import Service, own_row, service_of

PATH = "/v1/fine_tuning/jobs"
LISTED = 20
LISTED_CHECKPOINTS = 10
PAGE = ("after", "limit")
ACTIONS = ("cancel", "pause", "resume")


def require_job(request: Request) -> dict[str, Any]:
    """The owner's job that the path names. Raises ApiError (404)."""
    identifier, row = own_row(request, "jobs")
    if row is None:
        raise ApiError(404, f"Could not find fine tune: {shortened(identifier)}", "fine_tune_id", "fine_tune_not_found")
    return row


def require_inputs(service: Service, owner: str, asked: JobRequest) -> None:
    """Raises ApiError, BodyError if the owner does not have the model or a file."""
    if asked.model not in service.base_names and asked.model not in service.trained.names(owner):
        raise model_not_found(asked.model)
    for field in ("training_file", "validation_file"):
        identifier = getattr(asked, field)
        file = None if identifier is None else service.store.find("files", id=identifier, owner=owner)
        if identifier is not None and (file is None or file["purpose"] != PURPOSE):
            raise BodyError(f"{field} is {shortened(identifier)}, which is no uploaded file of training rows", field)


def create(service: Service, owner: str, raw: bytes) -> dict[str, Any]:
    """On a worker's thread. Raises ApiError, BodyError."""
    asked = translate_job(parse_body(raw), seed=secrets.randbelow(2**31))
    require_inputs(service, owner, asked)
    weight = service.limits.weight(owner, asked.hyperparameters.get("weight"))
    if weight is not None:
        asked = replace(asked, hyperparameters=asked.hyperparameters | {"weight": weight})
    with service.limits.another_job(owner):
        return job_object(service.keeper.create(asked, owner, service.base_name.rsplit("/", 1)[-1]))


async def create_job(request: Request) -> Response:
    service = service_of(request)
    service.admission.require_open()
    service.rates.take_request(owner_of(request))
    raw = await read_body(request, service.config.max_body_bytes)
    return JSONResponse(await run_in_threadpool(create, service, owner_of(request), raw))


def list_jobs(request: Request) -> Response:
    where, query = {"owner": owner_of(request)}, query_of(request, PAGE)
    return JSONResponse(page_of(service_of(request).store, "jobs", where, query, job_object, LISTED))


def retrieve_job(request: Request) -> Response:
    return JSONResponse(job_object(require_job(request)))


def list_events(request: Request) -> Response:
    where, query = {"job": require_job(request)["id"]}, query_of(request, PAGE)
    return JSONResponse(page_of(service_of(request).store, "events", where, query, event_object, LISTED))


def list_checkpoints(request: Request) -> Response:
    where, query = {"job": require_job(request)["id"]}, query_of(request, PAGE)
    store = service_of(request).store
    return JSONResponse(page_of(store, "checkpoints", where, query, checkpoint_object, LISTED_CHECKPOINTS))


def act_on_job(request: Request) -> Response:
    """Cancel, pause or resume; the answer is the job after it."""
    identifier, keeper = require_job(request)["id"], service_of(request).keeper
    actions = {"cancel": keeper.cancel, "pause": keeper.pause, "resume": keeper.resume}
    actions[request.url.path.rsplit("/", 1)[-1]](identifier)
    return JSONResponse(job_object(require_job(request)))


ROUTES = (
    Route(PATH, create_job, methods=["POST"]),
    Route(PATH, list_jobs),
    Route(f"{PATH}/{{id}}", retrieve_job),
    Route(f"{PATH}/{{id}}/events", list_events),
    Route(f"{PATH}/{{id}}/checkpoints", list_checkpoints),
    *(Route(f"{PATH}/{{id}}/{action}", act_on_job, methods=["POST"]) for action in ACTIONS),
)
"""Where a route is no coroutine, Starlette runs it on a worker's thread: the database may wait for the disk."""
