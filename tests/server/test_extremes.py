"""The largest and smallest numbers that bodies may hold: an answer or a refusal, and everybody else is served on."""

import httpx
import pytest

BEYOND = 2**70
TINIEST = 5e-324


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("top_k", 2**31 - 1, 200),
        ("top_k", 2**31, 400),
        ("top_k", BEYOND, 400),
        ("seed", BEYOND, 200),
        ("seed", -BEYOND, 200),
        ("priority", BEYOND, 200),
        ("max_tokens", BEYOND, 200),
        ("temperature", TINIEST, 200),
        ("top_p", TINIEST, 200),
        ("min_p", TINIEST, 200),
        ("repetition_penalty", TINIEST, 400),
        ("repetition_penalty", 0.001, 200),
        ("repetition_penalty", 1000, 200),
        ("repetition_penalty", 1e300, 400),
        ("stop_token_ids", [2**31 - 1], 200),
        ("stop_token_ids", list(range(100, 200)), 200),
        ("stop_token_ids", [-1], 400),
        ("stop_token_ids", [-BEYOND], 400),
        ("prompt", [BEYOND], 400),
        ("prompt", [-1], 400),
    ],
)
def test_an_extreme_number(server, field, value, status):
    """With a token that must not be an end, so that stop ids go to the device."""
    body = {"prompt": "ab", "max_tokens": 250, "min_tokens": 1, "ignore_eos": True, "seed": 1, field: value}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert field in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_stop_id_that_is_no_token_changes_nothing(client):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 20, "temperature": 0}
    settings = {"ignore_eos": True, "min_tokens": 15}
    plain, with_id = (
        client.completions.create(**body, extra_body={**settings, **more}).choices[0].text
        for more in ({}, {"stop_token_ids": [2**31 - 1]})
    )
    assert plain == with_id
