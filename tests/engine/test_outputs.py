"""Collectors: what listeners are told about growing outputs."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from flexjax.engine.outputs import Collector, logprob_entry
from flexjax.engine.prefix import Prefix
from flexjax.request import FinishReason, Request, RequestOutput, SamplingParams
from flexjax.tokenizer import Tokenizer
from tests.tiny_model import SPECIAL, byte_tokenizer


class Listener(list):
    put = list.append


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer(), {"eos_token": SPECIAL[0]})


def told(tokens, finish: FinishReason | None, tokenizer=None, logprobs=None, **sampling) -> list[RequestOutput]:
    """Snapshots after each token, the last of which comes with ``finish``."""
    listener, params = Listener(), SamplingParams(logprobs=logprobs, **sampling)
    collector = Collector(Request(1, (7, 8), params, max_new_tokens=99), 3, tokenizer, listener)
    for number, token in enumerate(tokens, 1):
        entry = None if logprobs is None else {token: -0.5 * number}
        if collector.push(token, finish if number == len(tokens) else None, entry):
            break
    return listener


def test_every_snapshot_stays_as_it_was():
    snapshots = told([5, 6, 5, 9], FinishReason.LENGTH)
    assert [each.token_ids for each in snapshots] == [[5], [5, 6], [5, 6, 5], [5, 6, 5, 9]]
    assert [each.finish_reason for each in snapshots] == [None, None, None, "length"]
    assert {(each.index, tuple(each.prompt_token_ids)) for each in snapshots} == {(3, (7, 8))}


def test_the_last_snapshot_is_plain_values():
    *_, last = told([5, 6], FinishReason.STOP, logprobs=1)
    wanted = RequestOutput(3, [7, 8], [5, 6], "", "stop", [{5: -0.5}, {6: -1.0}], None, None)
    assert last == wanted
    assert json.loads(json.dumps(last.token_ids)) == asdict(last)["token_ids"] == [5, 6]


def test_text_grows_and_stop_strings_end_it(tokenizer):
    letters = [tokenizer.encode(letter)[0] for letter in "one two"]
    snapshots = told(letters, None, tokenizer, stop=("e t",), max_tokens=None)
    assert [each.text for each in snapshots] == ["o", "on", "on", "on", "on"]
    assert [each.finish_reason for each in snapshots] == [None] * 4 + ["stop"]
    assert snapshots[-1].token_ids == letters[:5]


def test_text_without_stop_strings_is_shown_at_once(tokenizer):
    letters = [tokenizer.encode(letter)[0] for letter in "one"]
    assert [each.text for each in told(letters, FinishReason.LENGTH, tokenizer)] == ["o", "on", "one"]


def test_a_prefix_reads_as_a_list_of_its_items():
    items = [4, 5, 6, 7]
    prefix = Prefix(items, 3)
    items.append(8)
    for index in (0, 2, -1, -3, slice(1, None), slice(None, None, -1), slice(5, 9), slice(-2, None), slice(0, 9, 2)):
        assert prefix[index] == [4, 5, 6][index]
    assert (len(prefix), list(prefix), 7 in prefix, 6 in prefix) == (3, [4, 5, 6], False, True)
    assert prefix == [4, 5, 6] and prefix != [4, 5] and prefix == Prefix([4, 5, 6, 1], 3)
    for index in (3, -4):
        with pytest.raises(IndexError):
            prefix[index]


def test_likeliest_tokens_and_the_token_itself():
    ids, values = np.array([9, 4, 2], np.int32), np.array([-0.25, -1.5, -4], np.float32)
    assert logprob_entry(np.float32(-7.5), ids, values, token=30, count=2) == {9: -0.25, 4: -1.5, 30: -7.5}
    assert logprob_entry(np.float32(-1.5), ids, values, token=4, count=2) == {9: -0.25, 4: -1.5}
    assert list(logprob_entry(np.float32(-7.5), ids, values, token=30, count=0)) == [30]
