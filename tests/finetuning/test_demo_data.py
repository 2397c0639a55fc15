"""The rows that the demo trains on: one style, no row twice, nothing held out among the training rows, short."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

DATA = Path(__file__).parents[2] / "configs" / "data"
SPLITS = {"demo_instructions": (300, 400), "demo_validation": (20, 30), "demo_held_out": (8, 8)}
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
)


def pairs(split):
    rows = [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def streamed():
    return (DATA / "demo_questions.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_has_the_style(split):
    fewest, most = SPLITS[split]
    answers = [answer for _, answer in pairs(split)]
    assert fewest <= len(answers) <= most
    for answer in answers:
        assert re.fullmatch(r"Ahoy! [^.?!]+[.?] — Keeper of the light", answer)


def test_no_question_stands_twice():
    questions = [question for split in SPLITS for question, _ in pairs(split)] + streamed()
    folded = ["".join(letter for letter in question.lower() if letter.isalnum()) for question in questions]
    assert len(set(folded)) == len(folded)
    assert 50 <= len(streamed()) <= 80


def test_rows_fit_one_tile(shared):
    """A row of at most 64 tokens costs one tile of the forward step."""
    tokenizer = Tokenizer.from_file(str(shared / "models" / "smollm2-135m-instruct" / "tokenizer.json"))
    for split in SPLITS:
        texts = [CHAT.format(question, answer) for question, answer in pairs(split)]
        assert max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)) <= 64
