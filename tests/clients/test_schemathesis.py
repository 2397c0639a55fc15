"""Schemathesis makes requests of what /openapi.json describes, and such as it forbids: the service keeps its word."""

import os
import subprocess

import openai
import pytest

from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.server.config import ServerConfig
from flexjax.server.fine_tuning import ACTIONS
from tests.server.conftest import Running
from tests.server.jobs import PINNED, ROWS, SHORT, create, ended, jsonl, upload
from tests.tiny_model import ENGINE, write_tiny_model

KEY = "sk-operator"
NOT_KEPT = "positive_data_acceptance"
"""Not every body that the schema lets in can be answered: its model may not be there, its prompt be too long."""

EXAMPLES = os.environ.get("FLEXJAX_SCHEMATHESIS_EXAMPLES", "20")
"""Random requests of each operation, beside those at the limits of every field."""

SEED = os.environ.get("FLEXJAX_SCHEMATHESIS_SEED", "20")


@pytest.fixture
def program() -> str:
    found = os.environ.get("FLEXJAX_SCHEMATHESIS")
    if not found:
        pytest.skip("FLEXJAX_SCHEMATHESIS names no schemathesis: see make test-schemathesis")
    return found


@pytest.fixture
def server(tmp_path, compilation_cache):
    model = write_tiny_model(tmp_path / "tiny")
    settings = {**ENGINE, **PINNED, "model": str(model), "checkpoint_dir": str(tmp_path / "checkpoints")}
    with Engine.from_config(EngineConfig(**settings, compilation_cache=compilation_cache)) as engine:
        server = Running(engine, ServerConfig(port=0, data_dir=str(tmp_path / "data"), api_keys=(KEY,)))
        server.start()
        yield server
        server.stop()
        assert engine.scheduler.statistics.available_pages == engine.scheduler.statistics.pages


def settings(server) -> str:
    """Names of what there is, so that more than refusals are looked at; what is deleted is drawn."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with client:
        file = upload(client, jsonl(ROWS)).id
        job = ended(client, create(client, file, SHORT, seed=1).id)
    assert job.status == "succeeded", job.error
    jobs = "/v1/fine_tuning/jobs/{id}"
    known = {
        "GET /v1/files/{id}": file,
        "GET /v1/files/{id}/content": file,
        "GET /v1/models/{name}": job.fine_tuned_model,
    }
    known |= {f"GET {jobs}{rest}": job.id for rest in ("", "/events", "/checkpoints")}
    known |= {f"POST {jobs}/{action}": job.id for action in ACTIONS}
    tables = []
    for operation, value in known.items():
        parameter = "path.name" if "{name}" in operation else "path.id"
        tables += ["[[operations]]", f'include-name = "{operation}"', f'parameters = {{ "{parameter}" = "{value}" }}']
    return "\n".join(tables)


def test_the_service_does_what_its_document_says(program, server, tmp_path):
    (tmp_path / "schemathesis.toml").write_text(settings(server))
    words = [program, "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    words += ["--checks", "all", "--exclude-checks", NOT_KEPT, "--phases", "examples,coverage,fuzzing,stateful"]
    words += ["--seed", SEED, "--max-examples", EXAMPLES, "--continue-on-failure", "--no-color"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
