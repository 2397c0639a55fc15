"""ModelConfig: what a model is, read from a Hugging Face ``config.json``. It knows no weights and imports no jax."""

import json
from dataclasses import dataclass
from pathlib import Path

MODEL_TYPES = ("llama", "qwen2")

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

MUST_BE = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "use_mrope": False,
    "quantization_config": None,
}
"""Keys that change the mathematics, with the only value that is implemented (an absent or null key counts as it)."""


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Parameters of the "llama3" stretching of rotary frequencies (Llama 3.1): wavelengths longer than
    ``original_max_position_embeddings / low_freq_factor`` are multiplied by ``factor``, those shorter than
    ``original_max_position_embeddings / high_freq_factor`` are kept, and those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"rope scaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor, got {self}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a Llama or Qwen2 decoder.

    Attributes:
        model_type: "llama" or "qwen2".
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: values per head; even, because rotary embedding turns pairs.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None for plain rotary embedding.
        tie_word_embeddings: the head is the transposed embedding.
        attention_bias: the q, k and v products have a bias (Qwen2).
        max_position_embeddings: context length in tokens.
        bos_token_id: None when the model has none.
        eos_token_ids: every id that ends a sequence, as the configuration lists them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type is {self.model_type!r}; supported are {', '.join(MODEL_TYPES)}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            positive_integer(name, getattr(self, name))
        positive_integer("max_position_embeddings", self.max_position_embeddings)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_heads}; it must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if positive_integer("head_dim", self.head_dim) % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")

    @property
    def q_width(self) -> int:
        """Values of all query heads of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Values of all key heads (equally: all value heads) of a token."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_directory(cls, path: str | Path) -> "ModelConfig":
        """Reads ``path/config.json``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or describes a model that is not supported.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"no config.json in {path}: it must be a Hugging Face model directory")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        try:
            return cls.from_dict(values if isinstance(values, dict) else {})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """From the keys of a Hugging Face configuration, with the defaults of transformers for absent ones.

        Raises:
            ValueError: a size is missing or impossible, or a key asks for mathematics that is not implemented.
        """
        model_type = values.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}")
        missing = [name for name in REQUIRED if values.get(name) is None]
        if missing:
            raise ValueError(f"the model configuration lacks {', '.join(missing)}")
        refuse_unsupported(values)
        for name in REQUIRED:
            positive_integer(name, values[name])
        rope = rope_values(values)
        return cls(
            model_type=model_type,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            rope_scaling=rope_scaling(rope),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=model_type == "qwen2",
            max_position_embeddings=values.get("max_position_embeddings")
            or {"llama": 2048, "qwen2": 32768}[model_type],
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=token_ids(values.get("eos_token_id")),
        )

    def to_dict(self) -> dict:
        """The keys of a Hugging Face ``config.json`` from which ``from_dict`` makes an equal value."""
        scaling = self.rope_scaling
        llama = {"attention_bias": False, "mlp_bias": False} if self.model_type == "llama" else {}
        return llama | {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling and {"rope_type": "llama3"} | vars(scaling),
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
        }


def positive_integer(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return value


def token_ids(value) -> tuple[int, ...]:
    """One id, a list of ids or None, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def refuse_unsupported(values: dict) -> None:
    """Raises ValueError naming every key whose value asks for mathematics that is not implemented."""
    faults = [
        f"{key} is {values[key]!r} (only {only!r} is supported)"
        for key, only in MUST_BE.items()
        if values.get(key) is not None and values[key] != only
    ]
    if values["model_type"] == "llama" and values.get("attention_bias"):
        faults.append(f"attention_bias is {values['attention_bias']!r} (for llama only False is supported)")
    if values.get("use_sliding_window") or (values["model_type"] == "llama" and values.get("sliding_window")):
        window = values.get("sliding_window")
        faults.append(f"sliding_window is {window!r} and in use (only full attention is supported)")
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        faults.append(f"layer_types has {', '.join(sorted(kinds))} (only full_attention is supported)")
    if faults:
        raise ValueError("the model needs what is not implemented: " + "; ".join(faults))


def rope_values(values: dict) -> dict:
    """Rotary keys in one dictionary, from ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling``."""
    found = {"rope_theta": values.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        found |= {name: value for name, value in (values.get(key) or {}).items() if value is not None}
    return found


def rope_scaling(rope: dict) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1 is supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope type is {kind!r}; supported are 'default' and 'llama3'")
    names = Llama3RopeScaling.__dataclass_fields__
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"rope scaling 'llama3' lacks {', '.join(missing)}")
    return Llama3RopeScaling(*(kind.type(rope[name]) for name, kind in names.items()))
