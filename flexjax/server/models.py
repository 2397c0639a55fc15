"""/v1/models: the base model and its adapters, as vLLM lists them."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flexjax.server.errors import ApiError, model_not_found
from flexjax.server.owner import owner_of
from flexjax.server.service import Service, service_of


def base_card(service: Service) -> dict[str, Any]:
    return card(service, service.base_name, root=service.engine.config.model, parent=None)


def adapter_card(service: Service, name: str, engine_name: str) -> dict[str, Any]:
    """``root`` is where a client said that the adapter is; one that was trained here has its name."""
    return card(service, name, root=service.loaded.path_of(engine_name) or name, parent=service.base_name)


def card(service: Service, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "flexjax",
        "root": root,
        "parent": parent,
        "max_model_len": service.engine.config.max_model_len,
    }


def list_models(request: Request) -> Response:
    service = service_of(request)
    adapters = [adapter_card(service, *names) for names in service.catalog.names(owner_of(request)).items()]
    return JSONResponse({"object": "list", "data": [base_card(service), *adapters]})


def retrieve_model(request: Request) -> Response:
    service, name = service_of(request), request.path_params["name"]
    if name in service.base_names:
        return JSONResponse(base_card(service))
    names = service.catalog.names(owner_of(request))
    if name not in names:
        raise model_not_found(name)
    return JSONResponse(adapter_card(service, name, names[name]))


def delete_model(request: Request) -> Response:
    """Of a job, or a checkpoint of one; what it is asked for meanwhile goes on."""
    service, name, owner = service_of(request), request.path_params["name"], owner_of(request)
    if name in service.base_names:
        raise ApiError(400, f"{name!r} is the base model, which cannot be deleted.", "model", "not_a_trained_model")
    if service.trained.owner_of(name) != owner:
        if name not in service.catalog.names(owner):
            raise model_not_found(name)
        message = f"{name!r} was not made by a job; what a client has loaded goes with unload_lora_adapter."
        raise ApiError(400, message, "model", "not_a_trained_model")
    service.trained.delete(name)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


ROUTES = (
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", retrieve_model),
    Route("/v1/models/{name:path}", delete_model, methods=["DELETE"]),
)
