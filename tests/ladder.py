"""The rig that the ladder of proof climbs on: a tiny model, its compiled programs and state, driven as the engine does.

Programs are compiled once per process and shape (`compiled`); a rig is their fresh state, with pages handed out in a
random order from a pool that is full of old numbers. Everything passes through the batches of `flexjax.engine.batch`.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file

from flexjax.engine.adapters import BASE, AdapterTable, AdapterVersion
from flexjax.engine.batch import (
    SamplingBatch,
    Serving,
    Training,
    backward_batch,
    forward_batch,
    loss_batch,
    sampling_batch,
)
from flexjax.engine.programs import JobShape, Programs
from flexjax.engine.runner import StepOutput
from flexjax.finetuning.dataset import Example
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.layout import PAGE_TOKENS, SlotLayout, tiles_for
from flexjax.models.build import abstract_decoder, place_weights
from flexjax.models.config import Llama3RopeScaling, ModelConfig
from flexjax.models.lora import MODULES, PRODUCTS, ROW_PARALLEL, module_widths
from flexjax.models.matrices import with_matrices
from flexjax.request import Request, SamplingParams
from flexjax.scheduler.output import DecodeSlot, Iteration, MicrobatchPages, PromptSegment, WindowSegment
from flexjax.state import (
    AdapterStack,
    Dimensions,
    Master,
    gradient_shapes,
    padded_rank,
    pool_shape,
    row_shapes,
    summed_over_shards,
)
from flexjax.steps.kernels import Kernels
from flexjax.steps.update import OptimizerSpec, new_master
from flexjax.weights.huggingface import huggingface_name
from flexjax.weights.stacking import StackedWeights, parts_of
from tests.dense_model import QUICK, DenseModel

LLAMA = ModelConfig(
    **dict(model_type="llama", vocab_size=56, hidden_size=48, intermediate_size=72, num_layers=2, num_heads=8),
    **dict(num_kv_heads=4, head_dim=4, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    **dict(attention_bias=False, max_position_embeddings=512, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64)),
)
"""Untied, rotary scaling; a page row is 32 values, so every name of the tape and the final state take several pages."""

QWEN = ModelConfig(
    **dict(model_type="qwen2", vocab_size=40, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6),
    **dict(num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=500.0, tie_word_embeddings=True),
    **dict(attention_bias=True, max_position_embeddings=512, rope_scaling=None),
)
"""Tied, biases, three query heads to each key/value head."""

ROWS, CONTEXT, MICROBATCH, WINDOW, PAGES, RANK_CAPACITY, ADAPTERS = 4, 384, 384, 128, 160, 48, 4
DECODE = SlotLayout(ROWS, logprobs=True)
PROMPT = SlotLayout(ROWS, 256, logprobs=True, prompt_logprobs=True)
MIXED = SlotLayout(ROWS, 384, tape=True, logprobs=True)
TAPED = SlotLayout(ROWS, 384, tape=True)
DROPOUT = SlotLayout(ROWS, 384, tape=True, dropout=True, logprobs=True)
LEAN, WIDE, FULL = ("x",), ("x", "attention", "gate", "up"), ("x", "q", "attention", "mid", "gate", "up")
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, eq=False)
class Model:
    """A model on the host: its configuration and its arrays by their Hugging Face names."""

    config: ModelConfig
    tensors: dict[str, np.ndarray]

    @classmethod
    @functools.cache
    def random(cls, config: ModelConfig) -> "Model":
        draw = np.random.default_rng(0).standard_normal
        tensors = {}
        for part in parts_of(config):
            values = draw(part.shape)
            if part.name.endswith("norm"):
                values = 1 + 0.2 * values
            elif part.name != "embed":
                values *= 0.3 if len(part.shape) == 1 else part.shape[1] ** -0.5
            tensors[huggingface_name(part)] = values.astype(np.float32)
        return cls(config, tensors)

    @classmethod
    @functools.cache
    def from_directory(cls, path: Path) -> "Model":
        return cls(ModelConfig.from_directory(path), load_file(path / "model.safetensors"))

    @functools.cached_property
    def dense(self) -> DenseModel:
        return DenseModel(self.config, self.tensors)

    def tree(self, dtype, tp: int) -> dict[str, np.ndarray]:
        """The arrays stacked and fused for ``tp`` shards."""
        weights = StackedWeights.allocate(self.config, dtype, tp)
        for part in parts_of(self.config):
            weights.put(part, self.tensors[huggingface_name(part)])
        return weights.tree

    def tokens(self, count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, count, dtype=np.int32)

    def factors(self, rank: int, seed: int, modules=MODULES) -> dict[str, dict[str, np.ndarray]]:
        """A random adapter, B too: {"a": module -> [layers, in, r], "b": module -> [layers, r, out]}, float32."""
        draw = np.random.default_rng(seed).standard_normal
        widths, layers = module_widths(self.config), self.config.num_layers
        a = {name: draw((layers, widths[name][0], rank)) * widths[name][0] ** -0.5 for name in modules}
        b = {name: draw((layers, rank, widths[name][1])) * 0.4 for name in modules}
        return jax.tree.map(np.float32, {"a": a, "b": b})


@functools.cache
def compiled(
    model: Model, tape: tuple[str, ...], window: int, pages: int, dtype, tp: int, kernels: Kernels | None = None
) -> tuple[Programs, object]:
    """The programs of one shape, empty at first, and the weights they run on."""
    sizes = dict(max_rows=ROWS, context=CONTEXT, pages=pages, rank_capacity=RANK_CAPACITY, adapters=ADAPTERS)
    dims = Dimensions(model.config, dtype, **sizes, microbatch=MICROBATCH, window=window, tape=tape, tp=tp)
    definition, shapes = abstract_decoder(model.config, dtype, tp)
    weights = place_weights(shapes, model.tree(dtype, tp), lambda _, array: jnp.asarray(array))
    mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",))
    programs = Programs(definition, weights, dims, kernels or Kernels(), mesh)
    programs.options = programs.options | QUICK
    return programs, weights


class Rig:
    """State beside compiled programs. Requests are known by number, microbatches too; one job trains at a time.

    Attributes:
        pool, rows, stack: as in `flexjax.state`, written by every step.
        master, gradients: of the job, after `begin`.
    """

    def __init__(
        self, model: Model, *, tape=LEAN, window=WINDOW, pages=PAGES, dtype=jnp.float32, tp=1, kernels=None
    ):
        self.model = model
        self.programs, self.weights = compiled(model, tape, window, pages, dtype, tp, kernels)
        self.weights = self.programs.joined(self.weights)  # its own: updates write into them
        self.dims, self.layers = self.programs.dims, self.programs.layer_views(self.weights)
        random = np.random.default_rng(1)
        shape = pool_shape(self.dims)
        self.pool = jnp.asarray(3 * random.standard_normal(shape.shape), shape.dtype)
        self.rows, self.stack = zeros(row_shapes(self.dims)), self.programs.new_stack(self.weights)
        self.table = AdapterTable(ADAPTERS, RANK_CAPACITY)
        self.free = random.permutation(pages).tolist()
        self.serving: dict[int, Serving] = {}
        self.seats: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.training: dict[int, Training] = {}

    def take_pages(self, count: int) -> tuple[int, ...]:
        return tuple(self.free.pop() for _ in range(count))

    def load(self, name: str, factors: dict, scale: float) -> AdapterVersion:
        """Publish an adapter and point its name to it."""
        wide = padded(factors)
        version = self.table.new(name, rank_of(wide), scale)
        assert self.table.try_seat(version), "the ladder's places are taken"
        job = JobShape(rank_of(wide), tuple(factors["a"]))
        self.take_stack(self.programs.publish(job)(self.stack, wide, np.int32(version.first_column)))
        self.table.announce(version)
        return version

    def take_stack(self, stack: AdapterStack) -> None:
        self.stack, self.weights = stack, with_matrices(self.weights, stack.a)

    def seat(self, number: int, row: int, tokens, adapter=BASE, room: int = 0, sampling=GREEDY) -> None:
        """A request with this prompt takes a row, and pages for it and ``room`` more tokens."""
        tokens = [int(token) for token in tokens]
        request = Request(number, tuple(tokens), sampling, max_new_tokens=room + 1)
        self.serving[number] = Serving(request, adapter, seed=sampling.seed or 0, tokens=tokens)
        self.seats[number] = row, self.take_pages(tiles_for(len(tokens) + room))

    def step(self, layout: SlotLayout, decode=(), prompts=(), windows=()) -> StepOutput:
        """Run one forward step; returns its output on the host.

        Args:
            decode: request numbers; each computes its newest token.
            prompts: (request number, start, length).
            windows: (microbatch number, sequence, start, length).
        """
        slot, prompt_segments, window_segments = 0, [], []
        for number, start, length in prompts:
            prompt_segments.append(self._prompt(number, start, length, slot))
            slot += tiles_for(length) * PAGE_TOKENS
        for number, sequence, start, length in windows:
            block = (self.training[number].packed.starts[sequence] + start) // PAGE_TOKENS
            window_segments.append(WindowSegment("job", number, sequence, slot, start, length, block))
            slot += tiles_for(length) * PAGE_TOKENS
        assert slot <= layout.chunk, f"{slot} slots do not fit {layout}"
        slots = sorted((self._decode_slot(number) for number in decode), key=lambda each: each.row)
        segments = tuple(slots), tuple(prompt_segments), tuple(window_segments)
        iteration = Iteration(0, layout, *segments, units=(), predicted=0.0, limit=None, context_tokens=0)
        packed = forward_batch(self.dims, iteration, self.serving, self.training, self.table)
        output = self.run(layout, packed, sampling_batch(iteration, self.serving))
        for row, number, _ in iteration.sampled_rows:
            self.serving[number].tokens.append(int(output.tokens[row]))
        return output

    def run(self, layout: SlotLayout, packed: np.ndarray, sampling: SamplingBatch) -> StepOutput:
        self.pool, self.rows, output = self.programs.forward(layout)(
            self.weights, self.stack, self.pool, self.rows, packed
        )
        sample = self.programs.sample(layout.rows, sampling.level, layout.logprobs)
        self.rows, sampled = sample(self.rows, output.logits, sampling.packed)
        host = lambda arrays: jax.tree.map(np.asarray, arrays)
        return StepOutput(host(sampled.tokens), host(sampled.logprobs), host(output.prompt_logprobs))

    def _prompt(self, number: int, start: int, length: int, slot: int) -> PromptSegment:
        row, pages = self.seats[number]
        samples = start + length == len(self.serving[number].tokens)
        return PromptSegment(number, row, slot, start, length, pages[: tiles_for(start + length)], samples)

    def _decode_slot(self, number: int) -> DecodeSlot:
        row, pages = self.seats[number]
        position = len(self.serving[number].tokens) - 1
        return DecodeSlot(row, number, position, pages[: tiles_for(position + 1)])

    def begin(self, factors: dict, scale: float, *, dropout=False, spec=None, ratios: dict | None = None) -> None:
        """Start a job from an adapter, published under the name "job".

        Args:
            spec: of the optimizer; AdamW without decay and clipping if None.
            ratios: module -> [layers, 1, 1] float32, what is folded into B; ones if None.
        """
        ones = np.ones((self.dims.model.num_layers, 1, 1), np.float32)
        self.ratios = ratios or {name: ones for name in factors["a"]}
        self.spec, wide = spec or OptimizerSpec(max_grad_norm=None), padded(factors)
        self.job = JobShape(rank_of(wide), tuple(factors["a"]), dropout)
        self.version = self.load("job", factors, scale)
        self.master = new_master(self.spec, jax.tree.map(jnp.asarray, wide))
        self.gradients = zeros(gradient_shapes(self.dims, self.job.rank, self.job.modules))

    def hold(self, number: int, packed: PackedMicrobatch, dropout: float = 0.0) -> None:
        """A microbatch of the job takes pages."""
        count, share = packed.slots // PAGE_TOKENS, self.dims.finals_per_page
        blocks = tuple(self.take_pages(self.dims.pages_per_block) for _ in range(count))
        pages = MicrobatchPages(blocks, self.take_pages(-(-count // share)), share)
        self.training[number] = Training(packed, pages, self.version, dropout, seed=number)

    def whole_windows(self, number: int) -> list[tuple[int, int, int, int]]:
        """Every sequence of a microbatch in one window each."""
        return [(number, sequence, 0, length) for sequence, length in enumerate(self.training[number].packed.lengths)]

    def loss(self, number: int) -> float:
        total, program = 0.0, self.programs.loss(self.job)
        for window in self.grid(number):
            batch = loss_batch(self.dims, self.training[number], window)
            self.gradients, loss = program(self.weights, self.pool, self.gradients, batch)
            total += float(loss)
        return total

    def backward(self, number: int, between=lambda: None) -> None:
        """Every unit of the microbatch; ``between`` is called before each."""
        frozen, program = Master(self.master.a, self.master.b, None), self.programs.backward(self.job)
        for layer in reversed(range(self.dims.model.num_layers)):
            for window in reversed(self.grid(number)):
                between()
                batch = backward_batch(self.dims, self.training[number], layer, window)
                self.gradients, _ = program(self.layers[layer], frozen, self.pool, self.gradients, batch)

    def train(self, number: int) -> float:
        """Forward, loss and backward of a held microbatch; the gradients of several add up. Returns the loss."""
        self.step(DROPOUT if self.job.dropout else TAPED, windows=self.whole_windows(number))
        loss = self.loss(number)
        self.backward(number)
        return loss

    def update(self, learning_rate: float) -> float:
        """Step the optimizer, publish over the job's version; returns the norm of the gradients."""
        numbers = np.float32(learning_rate), np.int32(self.version.first_column), self.ratios
        self.master, self.gradients, stack, norm = self.programs.update(self.job, self.spec)(
            self.master, self.gradients, self.stack, *numbers
        )
        self.take_stack(stack)
        return float(norm)

    def grid(self, number: int) -> range:
        return range(-(-self.training[number].packed.slots // self.dims.window))

    def factor_gradients(self) -> dict[str, dict[str, np.ndarray]]:
        """The sums so far, whole: {"a": module -> [layers, in, r], "b": module -> [layers, r, out]}."""
        whole = lambda name, factor, sums: sums.sum(axis=0) if summed_over_shards(name, factor) else sums
        by_factor = {"a": self.gradients.a, "b": self.gradients.b}
        return {
            factor: {name: whole(name, factor, np.asarray(sums)) for name, sums in modules.items()}
            for factor, modules in by_factor.items()
        }


def zeros(shapes):
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def rank_of(factors: dict) -> int:
    return next(iter(factors["a"].values())).shape[2]


def padded(factors: dict) -> dict:
    """An adapter as the device holds it: its rank filled up with zeros to whole units."""
    more = padded_rank(rank_of(factors)) - rank_of(factors)
    a = {name: np.pad(value, ((0, 0), (0, 0), (0, more))) for name, value in factors["a"].items()}
    return {"a": a, "b": {name: np.pad(value, ((0, 0), (0, more), (0, 0))) for name, value in factors["b"].items()}}


def factors_in(stack: AdapterStack, module: str, config: ModelConfig, tp: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A module's part of the stack, (a [layers, in, R], b [layers, R, out]): modules of a product lie side by side, and
    those that shards divide once in every shard."""
    (product, modules), *_ = [each for each in PRODUCTS.items() if module in each[1]]
    widths, shards = module_widths(config), 1 if module in ROW_PARALLEL else tp
    number = modules.index(module)
    a, b = np.asarray(stack.a[product]), np.asarray(stack.b[product])
    first, rank = sum(widths[name][1] for name in modules[:number]) // shards, b.shape[1]
    a = a.reshape(a.shape[0], shards, -1, a.shape[2])[:, 0]  # shards that have rows of their own hold equal ones
    behind = a.shape[1] - (len(modules) - number) * rank
    by_shard = b.reshape(*b.shape[:2], shards, -1)[..., first : first + widths[module][1] // shards]
    return a[:, behind : behind + rank].swapaxes(1, 2), by_shard.reshape(*b.shape[:2], -1)


def example(tokens, trained=None) -> Example:
    """A finetuning sequence; ``trained`` marks the targets (default: every token but the first)."""
    mask = np.arange(len(tokens)) > 0 if trained is None else np.asarray(trained, bool)
    return Example(np.asarray(tokens, np.int32), mask, line=1)


def assert_likeliest(ids, values, expected, tolerance: float) -> None:
    """The likeliest ids [N, 20] that a step reports and their log-probabilities against all of them, [N, vocab]."""
    np.testing.assert_allclose(values, np.take_along_axis(expected, ids, axis=-1), atol=tolerance)
    np.testing.assert_allclose(values, -np.sort(-expected, axis=-1)[:, : values.shape[1]], atol=tolerance)


def assert_trees_close(got: dict, expected: dict, tolerance: float) -> None:
    """Every factor of an adapter within ``tolerance`` times the largest magnitude of the expected factor; columns of
    the padding, which the expected one does not have, exactly zero."""
    for name, value in expected["a"].items():
        rank = value.shape[2]
        assert_close(got["a"][name][:, :, :rank], value, tolerance, f"a of {name}")
        assert not np.any(got["a"][name][:, :, rank:]), f"padding of a of {name}"
    for name, value in expected["b"].items():
        rank = value.shape[1]
        assert_close(got["b"][name][:, :rank], value, tolerance, f"b of {name}")
        assert not np.any(got["b"][name][:, rank:]), f"padding of b of {name}"


def assert_close(got, expected, tolerance: float, what: str) -> None:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    error, largest = np.abs(got - expected).max(), np.abs(expected).max()
    assert error <= tolerance * largest, f"{what}: off by {error:.3g}, largest value {largest:.3g}"
