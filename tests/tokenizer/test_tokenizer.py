"""Tokenizers from directories and from GGUF metadata, against the tokenizer.json they must equal."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flexjax.tokenizer import Tokenizer
from flexjax.tokenizer.gguf_vocabulary import backend_from_gguf

SMOLLM2 = "models/smollm2-135m-instruct"
QWEN2 = "tokenizers/qwen2.5"
TYPES = {True: 3, False: 4}

PIECES = ["I'll", "don't", "  ", "\n\n", "\r\n", "\t", "1234567", "\u0663\u0664", "\u00e9", "e\u0301", "Ω", "中文字"]
PIECES += ["👩\u200d👩\u200d👧", "🇫🇷", "\ufb01", "\x00", "\u200b", "Ġ", "\U0010ffff", "a" * 40, "f_b(x)=3.14;"]
PIECES += ["...", "<|im_start|>", "<|im_end|>", "<|im_", "<|endoftext|>"]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=12)), max_size=8).map("".join)


def metadata_of(file: Path, pre: str) -> dict:
    """The metadata a GGUF file has for a tokenizer.json."""
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = dict(values["model"]["vocab"])
    types = {}
    for added in values["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        types[added["content"]] = TYPES[added["special"]]
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = values["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def pairs(shared) -> list[tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]]:
    """(the published tokenizer.json, the same rebuilt from GGUF metadata) for every pre-tokenizer there is one of."""
    files = {"smollm": shared / SMOLLM2 / "tokenizer.json", "qwen2": shared / QWEN2 / "tokenizer.json"}
    published = {pre: tokenizers.Tokenizer.from_file(str(file)) for pre, file in files.items()}
    return [(published[pre], backend_from_gguf(metadata_of(file, pre))) for pre, file in files.items()]


def test_rebuilt_tokenizers_encode_and_decode_alike(pairs):
    @given(TEXTS)
    def check(text):
        for published, rebuilt in pairs:
            ids = published.encode(text).ids
            assert rebuilt.encode(text).ids == ids
            assert rebuilt.decode(ids, skip_special_tokens=False) == published.decode(ids, skip_special_tokens=False)
            assert rebuilt.decode(ids) == published.decode(ids)

    check()


def small(pre: str | None, **more) -> dict:
    tokens = ["<b>", "<e>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "12", "34", "hello"]
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [3, 3] + [1] * (len(tokens) - 2)}
    metadata |= {"merges": ["1 2", "3 4"], "bos_token_id": 0, "eos_token_id": 1} | more
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def tokens_of(metadata: dict, text: str) -> list[str]:
    return backend_from_gguf(metadata).encode(text).tokens


def test_pre_tokenizers_cut_where_their_names_say():
    """Digits: in threes (Llama 3), one by one (Qwen2, SmolLM), or not at all (GPT-2); whole words before merges in
    Llama 3 only; BOS before a text in Llama 3 only."""
    assert tokens_of(small("llama-bpe"), "1234") == ["<b>", "12", "3", "4"]
    assert tokens_of(small("gpt-2"), "1234") == ["12", "34"]
    assert tokens_of(small("qwen2"), "1234") == tokens_of(small("smollm"), "1234") == ["1", "2", "3", "4"]
    assert tokens_of(small("llama-bpe"), "hello") == ["<b>", "hello"]
    assert tokens_of(small("gpt-2"), "hello") == list("hello")
    assert tokens_of(small("gpt-2"), "x'LL\n") == ["x", "'", "L", "L", "Ċ"]


def test_beginning_of_sequence_follows_the_file():
    assert tokens_of(small("llama-bpe", add_bos_token=False), "1") == ["1"]
    assert tokens_of(small("smollm", add_bos_token=True), "1<e>") == ["<b>", "1", "<e>"]
    tokenizer = Tokenizer.from_gguf(small("smollm", add_bos_token=True))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer.encode("1")) == 2 and len(tokenizer.encode("1", add_special_tokens=False)) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known pre-tokenizers are gpt-2, smollm"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["q q"]}, "do not fit together"),
        ({"tokens": ["a", "a"]}, "names 1 tokens twice"),
        ({"add_eos_token": True}, "tokenizer.ggml.add_eos_token is true"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=".*") as caught:
        Tokenizer.from_gguf(small(**{"pre": "smollm"} | changes))
    assert words in str(caught.value)


def test_special_tokens_and_sizes(shared):
    smollm2 = Tokenizer.from_directory(shared / SMOLLM2)
    assert (smollm2.vocabulary_size, smollm2.bos_token_id, smollm2.eos_token_id) == (49152, 1, 2)
    assert smollm2.decode([1, *smollm2.encode("Hi 😀"), 2]) == "Hi 😀"
    assert smollm2.decode([1, *smollm2.encode("Hi")], skip_special_tokens=False) == "<|im_start|>Hi"
    qwen2 = Tokenizer.from_directory(shared / QWEN2)
    assert (qwen2.vocabulary_size, qwen2.bos_token_id) == (151665, None) and qwen2.has_chat_template
    stories = Tokenizer.from_directory(shared / "models/stories260k")
    assert stories.encode("Once")[0] == 1 and stories.encode("Once", add_special_tokens=False)[0] != 1


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="decoder is WordPiece; supported are"):
        Tokenizer.from_directory(tmp_path)
