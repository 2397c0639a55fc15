"""Rows of every kind become the tokens and masks worked out by hand; bad rows are named by line."""

import json

import numpy as np
import pytest

from flexjax.finetuning.dataset import DatasetError, read_dataset

CHAT = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}
COMPLETION = {"prompt": "ab", "completion": "c"}
WEIGHTED = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "c", "weight": 1},
    ]
}
TOKENS = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 0]}


@pytest.fixture
def read(tokenizer):
    def read(data, max_length=100, train_on="assistant"):
        return read_dataset(data, tokenizer, vocab_size=40, max_length=max_length, train_on=train_on)

    return read


def lines_of(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("row", "train_on", "ids", "mask"),
    [
        (CHAT, "assistant", [3, 10, 11, 3, 12, 2], [0, 0, 0, 0, 1, 1]),
        (CHAT, "all", [3, 10, 11, 3, 12, 2], [0, 1, 1, 1, 1, 1]),
        (WEIGHTED, "assistant", [3, 10, 3, 11, 2, 3, 10, 3, 12, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
        (WEIGHTED, "all", [3, 10, 3, 11, 2, 3, 10, 3, 12, 2], [0, *[1] * 9]),
        (COMPLETION, "assistant", [1, 10, 11, 12, 2], [0, 0, 0, 1, 1]),
        (COMPLETION, "all", [1, 10, 11, 12, 2], [0, 1, 1, 1, 1]),
        (TOKENS, "assistant", [5, 6, 7], [0, 1, 0]),
        (TOKENS, "all", [5, 6, 7], [0, 1, 0]),
        ({"input_ids": np.array([5, 6]), "loss_mask": np.array([True, True])}, "all", [5, 6], [0, 1]),
    ],
)
def test_tokens_and_mask_of_a_row(read, row, train_on, ids, mask):
    (example,) = read([row], train_on=train_on).examples
    assert example.input_ids.tolist() == ids
    assert example.loss_mask.tolist() == [bool(each) for each in mask]
    assert (example.input_ids.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)


def test_a_developers_message_is_a_systems(read, tokenizer):
    seen = []
    tokenizer.assistant_mask = lambda messages, learned: seen.append(messages) or ([3, 4], [0, 1])
    read([{"messages": [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    assert seen == [[{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]]


def test_only_what_a_loss_depends_on_is_computed(read):
    row = {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [1, 1, 0, 1, 0]}
    (example,) = read([row]).examples
    assert (example.trained_tokens, example.computed_tokens) == (2, 3)


def test_lines_count_from_one_and_skip_blank_ones(read, tmp_path):
    dataset = read(lines_of(tmp_path, "\ufeff" + json.dumps(CHAT), "", COMPLETION, "  ", TOKENS))
    assert [example.line for example in dataset.examples] == [1, 3, 5]
    assert (dataset.tokens, dataset.trained_tokens, dataset.truncated) == (14, 5, 0)


def test_rows_come_from_any_iterable(read):
    dataset = read(row for row in [CHAT, TOKENS])
    assert [example.line for example in dataset.examples] == [1, 2]


def test_long_rows_are_cut_off(read):
    dataset = read([CHAT, TOKENS], max_length=5)
    assert dataset.examples[0].input_ids.tolist() == [3, 10, 11, 3, 12]
    assert dataset.truncated == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"not valid JSON \(column 2\)"),
        ('"text"', "a row must be an object, not str"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"input_ids": [' + "9" * 5000 + "]}", "not readable as JSON"),
        ({"message": []}, r"unknown key 'message' \(did you mean 'messages'\?\); a row is \{messages\} or"),
        ({"prompt": "a"}, r"keys are prompt; a row is .*\{prompt, completion\}"),
        ({**COMPLETION, "extra": 1}, "unknown key 'extra'"),
        ({**COMPLETION, **CHAT}, "keys are prompt, completion, messages"),
        ({}, "keys are absent"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": ["hi"]}, "message 1 must be an object with the keys role and content"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "message 1 must be .* and no other"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "message 1 has the role 'bot'; it must be one of system, user",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1: content must be text, not list"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "message 1: weight is 1; only an assistant's"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "message 1: weight is 0.5; .* 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "no trained token"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "the chat template refuses these messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no trained token; the first token"),
        ({"prompt": 1, "completion": "a"}, "prompt must be text, not int"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"input_ids": "abc", "loss_mask": [1]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [True, 2], "loss_mask": [1, 1]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask must be a list of true or false"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "input_ids has 2 entries and loss_mask 1; they must be equally long"),
        ({"input_ids": [1, 40], "loss_mask": [0, 1]}, "token id 40 is outside the vocabulary of 40 tokens"),
        ({"input_ids": [1, -1], "loss_mask": [0, 1]}, "token id -1 is outside"),
        ({"input_ids": [1, 2], "loss_mask": [1, 0]}, "no trained token"),
        ({"input_ids": [], "loss_mask": []}, "no trained token"),
        (
            {"input_ids": [1] * 101, "loss_mask": [0] * 100 + [1]},
            r"no trained token within the first 100 of 101 .*max_len",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(read, tmp_path, row, message):
    with pytest.raises(DatasetError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read(lines_of(tmp_path, CHAT, row))


def test_a_bad_byte_has_a_line(read, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(CHAT).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DatasetError, match=r"line 2: not UTF-8 \(byte 13 of the line\)"):
        read(path)


def test_all_bad_rows_are_reported_up_to_twenty(read):
    with pytest.raises(DatasetError) as caught:
        read([TOKENS] + [{}] * 23)
    first, *rows = str(caught.value).splitlines()
    assert first == "23 of 24 rows of data cannot be used:"
    assert [row.strip().split(":")[0] for row in rows[:-1]] == [f"data, row {number}" for number in range(2, 22)]
    assert rows[-1].strip() == "... and 3 more"


def test_no_rows_and_no_file_are_errors(read, tmp_path):
    with pytest.raises(DatasetError, match="data holds no rows"):
        read([])
    with pytest.raises(DatasetError, match="rows.jsonl holds no rows"):
        read(lines_of(tmp_path, ""))
    with pytest.raises(DatasetError, match="cannot read the data .*absent.jsonl: No such file"):
        read(tmp_path / "absent.jsonl")


def test_the_fingerprint_sees_tokens_masks_and_borders(read):
    rows = [
        [TOKENS],
        [{"input_ids": [5, 6, 8], "loss_mask": [0, 1, 0]}],
        [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}],
        [TOKENS, TOKENS],
        [{"input_ids": [5, 6, 7] * 2, "loss_mask": [0, 1, 0] * 2}],
    ]
    assert len({read(each).fingerprint for each in rows}) == len(rows)
    assert read(rows[0]).fingerprint == read([dict(TOKENS)]).fingerprint
