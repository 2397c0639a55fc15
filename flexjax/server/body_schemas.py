"""Bodies of requests as JSON Schema, made of the tables by which they are checked."""

from collections.abc import Mapping
from typing import Any

from flexjax.request import LARGEST, RANGES
from flexjax.server import adapters, tokenization
from flexjax.server.delivery import STREAM_OPTIONS
from flexjax.server.files import PURPOSE
from flexjax.server.job_request import FIELDS, HYPERPARAMETERS, SUFFIX
from flexjax.server.prompts import ROLES
from flexjax.server.protocol import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    OTHER_FIELDS,
    SAMPLING_FIELDS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
)
from flexjax.server.schemas import Schema, any_of, nullable, object_of, schema_of

TEXT, BOOLEAN, IDS = {"type": "string"}, {"type": "boolean"}, {"type": "array", "items": {"type": "integer"}}
STOP, SOME = TEXT | {"minLength": 1}, {"minItems": 1}
PROMPT = any_of(
    TEXT,
    {"type": "array", "items": TEXT, **SOME},
    IDS | SOME,
    {"type": "array", "items": IDS | SOME, **SOME},
)
PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": TEXT}, "required": ["type", "text"]}
MESSAGE = object_of(
    {"role": {"enum": list(ROLES)}, "content": any_of(TEXT, {"type": "array", "items": PART}), "name": TEXT},
    required=("role", "content"),
)
MESSAGES = {"type": "array", "items": MESSAGE, **SOME}


def sampling_schema(name: str, hint: Any) -> Schema:
    schema = schema_of(hint)
    if name in RANGES:
        limits = RANGES[name]
        schema["exclusiveMinimum" if limits.open_low else "minimum"] = limits.low
        schema |= {} if limits.high is None else {"maximum": limits.high}
    return schema


def generation_body(own: Mapping[str, Any], special: Mapping[str, Schema], required: str) -> Schema:
    """Args:
    own: fields that only completions have, or only chats; special: schemas of fields that their types do not tell.
    """
    hints = {**SAMPLING_FIELDS, **OTHER_FIELDS, **WITHOUT_EFFECT, **own}
    fields = {name: {"enum": list(neutral)} for name, neutral in UNSUPPORTED.items() if neutral}
    fields |= {name: {"type": "null"} for name, neutral in UNSUPPORTED.items() if not neutral}
    fields |= {name: sampling_schema(name, hint) for name, hint in hints.items() if name not in special}
    fields["stop"] = any_of(STOP, {"type": "array", "items": STOP})
    fields["stop_token_ids"]["items"] |= {"minimum": 0, "maximum": LARGEST}
    options = object_of({name: BOOLEAN for name in STREAM_OPTIONS})
    del fields["prompt_logprobs"]  # which is refused over HTTP
    return object_of({**fields, "stream_options": options, **special}, required=(required,))


def job_body() -> Schema:
    values = {name: any_of(schema_of(hint), {"const": "auto"}) for name, hint in HYPERPARAMETERS.items()}
    hyperparameters = object_of(values)
    supervised = object_of({"hyperparameters": hyperparameters})
    kind = {"type": {"const": "supervised"}, "supervised": nullable(supervised)}
    special = {
        "hyperparameters": hyperparameters,
        "method": {"type": "object", "properties": kind, "additionalProperties": False},
        "metadata": {"type": "object", "additionalProperties": TEXT},
        "integrations": {"type": "array", "maxItems": 0},
        "suffix": TEXT | {"pattern": f"^({SUFFIX.pattern})?$"},
    }
    fields = {name: special.get(name) or schema_of(hint) for name, hint in FIELDS.items()}
    return object_of(fields, required=("model", "training_file"))


def plain_body(hints: Mapping[str, Any], *required: str) -> Schema:
    return object_of({name: schema_of(hint) for name, hint in hints.items()}, required)


def tokenize_body() -> Schema:
    """A text or a conversation."""
    hints = {name: hint for name, hint in tokenization.TOKENIZE.items() if name not in ("prompt", "messages")}
    fields = {name: schema_of(hint) for name, hint in hints.items()}
    asks = {"prompt": TEXT, "messages": MESSAGES}
    return {"anyOf": [object_of({**fields, name: schema}, (name,)) for name, schema in asks.items()]}


COMPLETION = generation_body(COMPLETION_FIELDS, {"prompt": PROMPT, "echo": BOOLEAN}, required="prompt")
CHAT = generation_body(CHAT_FIELDS, {"messages": MESSAGES}, required="messages")
JOB = job_body()
LOAD = plain_body(adapters.LOAD_FIELDS, "lora_name", "lora_path")
UNLOAD = plain_body(adapters.UNLOAD_FIELDS, "lora_name")
TOKENIZE = tokenize_body()
DETOKENIZE = plain_body(tokenization.DETOKENIZE, "tokens")
UPLOAD = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": PURPOSE}},
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
