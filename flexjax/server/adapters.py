"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them.

A name that is in use gets a new version: requests that run keep theirs. Folders outside the owner's adapter folder
cannot be named.
"""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flexjax.config import nearest
from flexjax.engine.adapters import UnknownAdapter
from flexjax.server.bodies import parse_body, read_body
from flexjax.server.errors import ApiError, is_full, model_not_found
from flexjax.server.owner import owner_of
from flexjax.server.prompts import BodyError
from flexjax.server.protocol import typed
from flexjax.server.service import Service, service_of
from flexjax.server.trained_models import JOB_NAMES

LOAD_FIELDS = {"lora_name": str, "lora_path": str, "load_inplace": bool}
UNLOAD_FIELDS = {"lora_name": str, "lora_int_id": int}
LONGEST_NAME = 256


def fields_of(raw: bytes, hints: dict[str, Any], needed: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a body, in their types. Raises BodyError."""
    body = {name: value for name, value in parse_body(raw).items() if value is not None}
    for name, value in body.items():
        if name not in hints:
            raise BodyError(f"unknown field {name!r}{nearest(name, hints)}", name)
        typed(name, value, hints[name])
    for name in needed:
        if not body.get(name):
            raise BodyError(f"{name} is absent or empty; it must be text", name)
    return body


def checked_name(name: str, service: Service) -> str:
    if name in service.base_names:
        raise BodyError(f"lora_name is {name!r}, which is the base model's name; choose another", "lora_name")
    if name.startswith(JOB_NAMES):
        raise BodyError(f"lora_name begins with {JOB_NAMES!r}, which names of finetuning jobs do", "lora_name")
    if service.private and service.catalog.is_shared(name):
        raise BodyError(f"lora_name is {name!r}, an adapter of the server's configuration; choose another", "lora_name")
    if not service.private and service.loaded.is_of_a_job(name):
        raise BodyError(f"lora_name is {name!r}, which a job of the configuration trains; choose another", "lora_name")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise BodyError(f"lora_name must be printable and of at most {LONGEST_NAME} characters", "lora_name")
    return name


def load(service: Service, owner: str, name: str, path: str) -> None:
    """On a worker's thread. Raises ApiError, BodyError."""
    try:
        service.loaded.load(owner, checked_name(name, service), path)
    except BodyError:
        raise
    except (ValueError, OSError) as error:
        if is_full(error):
            raise
        hidden = service.catalog.readable(owner, service.loaded.hidden(owner, str(error)))
        raise ApiError(400, f"The adapter cannot be loaded: {hidden}", "lora_path") from error


async def load_adapter(request: Request) -> Response:
    service = service_of(request)
    service.admission.require_open()
    service.rates.take_request(owner_of(request))
    body = fields_of(await read_body(request, service.config.max_body_bytes), LOAD_FIELDS, ("lora_name", "lora_path"))
    name = body["lora_name"]
    await run_in_threadpool(load, service, owner_of(request), name, body["lora_path"])
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


def unload(service: Service, owner: str, name: str) -> None:
    """On a worker's thread. Raises ApiError, BodyError."""
    found = service.catalog.find(owner, name)
    if found is None:
        raise model_not_found(name)
    if service.private and service.catalog.is_shared(found):
        raise BodyError(f"lora_name is {name!r}, an adapter of the server's configuration; it stays", "lora_name")
    try:
        service.loaded.unload(found)
    except UnknownAdapter as error:
        raise model_not_found(name) from error


async def unload_adapter(request: Request) -> Response:
    service = service_of(request)
    body = fields_of(await read_body(request, service.config.max_body_bytes), UNLOAD_FIELDS, ("lora_name",))
    name = body["lora_name"]
    await run_in_threadpool(unload, service, owner_of(request), name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


ROUTES = (
    Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
)
