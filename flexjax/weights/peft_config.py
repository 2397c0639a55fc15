"""What a PEFT ``adapter_config.json`` means for a model: which modules have which rank and alpha.

Every key is honoured, known to be harmless, or refused: a key that is not listed here must be empty or false. The
rules of matching are those of PEFT 0.21 (`check_target_module_exists` and `get_pattern_key`).
"""

import re

from flexjax.models.config import ModelConfig
from flexjax.models.lora import MODULES
from flexjax.weights.adapter import LoraAdapter, LoraTerm

HONOURED = frozenset({
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern",
})  # fmt: skip

HARMLESS = frozenset({
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "runtime_config",
    "eva_config",
})  # fmt: skip
"""Keys that say where an adapter comes from or how it was begun."""

ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "megatron_core": (None, "megatron.core"),
    "qalora_group_size": (None, 16),
}
"""Values that change nothing, of keys whose other values do (init_lora_weights: those that leave the base weights
alone; the others, such as pissa or olora, subtract from them what the adapter begins with)."""

PARENTS = dict.fromkeys(MODULES[:4], "self_attn") | dict.fromkeys(MODULES[4:], "mlp")


def refuse_unsupported(values: dict) -> None:
    """Raises ValueError naming every key, with its value, that asks for what is not implemented."""
    faults = []
    for key, value in values.items():
        if key in ALLOWED:
            if (type(value), value) not in [(type(allowed), allowed) for allowed in ALLOWED[key]]:
                faults.append(f"{key} is {value!r} (supported: {', '.join(map(repr, ALLOWED[key]))})")
        elif key not in HONOURED | HARMLESS and value:
            faults.append(f"{key} is {value!r} (not implemented; only empty or false)")
    if "peft_type" not in values:
        faults.append("peft_type is missing (supported: 'LORA')")
    if faults:
        raise ValueError("the adapter needs what is not implemented: " + "; ".join(faults))


def terms_of(values: dict, config: ModelConfig) -> dict[str, tuple[LoraTerm | None, ...]]:
    """Module -> per layer the rank and alpha an adapter has there, None where it has none.

    Raises:
        ValueError: a key is refused or malformed, a target is no module that can be adapted, or nothing is matched.
    """
    refuse_unsupported(values)
    check_numbers(values)
    matched = [name for name in module_names(config) if is_target(values, name)]
    adaptable = {full_name(layer, module): (layer, module) for layer in range(config.num_layers) for module in MODULES}
    wrong = [name for name in matched if name not in adaptable]
    if wrong:
        raise ValueError(
            f"target_modules is {values['target_modules']!r}, which matches {', '.join(wrong[:5])}; only "
            f"{', '.join(MODULES)} can be adapted"
        )
    if not matched:
        raise ValueError(
            f"target_modules is {values.get('target_modules')!r}, which matches no module of this model "
            f"(a {config.model_type} of {config.num_layers} layers)"
        )
    found = {adaptable[name]: term_of(values, name) for name in matched}
    modules = [module for module in MODULES if any(module == other for _, other in found)]
    return {module: tuple(found.get((layer, module)) for layer in range(config.num_layers)) for module in modules}


def check_numbers(values: dict) -> None:
    """Raises ValueError for ranks that are no positive integers and alphas that are no numbers."""
    patterns = lambda name: {f"{name}[{key!r}]": value for key, value in (values.get(name) or {}).items()}
    ranks = {"r": values.get("r")} | patterns("rank_pattern")
    alphas = {"lora_alpha": values.get("lora_alpha")} | patterns("alpha_pattern")
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{name} is {rank!r}; a rank must be a whole number of at least 1")
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < float("inf"):
            raise ValueError(f"{name} is {alpha!r}; it must be a finite number other than 0")


def module_names(config: ModelConfig) -> list[str]:
    """Names of all modules of the model as transformers has them, adaptable or not."""
    names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        others = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm")
        names += [prefix, *(f"{prefix}.{name}" for name in others), *(full_name(layer, module) for module in MODULES)]
    return names


def full_name(layer: int, module: str) -> str:
    """Name of an adaptable module, such as ``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{PARENTS[module]}.{module}"


def is_target(values: dict, name: str) -> bool:
    """Whether PEFT would adapt the module of this name."""
    targets, excluded = values.get("target_modules"), values.get("exclude_modules")
    if not isinstance(targets, str | list) or not targets:
        raise ValueError(f"target_modules is {targets!r}; it must be a list, a regular expression or 'all-linear'")
    if excluded and matches(excluded, name, "exclude_modules"):
        return False
    if isinstance(targets, str):
        if values.get("layers_to_transform") is not None or values.get("layers_pattern"):
            raise ValueError("layers_to_transform and layers_pattern need target_modules to be a list of names")
        if targets.lower() == "all-linear":
            return name.rpartition(".")[2] in MODULES
        return matches(targets, name, "target_modules")
    return name in targets or (matches(targets, name, "target_modules") and in_layers(values, name))


def matches(patterns: str | list[str], name: str, key: str) -> bool:
    """A regular expression that fits the whole name, or a list with its last parts."""
    if not isinstance(patterns, str):
        return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)
    try:
        return re.fullmatch(patterns, name) is not None
    except re.error as error:
        raise ValueError(f"{key} is {patterns!r}, which is no regular expression: {error}") from error


def in_layers(values: dict, name: str) -> bool:
    """Whether ``layers_to_transform`` (one index or several; None or none at all: every layer) allows a module."""
    layers, patterns = values.get("layers_to_transform"), values.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    found = (re.match(expression, name) for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."])
    index = next((match["index"] for match in found if match), None)
    return index is not None and int(index) in ([layers] if isinstance(layers, int) else layers)


def term_of(values: dict, name: str) -> LoraTerm:
    """Rank and alpha of one module: the first pattern that fits the end of its name, else the adapter's own."""
    rank = first_match(values.get("rank_pattern") or {}, name, "rank_pattern", values["r"])
    return LoraTerm(rank, first_match(values.get("alpha_pattern") or {}, name, "alpha_pattern", values["lora_alpha"]))


def first_match(patterns: dict, name: str, key: str, default):
    """The value of the first pattern that fits the end of a module's name."""
    return next((value for pattern, value in patterns.items() if matches(rf"(.*\.)?({pattern})", name, key)), default)


def config_for(adapter: LoraAdapter) -> dict:
    """The ``adapter_config.json`` of an adapter: the one it was read from, or a new one with PEFT's keys."""
    if adapter.peft_config:
        return adapter.peft_config | {"inference_mode": True}
    term = next(term for layers in adapter.terms.values() for term in layers if term is not None)
    empty = dict.fromkeys((
        "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config", "exclude_modules",
        "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config",
        "megatron_config", "modules_to_save", "monteclora_config", "revision", "target_parameters",
        "trainable_token_indices", "use_bdlora", "velora_config",
    ))  # fmt: skip
    off = dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), False)
    return (
        empty
        | off
        | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": adapter.base_model_name,
            "inference_mode": True,
            "init_lora_weights": True,
            "r": term.rank,
            "lora_alpha": term.alpha,
            "lora_dropout": adapter.dropout,
            "use_rslora": adapter.use_rslora,
            "bias": "none",
            "target_modules": list(adapter.target_modules),
            "rank_pattern": {},
            "alpha_pattern": {},
            "loftq_config": {},
            "megatron_core": "megatron.core",
            "qalora_group_size": 16,
        }
    )
