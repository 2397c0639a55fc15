"""/v1/models: the base model and its adapters, as vLLM lists them."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flexjax.server.errors import model_not_found
from flexjax.server.owner import owner_of
from flexjax.server.service import Service, service_of


def base_card(service: Service) -> dict[str, Any]:
    return card(service, service.base_name, root=service.engine.config.model, parent=None)


def adapter_card(service: Service, name: str, engine_name: str) -> dict[str, Any]:
    """``root`` is where a client said that the adapter is; one that was trained here has its name."""
    return card(service, name, root=service.adapter_paths.get(engine_name, name), parent=service.base_name)


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


ROUTES = (Route("/v1/models", list_models), Route("/v1/models/{name:path}", retrieve_model))
