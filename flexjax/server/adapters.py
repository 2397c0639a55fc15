"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them.

A name that is in use gets a new version: requests that run keep theirs. Folders outside the adapter folder cannot be
named.
"""

import os
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flexjax.config import nearest
from flexjax.engine.adapters import UnknownAdapter
from flexjax.server.bodies import parse_body, read_body
from flexjax.server.errors import ApiError, model_not_found
from flexjax.server.owner import owner_of
from flexjax.server.prompts import BodyError, shortened
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
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise BodyError(f"lora_name must be printable and of at most {LONGEST_NAME} characters", "lora_name")
    return name


def folder_of(path: str, root: Path) -> Path:
    """The folder that a client's path means, links followed.

    Raises:
        BodyError: it lies outside ``root``.
    """
    try:
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a name too long, links in a circle
        raise BodyError(f"lora_path is {shortened(path)}, which is no path", "lora_path") from error
    if not inside:
        raise BodyError(f"lora_path is {shortened(path)}, which is outside the server's adapter_dir", "lora_path")
    return folder


def may_read(service: Service, owner: str, folder: Path) -> bool:
    """Whether an owner may load what lies there: in the service's own folder is what the jobs of others made."""
    if not service.private or not folder.is_relative_to(service.folder.root):
        return True
    place = folder.relative_to(service.folder.root).parts
    if place[:1] != ("adapters",):
        return False
    return len(place) < 2 or not place[1].startswith(JOB_NAMES) or service.trained.owner_of(place[1]) == owner


def load(service: Service, owner: str, asked_name: str, path: str) -> None:
    """On a worker's thread. Raises ApiError, BodyError."""
    name = service.catalog.loaded_name(owner, checked_name(asked_name, service))
    root = service.config.adapters
    folder = folder_of(path, root)
    if not may_read(service, owner, folder) or not os.path.isdir(folder):
        raise ApiError(404, f"There is no folder {shortened(path)} in the server's adapter_dir.", "lora_path")
    try:
        service.engine.load_adapter(name, folder)
    except (ValueError, OSError) as error:
        hidden = str(error).replace(str(root.resolve()), "adapter_dir")  # where the server keeps things is its own
        hidden = service.catalog.readable(owner, hidden)
        raise ApiError(400, f"The adapter cannot be loaded: {hidden}", "lora_path") from error
    service.adapter_paths[name] = path


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
        service.engine.unload_adapter(found)
    except UnknownAdapter as error:
        raise model_not_found(name) from error
    service.adapter_paths.pop(found, None)


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
