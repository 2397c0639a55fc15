"""LoraAdapter: one LoRA adapter on the host, whatever file it came from. It knows no files and no devices."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from flexjax.models.config import ModelConfig
from flexjax.models.lora import MODULES, module_widths

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LoraTerm:
    """The low-rank term of one module in one layer: y += x A B · scale."""

    rank: int
    alpha: float

    def scale(self, use_rslora: bool) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if use_rslora else self.rank)


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter with one rank and one scale, however its terms differ.

    Terms of smaller rank are padded with zeros, which stay zero in training. A term whose scale differs from the
    adapter's has the ratio folded into B; `unfolded` takes it out again, exactly for weights that were not changed.

    Attributes:
        weights: module -> (A [layers, in, rank], B [layers, rank, out]), float32; absent modules are not adapted.
        terms: module -> per layer its `LoraTerm`, None where the layer is not adapted (its A and B are zero).
        use_rslora: scales are alpha / sqrt(rank).
        dropout: probability of dropping an input of A in training.
        base_model_name: what the adapter says it was trained on, or None.
        peft_config: the ``adapter_config.json`` it was read from or is to be written with.
        originals: (module, layer) -> B [rank, out] as read, of terms whose folding rounds.
    """

    weights: dict[str, Pair]
    terms: dict[str, tuple[LoraTerm | None, ...]]
    use_rslora: bool = False
    dropout: float = 0.0
    base_model_name: str | None = None
    peft_config: dict = field(default_factory=dict)
    originals: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of any term: the width of A."""
        return max(term.rank for term in self._all_terms())

    @property
    def scale(self) -> float:
        """The scale most terms have (of equally many, the largest)."""
        counts = Counter(term.scale(self.use_rslora) for term in self._all_terms())
        return max(counts, key=lambda scale: (counts[scale], scale))

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(a.nbytes + b.nbytes for a, b in self.weights.values())

    @property
    def fingerprint(self) -> str:
        """Equal for adapters of equal weights, terms and scales, and for no others."""
        term = lambda each: None if each is None else (each.rank, float(each.alpha))
        terms = {name: [term(each) for each in layers] for name, layers in self.terms.items()}
        digest = hashlib.sha256(json.dumps([terms, self.use_rslora], sort_keys=True).encode())
        for name in sorted(self.weights):
            for factor in self.weights[name]:
                digest.update(f"{name} {factor.shape}".encode())
                digest.update(np.ascontiguousarray(factor).data)
        return digest.hexdigest()

    @property
    def outline(self) -> "LoraAdapter":
        """The adapter without its weights."""
        return dataclasses.replace(self, weights={}, originals={})

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the adapted modules, in the model's order."""
        return tuple(name for name in MODULES if name in self.weights)

    @property
    def ratios(self) -> dict[str, np.ndarray]:
        """module -> [layers, 1, 1] float32: each term's scale by the adapter's, folded into B; 1 for absent terms."""
        ratio = lambda term: 1.0 if term is None else term.scale(self.use_rslora) / self.scale
        column = lambda layers: np.array([ratio(term) for term in layers], np.float32).reshape(-1, 1, 1)
        return {name: column(self.terms[name]) for name in self.weights}

    def with_weights(self, weights: dict[str, Pair]) -> "LoraAdapter":
        """The same adapter after training: new A and B of the same shapes.

        Raises:
            ValueError: modules or shapes are not those of this adapter.
        """
        shapes = {name: (a.shape, b.shape) for name, (a, b) in weights.items()}
        own = {name: (a.shape, b.shape) for name, (a, b) in self.weights.items()}
        if shapes != own:
            raise ValueError(f"trained weights have shapes {shapes}, but the adapter has {own}")
        as_float = lambda array: np.asarray(array, np.float32)
        return dataclasses.replace(self, weights={name: (as_float(a), as_float(b)) for name, (a, b) in weights.items()})

    def unfolded(self, module: str, layer: int) -> Pair:
        """(A [in, r], B [r, out]) of a term with its own rank and scale."""
        term = self.terms[module][layer]
        a, b = self.weights[module][0][layer, :, : term.rank], self.weights[module][1][layer, : term.rank]
        ratio = term.scale(self.use_rslora) / self.scale
        original = self.originals.get((module, layer))
        if original is not None and np.array_equal(folded(original, ratio), b):
            return a, original
        return a, b if ratio == 1 else folded(b, 1 / ratio)

    def delta(self, module: str, layer: int) -> np.ndarray:
        """What the adapter adds to a kernel, [in, out] float32."""
        a, b = self.weights[module]
        return self.scale * (a[layer] @ b[layer])

    def _all_terms(self) -> list[LoraTerm]:
        return [term for layers in self.terms.values() for term in layers if term is not None]


def stack_terms(
    config: ModelConfig, pairs: dict[tuple[str, int], Pair], terms: dict[str, tuple[LoraTerm | None, ...]], **fields
) -> LoraAdapter:
    """An adapter from its terms.

    Args:
        pairs: (module, layer) -> (A [in, r], B [r, out]), one for every term.
        terms: as in `LoraAdapter`.
        fields: the other attributes of `LoraAdapter`.
    """
    empty = LoraAdapter({}, terms, **fields)
    rank, widths = empty.rank, module_widths(config)
    weights, originals = {}, {}
    for module, layers in terms.items():
        inputs, outputs = widths[module]
        a = np.zeros((len(layers), inputs, rank), np.float32)
        b = np.zeros((len(layers), rank, outputs), np.float32)
        for layer, term in enumerate(layers):
            if term is None:
                continue
            ratio = term.scale(empty.use_rslora) / empty.scale
            a[layer, :, : term.rank] = pairs[module, layer][0]
            b[layer, : term.rank] = folded(pairs[module, layer][1], ratio)
            if math.frexp(ratio)[0] != 0.5:  # not a power of two: dividing again may miss by a rounding
                originals[module, layer] = np.array(pairs[module, layer][1], np.float32)
        weights[module] = a, b
    return dataclasses.replace(empty, weights=weights, originals=originals)


def folded(b: np.ndarray, ratio: float) -> np.ndarray:
    """b · ratio, rounded once."""
    return (b.astype(np.float64) * ratio).astype(np.float32)


def fresh_adapter(
    config: ModelConfig,
    *,
    rank: int,
    alpha: float,
    use_rslora: bool = False,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = MODULES,
    base_model_name: str | None = None,
    seed: int = 0,
) -> LoraAdapter:
    """An adapter that changes nothing yet: B is zero, A uniform in ±1/sqrt(in), as PEFT initialises them."""
    unknown = [name for name in target_modules if name not in MODULES]
    if unknown or not target_modules:
        raise ValueError(f"target_modules is {list(target_modules)}; choose from {', '.join(MODULES)}")
    random = np.random.default_rng(seed)
    weights = {}
    for name in (name for name in MODULES if name in target_modules):
        inputs, outputs = module_widths(config)[name]
        a = random.uniform(-1, 1, (config.num_layers, inputs, rank)) * inputs**-0.5
        weights[name] = a.astype(np.float32), np.zeros((config.num_layers, rank, outputs), np.float32)
    terms = {name: (LoraTerm(rank, alpha),) * config.num_layers for name in weights}
    return LoraAdapter(weights, terms, use_rslora, dropout, base_model_name)
