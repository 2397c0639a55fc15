"""How many tokens of a prompt were not computed again, as usage tells it; never those of another owner's prompt."""

import random

import pytest

PAGE = 64
GREEDY = {"model": "tiny", "max_tokens": 2, "temperature": 0}


def words(count: int, seed: int) -> str:
    """A prompt of so many tokens, a byte each."""
    return "".join(random.Random(seed).choices("abcdefghij", k=count))


def cached(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def test_whole_pages_are_found_again(client):
    prompt = words(150, seed=1)
    assert cached(client.completions.create(prompt=prompt, **GREEDY)) == 0
    assert cached(client.completions.create(prompt=prompt, **GREEDY)) == 2 * PAGE
    assert cached(client.completions.create(prompt=prompt[:100] + "z" * 50, **GREEDY)) == PAGE
    assert cached(client.completions.create(prompt=prompt[:PAGE], **GREEDY)) == 0, "the last token is computed"
    penalised = client.completions.create(prompt=prompt, presence_penalty=0.5, **GREEDY)
    assert cached(penalised) == 0, "penalties need every token to pass"


def test_every_prompt_counts_once(client):
    prompts = [words(150, seed=2), words(100, seed=3)]
    for prompt in prompts:
        client.completions.create(prompt=prompt, **GREEDY)
    answer = client.completions.create(prompt=prompts, n=3, **{**GREEDY, "temperature": 1})
    assert (answer.usage.prompt_tokens, cached(answer)) == (250, 2 * PAGE + PAGE)


def test_a_stream_tells_it_too(client):
    messages = [{"role": "user", "content": words(150, seed=4)}]
    first = client.chat.completions.create(messages=messages, **GREEDY)
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert (cached(first), cached(list(stream)[-1])) == (0, 2 * PAGE)


@pytest.mark.parametrize("name", ["tiny", "house"])
def test_another_owners_prompt_is_not_found(people, name):
    """Else anyone could find out, page by page, what others have asked."""
    prompt = words(150, seed=5)
    for who in ("ann", "bob", "operator"):
        ask = people[who].completions.create
        found = [cached(ask(prompt=prompt, **{**GREEDY, "model": name})) for _ in range(2)]
        assert found == [0, 2 * PAGE], who
