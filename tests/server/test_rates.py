"""Limits of requests and tokens a minute: hand-worked buckets on a clock of our own, then through the client."""

import asyncio
import threading

import openai
import pytest

from flexjax.server.errors import ApiError
from flexjax.server.rates import RateLimits
from tests.server.conftest import wait_until

GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


class Clock:
    now = 100

    def __call__(self) -> int:
        return self.now * 10**9


@pytest.fixture
def clock():
    return Clock()


def refusal(take, *arguments) -> ApiError:
    with pytest.raises(ApiError) as caught:
        take(*arguments)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


def test_requests_come_back_one_by_one(clock):
    """Three a minute: one every 20 seconds, and never more than three at once."""
    limits = RateLimits(3, 0, clock)
    for _ in range(3):
        limits.take_request("ann")
    error = refusal(limits.take_request, "ann")
    assert error.headers["Retry-After"] == "20" and "requests_per_minute is 3" in str(error)
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "60.000s"
    limits.take_request("bob")
    clock.now += 19
    assert refusal(limits.take_request, "ann").headers["Retry-After"] == "1"
    clock.now += 1
    limits.take_request("ann")
    refusal(limits.take_request, "ann")
    clock.now += 3600
    for _ in range(3):
        limits.take_request("ann")
    refusal(limits.take_request, "ann")


def test_tokens_that_were_not_needed_are_given_back(clock):
    """60 a minute, one a second."""
    limits = RateLimits(0, 60, clock)
    limits.take_tokens("ann", 50)
    assert refusal(limits.take_tokens, "ann", 20).headers["Retry-After"] == "10"
    limits.give_back("ann", 15)
    limits.take_tokens("ann", 20)
    assert limits.headers("ann") == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "5",
        "x-ratelimit-reset-tokens": "55.000s",
    }
    limits.give_back("ann", 1000)
    assert limits.headers("ann")["x-ratelimit-remaining-tokens"] == "60", "never more than a minute's worth"


def test_more_than_a_minutes_worth_waits_for_a_full_bucket_and_is_paid_for(clock):
    limits = RateLimits(0, 60, clock)
    limits.take_tokens("ann", 90)
    assert limits.headers("ann")["x-ratelimit-remaining-tokens"] == "0"
    assert refusal(limits.take_tokens, "ann", 1).headers["Retry-After"] == "31"
    clock.now += 60
    assert refusal(limits.take_tokens, "ann", 90).headers["Retry-After"] == "30"
    clock.now += 30
    limits.take_tokens("ann", 90)


def test_without_limits_everything_goes(clock):
    limits = RateLimits(0, 0, clock)
    for _ in range(100):
        limits.take_request("ann")
        limits.take_tokens("ann", 10**9)
    limits.give_back("ann", -(10**9))
    assert limits.headers("ann") == {}


def test_threads_do_not_get_more_than_there_is(clock):
    limits, let_in = RateLimits(100, 0, clock), []

    def take() -> None:
        for _ in range(50):
            try:
                limits.take_request("ann")
                let_in.append(1)
            except ApiError:
                continue

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(let_in) == 100


def frozen(server, clock):
    """The server's limits on our clock."""
    config = server.config
    server.service.rates = RateLimits(config.requests_per_minute, config.tokens_per_minute, clock)


def test_a_client_is_told_how_much_is_left(serving, clock):
    """A prompt of 5 tokens and 10 more."""
    with serving(requests_per_minute=2, tokens_per_minute=100) as server, server.client() as client:
        frozen(server, clock)
        ask = client.completions.with_raw_response.create
        first = ask(prompt="hello", max_tokens=10, **GREEDY)
        assert first.headers["x-ratelimit-remaining-tokens"] == "85"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        with ask(prompt="hello", max_tokens=10, stream=True, **GREEDY).parse() as stream:
            assert stream.response.headers["x-ratelimit-limit-requests"] == "2"
            assert list(stream)[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.RateLimitError) as caught:
            ask(prompt="hello", max_tokens=10, **GREEDY)
        assert caught.value.code == "rate_limit_exceeded" and caught.value.type == "rate_limit_error"
        headers = caught.value.response.headers
        assert (headers["retry-after"], headers["x-ratelimit-remaining-tokens"]) == ("30", "70")


def test_what_is_generated_is_what_is_paid_for(serving, clock):
    """70 of the 80 tokens that were allowed are not generated; a refused body costs nothing."""
    with serving(tokens_per_minute=100) as server, server.client() as client:
        frozen(server, clock)
        first = client.completions.create(prompt="hello", max_tokens=3, model="tiny", temperature=0, n=1)
        stop = first.choices[0].text[1:2]
        left = 100 - 5 - first.usage.completion_tokens
        answer = client.completions.create(prompt="hello", max_tokens=80, stop=stop, **GREEDY)
        left -= 5 + answer.usage.completion_tokens
        assert answer.usage.completion_tokens < 10
        with pytest.raises(openai.NotFoundError):
            client.completions.create(prompt="hello", max_tokens=80, model="ghost")
        with pytest.raises(openai.RateLimitError):
            client.completions.create(prompt="hello", max_tokens=left - 5 + 1, **GREEDY)
        client.completions.create(prompt="hello", max_tokens=left - 5, **GREEDY)
        message = [{"role": "user", "content": "a"}]
        clock.now += 60
        chat = client.chat.completions.create(messages=message, model="tiny", max_completion_tokens=5, temperature=0)
        assert server.service.rates.headers("")["x-ratelimit-remaining-tokens"] == str(100 - chat.usage.total_tokens)


def test_a_client_that_goes_away_gets_back_what_was_not_generated(serving, clock):
    with serving(tokens_per_minute=1000) as server, server.client() as client:
        frozen(server, clock)
        stream = client.completions.create(prompt="hello", max_tokens=200, stream=True, **GREEDY)
        next(iter(stream))
        stream.close()

        def left() -> int:
            return int(server.service.rates.headers("")["x-ratelimit-remaining-tokens"])

        wait_until(lambda: left() > 795)
        assert left() <= 994


def test_work_that_is_no_answer_counts_as_a_request(serving, clock):
    with serving(requests_per_minute=1) as server, server.client() as client:
        frozen(server, clock)
        client.files.create(file=("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune")
        with pytest.raises(openai.RateLimitError):
            client.files.create(file=("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune")
        assert len(client.files.list().data) == 1, "looking is free"


def test_each_owner_has_its_own(serving, tmp_path, clock):
    (tmp_path / "keys").write_text("ann sk-ann\nbob sk-bob\nbob sk-bob2\n")

    async def ask(server, key: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            try:
                return (await client.completions.create(prompt="a", max_tokens=1, **GREEDY)).choices[0].finish_reason
            except openai.RateLimitError:
                return "refused"

    async def ask_all(server, keys):
        return await asyncio.gather(*(ask(server, key) for key in keys))

    with serving(requests_per_minute=2, api_keys_file=str(tmp_path / "keys")) as server:
        frozen(server, clock)
        answers = asyncio.run(ask_all(server, ["sk-ann"] * 4))
        assert sorted(answers) == ["length", "length", "refused", "refused"]
        assert asyncio.run(ask_all(server, ["sk-bob", "sk-bob2"])) == ["length", "length"]
        assert asyncio.run(ask_all(server, ["sk-bob2", "sk-ann"])) == ["refused", "refused"]
