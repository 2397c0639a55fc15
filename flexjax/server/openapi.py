"""/openapi.json: every operation of the service. Bodies are described by the tables that check them."""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flexjax.server import answer_schemas as answers
from flexjax.server import body_schemas as bodies
from flexjax.server import files, fine_tuning
from flexjax.server.guard import OPEN_PATHS
from flexjax.server.paging import LARGEST
from flexjax.server.schemas import Schema
from flexjax.server.service import service_of
from flexjax.version import __version__

JSON, EVENTS, PLAIN, HTML, ANYTHING = "application/json", "text/event-stream", "text/plain", "text/html", "*/*"
TEXT = {"type": "string"}
QUERIES = {
    "after": TEXT,
    "limit": {"type": "integer", "minimum": 1, "maximum": LARGEST},
    "order": {"enum": ["asc", "desc"]},
    "purpose": TEXT,
}
ERRORS = {
    "400": "The request is wrong; param says where.",
    "401": "There is no key, or it is not one of the server's.",
    "403": "The owner's limits do not allow it, now or later.",
    "404": "What is named is not there, or is another owner's.",
    "408": "The body did not come in time.",
    "413": "The body is too long.",
    "415": "The body has another content type.",
    "429": "Too much is asked for at once, or a minute, or by this owner; Retry-After says when to try again.",
    "503": "The server is stopping, or jobs hold the places that the model needs.",
    "507": "The server's disk is full.",
}


@dataclass(frozen=True)
class Operation:
    """Attributes:
    answer: schema of the answer in JSON, or its content type where it is something else.
    """

    method: str
    path: str
    summary: str
    answer: Schema | str
    body: Schema | None = None
    body_type: str = JSON
    query: tuple[str, ...] = ()
    streams: bool = False

    def object(self, private: bool) -> dict[str, Any]:
        """As OpenAPI has it.

        Args:
            private: keys are asked for.
        """
        names = [part[1:-1] for part in self.path.split("/") if part.startswith("{")]
        parameters = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names]
        parameters += [{"name": name, "in": "query", "schema": QUERIES[name]} for name in self.query]
        found: dict[str, Any] = {"summary": self.summary, "parameters": parameters, "responses": self._responses()}
        if self.body is not None:
            found["requestBody"] = {"required": True, "content": {self.body_type: {"schema": self.body}}}
        return found | ({"security": [{"key": []}]} if private and self.path not in OPEN_PATHS else {})

    def _responses(self) -> dict[str, Any]:
        content = {self.answer: {}} if isinstance(self.answer, str) else {JSON: {"schema": self.answer}}
        if self.streams:
            content[EVENTS] = {}
        error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
        refusals = {status: {"description": text, "content": error} for status, text in ERRORS.items()}
        return {"200": {"description": "Done.", **({"content": content} if self.answer else {})}} | refusals


def generating(path: str, summary: str, answer: Schema, body: Schema) -> Operation:
    return Operation("post", path, summary, answer, body, streams=True)


JOBS, JOB_ID = fine_tuning.PATH, f"{fine_tuning.PATH}/{{id}}"
OPERATIONS = (
    Operation("get", "/v1/models", "The base model and adapters.", answers.MODELS),
    Operation("get", "/v1/models/{name}", "One of them.", answers.MODEL),
    Operation("delete", "/v1/models/{name}", "Delete a model that a job made.", answers.deleted("model")),
    generating("/v1/completions", "Continue prompts.", answers.COMPLETION, bodies.COMPLETION),
    generating("/v1/chat/completions", "Answer a conversation.", answers.CHAT, bodies.CHAT),
    Operation("post", "/tokenize", "Token ids of a text or a conversation.", answers.TOKENS, bodies.TOKENIZE),
    Operation("post", "/detokenize", "The text of token ids.", answers.DETOKENIZED, bodies.DETOKENIZE),
    Operation("post", "/v1/load_lora_adapter", "Load an adapter.", PLAIN, bodies.LOAD),
    Operation("post", "/v1/unload_lora_adapter", "Unload an adapter.", PLAIN, bodies.UNLOAD),
    Operation("post", "/v1/files", "Upload rows to train on.", answers.FILE, bodies.UPLOAD, "multipart/form-data"),
    Operation("get", "/v1/files", "Files, the newest first.", answers.FILES, query=files.PAGE),
    Operation("get", "/v1/files/{id}", "One of them.", answers.FILE),
    Operation("delete", "/v1/files/{id}", "Delete a file.", answers.deleted("file")),
    Operation("get", "/v1/files/{id}/content", "Its bytes.", ANYTHING),
    Operation("post", JOBS, "Train an adapter.", answers.JOB, bodies.JOB),
    Operation("get", JOBS, "Jobs, the newest first.", answers.JOBS, query=fine_tuning.PAGE),
    Operation("get", JOB_ID, "One of them.", answers.JOB),
    Operation("get", f"{JOB_ID}/events", "What it told.", answers.EVENTS, query=fine_tuning.PAGE),
    Operation("get", f"{JOB_ID}/checkpoints", "What it kept.", answers.CHECKPOINTS, query=fine_tuning.PAGE),
    *(Operation("post", f"{JOB_ID}/{verb}", f"{verb.title()} it.", answers.JOB) for verb in fine_tuning.ACTIONS),
    Operation("get", "/metrics", "For Prometheus.", ANYTHING),
    Operation("head", "/metrics", "For Prometheus.", ""),
    Operation("get", "/", "The dashboard.", HTML),
    Operation("get", "/dashboard.json", "Its numbers, of the last minute.", answers.DASHBOARD),
    Operation("get", "/health", "Whether the engine answers.", ""),
    Operation("get", "/version", "Of flexjax.", answers.VERSION),
    Operation("get", "/openapi.json", "This document.", {"type": "object"}),
)


def document(private: bool) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = each.object(private)
    return {
        "openapi": "3.1.0",
        "info": {"title": "flexjax", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": answers.ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


async def openapi(request: Request) -> Response:
    return JSONResponse(document(service_of(request).private))


ROUTES = (Route("/openapi.json", openapi),)
