"""Answers as JSON Schema: what every answer has at least."""

from flexjax.server.schemas import Schema, answer, nullable

TEXT, COUNT, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {}


def list_of(item: Schema) -> Schema:
    return answer("list", data={"type": "array", "items": item})


def page_of(item: Schema) -> Schema:
    ends = {name: nullable(TEXT) for name in ("first_id", "last_id")}
    return answer("list", data={"type": "array", "items": item}, has_more={"type": "boolean"}, **ends)


def generated(kind: str, **choice: Schema) -> Schema:
    reason = nullable({"enum": ["stop", "length"]})
    item = answer(None, index=COUNT, finish_reason=reason, logprobs=ANY, **choice)
    cached = answer(None, cached_tokens=COUNT)
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), COUNT)
    usage = answer(None, **counts, prompt_tokens_details=cached)
    choices = {"type": "array", "items": item, "minItems": 1}
    return answer(kind, id=TEXT, created=COUNT, model=TEXT, choices=choices, usage=usage)


ERROR = answer(None, error=answer(None, message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT)))
COMPLETION = generated("text_completion", text=TEXT)
CHAT = generated("chat.completion", message=answer(None, role={"const": "assistant"}, content=TEXT))
MODEL = answer("model", id=TEXT, created=COUNT, owned_by=TEXT, root=TEXT, parent=nullable(TEXT), max_model_len=COUNT)
MODELS = list_of(MODEL)
FILE = answer("file", id=TEXT, bytes=COUNT, created_at=COUNT, filename=TEXT, purpose=TEXT, status=TEXT)
FILES = page_of(FILE)
JOB = answer(
    "fine_tuning.job",
    id=TEXT,
    created_at=COUNT,
    finished_at=nullable(COUNT),
    error=nullable({"type": "object"}),
    fine_tuned_model=nullable(TEXT),
    hyperparameters={"type": "object"},
    model=TEXT,
    result_files={"type": "array", "items": TEXT},
    seed={"type": "integer"},
    status={"enum": ["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]},
    trained_tokens=COUNT,
    training_file=TEXT,
    validation_file=nullable(TEXT),
)
JOBS = page_of(JOB)
EVENT = answer(
    "fine_tuning.job.event", id=TEXT, created_at=COUNT, level=TEXT, message=TEXT, type=TEXT, data={"type": "object"}
)
EVENTS = page_of(EVENT)
CHECKPOINT = answer(
    "fine_tuning.job.checkpoint",
    id=TEXT,
    created_at=COUNT,
    fine_tuned_model_checkpoint=TEXT,
    fine_tuning_job_id=TEXT,
    metrics={"type": "object"},
    step_number=COUNT,
)
CHECKPOINTS = page_of(CHECKPOINT)
TOKENS = answer(None, count=COUNT, max_model_len=COUNT, tokens={"type": "array", "items": COUNT}, token_strs=ANY)
DETOKENIZED = answer(None, prompt=TEXT)
NUMBER = {"type": "number"}
FOUND = answer(None, p50=nullable(NUMBER), p99=nullable(NUMBER), count=COUNT)
DASHBOARD = answer(
    "dashboard",
    version=TEXT,
    model=TEXT,
    time=NUMBER,
    started=COUNT,
    objective=answer(None, ttft=nullable(NUMBER), tpot=nullable(NUMBER), itl=nullable(NUMBER)),
    requests=answer(None, running=COUNT, waiting=COUNT, rows=COUNT),
    latency=answer(None, ttft=FOUND, tpot=FOUND, itl=FOUND),
    seconds={"type": "object", "additionalProperties": {"type": "array", "items": NUMBER}},
    iterations={"type": "array", "items": {"type": "object"}},
    pages=answer(None, **dict.fromkeys(("requests", "tapes", "cached", "free", "total"), COUNT)),
    memory={"type": "array", "items": answer(None, purpose=TEXT, bytes={"type": "integer"})},
    adapters=answer(None, places=COUNT, resident=COUNT, host_bytes=COUNT, names={"type": "array", "items": TEXT}),
    jobs={"type": "array", "items": {"type": "object"}},
)
VERSION = answer(None, version=TEXT)


def deleted(kind: str) -> Schema:
    return answer(kind, id=TEXT, deleted={"const": True})
