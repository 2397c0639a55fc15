"""Incremental text: all pieces together are the text of decoding at once, for any token ids whatever."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax.tokenizer import Tokenizer

FOLDERS = ["models/smollm2-135m-instruct", "models/stories260k", "tokenizers/qwen2.5"]


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request, shared) -> Tokenizer:
    return Tokenizer.from_directory(shared / request.param)


def pieces(tokenizer: Tokenizer, token_ids: list[int], **options) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def test_pieces_join_to_the_decoded_text(tokenizer):
    """Ids are drawn mostly from the low ones, where bytes and special tokens are, and some beyond the vocabulary."""
    ids = st.lists(st.one_of(st.integers(0, 270), st.integers(0, tokenizer.vocabulary_size + 5)), max_size=30)

    @given(ids, st.booleans())
    @example([], True)
    def check(token_ids, skip):
        text = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert "".join(pieces(tokenizer, token_ids, skip_special_tokens=skip)) == text

    check()


def test_no_piece_has_part_of_a_character(tokenizer):
    text = "naïve 😀 日本語 👩‍👩‍👧 и Ω\n fin"
    parts = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    assert max(map(len, parts)) < len(text) / 2  # it streams: nothing was kept to the end


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    """Tokenizers of one family put a space before the text."""
    text = "naïve 😀 日本語 и Ω\n fin"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(tokenizer.vocabulary_size + 5) == b""


def test_an_unfinished_character_shows_at_the_end_only(tokenizer):
    ids = tokenizer.encode("ok 𓀀", add_special_tokens=False)[:-1]
    *parts, last = pieces(tokenizer, ids)
    assert "".join(parts).startswith("ok") and "�" not in "".join(parts) and "�" in last


def test_text_that_continues_a_prompt_keeps_its_first_space(shared):
    tokenizer = Tokenizer.from_directory(shared / "models/stories260k")
    whole, prompt = tokenizer.encode("Once upon a time"), tokenizer.encode("Once upon")
    assert whole[: len(prompt)] == prompt
    assert "".join(pieces(tokenizer, whole[len(prompt) :], prompt_ids=prompt)) == " a time"
    assert "".join(pieces(tokenizer, whole[1:], prompt_ids=[1])) == "Once upon a time"
