"""The tokenizer inside a GGUF file, rebuilt from its ``tokenizer.ggml.*`` metadata with the `tokenizers` library.

A GGUF file holds tokens and merges but only the *name* of the pre-tokenizer, the rule that cuts text before merging;
so only names whose rule is known exactly are accepted.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONTROL, USER_DEFINED = 3, 4
"""Token types of the GGUF specification that are matched in text before the pre-tokenizer sees it."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("gpt-2", "smollm", "qwen2", *LLAMA3_NAMES)


def backend_from_gguf(metadata: dict) -> Tokenizer:
    """A byte-level BPE tokenizer equal to the ``tokenizer.json`` the file was made from.

    Raises:
        ValueError: a needed key is absent, or asks for a kind of tokenizer that is not implemented.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) can be built from GGUF")
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; known pre-tokenizers are {', '.join(PRE_TOKENIZERS)}")
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise ValueError("tokenizer.ggml.add_eos_token is true; a prompt that ends itself cannot be continued")
    tokens = required(metadata, "tokens")
    backend = Tokenizer(byte_pairs(tokens, required(metadata, "merges"), ignore_merges=name in LLAMA3_NAMES))
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(name, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    backend.decoder = decoders.ByteLevel()
    add_marked_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type") or [])
    add_beginning(backend, metadata, default=name in LLAMA3_NAMES)
    return backend


def byte_pairs(tokens: list[str], merges: list[str], ignore_merges: bool) -> models.BPE:
    """The merging model; a merge is written as two tokens with a space between."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens names {len(tokens) - len(vocabulary)} tokens twice")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        return models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.tokens and tokenizer.ggml.merges do not fit together: {error}") from error


def required(metadata: dict, name: str) -> list:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not values:
        raise ValueError(f"the GGUF file has no tokenizer.ggml.{name}; a tokenizer cannot be built without them")
    return values


def pre_tokenizer(name: str, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    """The rule behind a pre-tokenizer's name."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)])
    split = Regex(QWEN2_SPLIT if name == "qwen2" else LLAMA3_SPLIT)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(split, behavior="isolated"), to_bytes])


def add_marked_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tells the tokenizer which tokens are matched whole: control tokens (special) and those the user defined."""
    for kind in (CONTROL, USER_DEFINED):
        marked = [token for token, its_kind in zip(tokens, types, strict=False) if its_kind == kind]
        backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token in marked])


def add_beginning(backend: Tokenizer, metadata: dict, default: bool) -> None:
    """Puts BOS before a text encoded with special tokens, if the file says so (Llama 3 does unless it says not)."""
    begin = special_tokens_from_gguf(metadata).get("bos_token")
    if begin is not None and metadata.get("tokenizer.ggml.add_bos_token", default):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, backend.token_to_id(begin))]
        )


def special_tokens_from_gguf(metadata: dict) -> dict[str, str]:
    """Names that chat templates use -> text of the token, for those the file names by id."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    return {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}
