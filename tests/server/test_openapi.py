"""/openapi.json: it has every route, and what it says of bodies is what is read."""

import json

import httpx
import pytest

from flexjax.server.app import AREAS
from flexjax.server.openapi import document
from flexjax.server.schemas import schema_of

DOCUMENT = document(private=True)
OPERATIONS = {(method, path): each for path, item in DOCUMENT["paths"].items() for method, each in item.items()}
NEEDED = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "ghost"},
    "/v1/unload_lora_adapter": {"lora_name": "ghost"},
    "/v1/fine_tuning/jobs": {"model": "tiny", "training_file": "ghost"},
}
"""What each body needs, and no more tokens than that; all but the first four name something that is not there."""


def body_of(path: str) -> dict:
    content = OPERATIONS["post", path]["requestBody"]["content"]
    return content["application/json"]["schema"]


def fields_of(path: str) -> dict[str, dict]:
    schema = body_of(path)
    return {name: each for arm in schema.get("anyOf", [schema]) for name, each in arm["properties"].items()}


def test_every_route_is_in_it():
    routes = {
        (method.lower(), route.path.replace(":path}", "}"))
        for area in AREAS
        for route in area.ROUTES
        for method in route.methods - {"HEAD"} | ({"HEAD"} & route.methods if route.path == "/metrics" else set())
    }
    assert routes == set(OPERATIONS)


def test_every_json_body_is_looked_at_here():
    described = {
        path
        for (_, path), each in OPERATIONS.items()
        if "application/json" in each.get("requestBody", {}).get("content", {})
    }
    assert described == set(NEEDED)


def kinds(schema: dict) -> set[str]:
    """JSON types that a schema lets in."""
    if "anyOf" in schema:
        return set().union(*map(kinds, schema["anyOf"]))
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return {names[type(value)] for value in values} or {schema["type"]}


def wrong_value(schema: dict):
    """Of a type that it does not let in."""
    allowed = kinds(schema)
    candidates = {"string": "wombat", "object": {"wombat": 1}, "array": [[]], "boolean": True}
    return next(value for kind, value in candidates.items() if kind not in allowed)


def post(server, path: str, body: dict) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=30)


FIELDS = [(path, name) for path in NEEDED for name in fields_of(path)]


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_every_field_is_read(server, path, name):
    """A wrong value is refused with its name; null asks for nothing where it is allowed."""
    schema = fields_of(path)[name]
    body = NEEDED[path] if (path, name) != ("/tokenize", "messages") else {}
    refused = post(server, path, {**body, name: wrong_value(schema)})
    error = refused.json()["error"]
    assert refused.status_code == 400 and "unknown" not in error["message"]
    assert error["param"] in (name, name.split(".")[0]), error
    if "null" in kinds(schema):
        neutral = post(server, path, {**body, name: None}).json()
        assert neutral == post(server, path, body).json() or "error" not in neutral


@pytest.mark.parametrize("path", NEEDED)
def test_a_field_that_is_not_in_it_is_refused(server, path):
    error = post(server, path, {**NEEDED[path], "wombat": 1}).json()["error"]
    assert error["param"] == "wombat" and "unknown field 'wombat'" in error["message"]


def nested(schema: dict, *names: str) -> dict:
    for name in names:
        arms = [schema, *schema.get("anyOf", [])]
        schema = next(arm["properties"][name] for arm in arms if name in arm.get("properties", {}))
    return schema


@pytest.mark.parametrize("place", [("hyperparameters",), ("method", "supervised", "hyperparameters")])
def test_every_hyperparameter_is_read(server, place):
    path = "/v1/fine_tuning/jobs"
    properties = next(arm for arm in nested(body_of(path), *place)["anyOf"] if "properties" in arm)["properties"]
    assert {"n_epochs", "rank", "optimizer"} <= set(properties)
    for name in properties:
        value = {name: {"wombat": 1}}
        for outer in place[:0:-1]:
            value = {outer: value}
        error = post(server, path, {**NEEDED[path], place[0]: value}).json()["error"]
        assert error["param"] == name and "must be" in error["message"], (name, error)


def test_ranges_are_those_that_are_checked(server):
    """The limit itself is taken and what lies beyond it is refused."""
    checked = set()
    for name, schema in fields_of("/v1/completions").items():
        arm = next((each for each in schema.get("anyOf", []) if {"minimum", "exclusiveMinimum"} & set(each)), None)
        if arm is None:
            continue
        checked.add(name)
        low = arm.get("minimum", arm.get("exclusiveMinimum"))
        beyond = low - 1 if "minimum" in arm else low
        error = post(server, "/v1/completions", {"prompt": "a", name: beyond}).json()["error"]
        assert f"{name} is {beyond}" in error["message"]
        if "minimum" in arm:
            good = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, "min_tokens": 0, name: low})
            assert good.status_code == 200, good.text
        if "maximum" in arm:
            error = post(server, "/v1/completions", {"prompt": "a", name: arm["maximum"] + 1}).json()["error"]
            assert f"{name} is {arm['maximum'] + 1}" in error["message"]
    assert checked >= {"n", "temperature", "top_p", "top_k", "max_tokens", "logprobs", "presence_penalty"}


def test_it_is_served_to_everybody(owned):
    answer = httpx.get(f"{owned.url}/openapi.json")
    assert answer.status_code == 200 and answer.json() == json.loads(json.dumps(DOCUMENT))
    for (method, path), each in OPERATIONS.items():
        status = 401 if "security" in each else 200
        assert httpx.request(method, owned.url + path).status_code == status, path


def test_without_keys_it_asks_for_none(server):
    assert "security" not in httpx.get(f"{server.url}/openapi.json").text.replace("securitySchemes", "")


def test_another_method_is_told_which_there_are(server):
    for path in DOCUMENT["paths"]:
        there = {method.upper() for method in DOCUMENT["paths"][path]}
        answer = httpx.request("PUT", server.url + path.replace("{id}", "a").replace("{name}", "a"))
        allowed = set(answer.headers["allow"].split(", "))
        assert answer.status_code == 405 and allowed - {"HEAD"} == there - {"HEAD"}, path
        assert "PUT" in answer.json()["error"]["message"]


def test_schemas_of_types_by_hand():
    assert schema_of(str | tuple[str, ...]) == {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    }
    assert schema_of(int | None) == {"type": "integer"}
    with pytest.raises(TypeError):
        schema_of(bytes)
