"""Pages of other sites, as browsers ask for them (https://fetch.spec.whatwg.org, the CORS protocol)."""

import httpx
import pytest

SITE, OTHER = "https://chat.example.org", "https://elsewhere.example.org"
QUESTION = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def ask_first(url: str, origin: str) -> httpx.Response:
    return httpx.options(f"{url}/v1/chat/completions", headers={"Origin": origin, **QUESTION})


@pytest.fixture(scope="module")
def url(serving):
    with serving(allowed_origins=(SITE,), api_keys=("sk-1",)) as server:
        yield server.url


def test_a_page_may_ask_beforehand_without_a_key(url):
    found = ask_first(url, SITE)
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] == SITE
    allowed = {name.strip().lower() for name in found.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type"} <= allowed and "POST" in found.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in found.headers


def test_another_sites_page_may_not(url):
    found = ask_first(url, OTHER)
    assert found.status_code == 400 and "access-control-allow-origin" not in found.headers
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    told = httpx.post(f"{url}/v1/completions", json=body, headers={"Origin": OTHER, "Authorization": "Bearer sk-1"})
    assert "access-control-allow-origin" not in told.headers


@pytest.mark.parametrize(("key", "status"), [("sk-1", 200), ("sk-2", 401)])
def test_a_page_reads_answers_and_refusals_with_their_ids(url, key, status):
    found = httpx.get(f"{url}/v1/models", headers={"Origin": SITE, "Authorization": f"Bearer {key}"})
    assert found.status_code == status and found.headers["access-control-allow-origin"] == SITE
    assert "X-Request-Id" in found.headers["access-control-expose-headers"] and found.headers["x-request-id"]


def test_without_origins_nothing_is_said(server):
    assert ask_first(server.url, SITE).status_code == 405
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/v1/models", headers={"Origin": SITE}).headers
