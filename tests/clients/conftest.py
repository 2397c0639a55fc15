"""The service in a process of its own, as anybody starts it, with keys."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.server.processes import served, write_config

KEY = "sk-operator"


@dataclass(frozen=True)
class Service:
    """Attributes:
    url: of the API, with its /v1.
    model, data: folders of the tiny model and of what the service keeps.
    client: of the main environment, for what is not the client's business.
    """

    url: str
    model: Path
    data: Path
    client: openai.OpenAI

    @property
    def task(self) -> dict:
        """What every script is told."""
        return {"url": self.url, "key": KEY, "model": "tiny", "directory": str(self.model)}


@contextmanager
def service_of(folder: Path, compilation_cache: str, **server) -> Iterator[Service]:
    config = write_config(folder, compilation_cache, {"api_keys": [KEY], **server})
    with served(config) as (_, anonymous):
        client = anonymous.with_options(api_key=KEY)
        yield Service(str(client.base_url).rstrip("/"), folder / "tiny", folder / "data", client)


@pytest.fixture(scope="session")
def noted(request) -> Iterator[dict[str, dict]]:
    """What came of each client, which the page about them tells; written down at the end, unless a test failed."""
    found: dict[str, dict] = {}
    yield found
    file = os.environ.get("FLEXJAX_CLIENT_RESULTS")
    if file and not request.session.testsfailed:
        Path(file).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def service(tmp_path_factory, compilation_cache) -> Iterator[Service]:
    with service_of(tmp_path_factory.mktemp("service"), compilation_cache) as service:
        yield service
