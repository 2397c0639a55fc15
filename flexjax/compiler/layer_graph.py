"""LayerGraph: one decoder layer and its pull back as jaxprs with named ends. Shapes only; nothing is computed.

The same stage functions that serve requests are traced, so what the analysis says follows the model's code. Attention
and its gradient, which are kernels between the stages, are opaque operations here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import partial_eval

from flexjax.compiler.flops import count_flops
from flexjax.models.build import abstract_decoder
from flexjax.models.config import ModelConfig
from flexjax.models.decoder import DecoderLayer
from flexjax.models.lora import module_widths
from flexjax.models.trained_adapter import TrainedAdapter

NAMES = ("x", "q", "attention", "mid", "gate", "up")
"""Named inputs of a layer's stages, in the order in which the layer makes them; "attention" with its log-sum-exp."""

TOKENS = 61
"""Slots of the traced layer: a prime, so that no width of a model is mistaken for the token axis."""

attention_op = Primitive("attention")
attention_op.multiple_results = True
attention_op.def_abstract_eval(lambda q, k, v, context: [q, q.update(shape=q.shape[:2], dtype=jnp.dtype("float32"))])

attention_gradient_op = Primitive("attention_gradient")
attention_gradient_op.multiple_results = True
attention_gradient_op.def_abstract_eval(lambda q, k, v, out, lse, d_out: [q, k, v])


def attention_flops(equation: JaxprEqn) -> int:
    """q k^T and p v: 4 FLOPs per query, key and value of a head."""
    tokens, heads, width = equation.invars[0].aval.shape
    return 4 * tokens * heads * width * equation.params["context"]


PRICES = {attention_op: attention_flops}


@dataclass(frozen=True)
class Graph:
    """A jaxpr whose inputs and outputs have names; several of them may share one.

    Attributes:
        inputs: name of every input of the jaxpr; outputs: of every output.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    jaxpr: Jaxpr

    def reduced(self, outputs: frozenset[str]) -> "Graph":
        """What remains when only these outputs are wanted: dead code, and the inputs only it read, are gone."""
        wanted = [name in outputs for name in self.outputs]
        jaxpr, used = partial_eval.dce_jaxpr(self.jaxpr, wanted)
        inputs = tuple(name for name, kept in zip(self.inputs, used, strict=True) if kept)
        return Graph(inputs, tuple(name for name in self.outputs if name in outputs), jaxpr)

    @property
    def flops_per_token(self) -> int:
        return count_flops(self.jaxpr, PRICES) // TOKENS


def trace(function: Callable[[dict], dict], shapes: Mapping[str, Any]) -> Graph:
    """The graph of a function from a dictionary of named trees to another."""
    inputs = dict(shapes)
    closed, outputs = jax.make_jaxpr(function, return_shape=True)(inputs)
    names = lambda tree: tuple(path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return Graph(names(inputs), names(outputs), closed.jaxpr)


@dataclass(frozen=True)
class LayerGraph:
    """The graphs of one layer with LoRA adapters on some modules.

    Attributes:
        shapes: every named input: the values, k and v, "weights", "params", "rotation", the cotangent "d_out".
        context: keys that a query attends to, on average.
    """

    definition: nnx.GraphDef
    shapes: dict[str, Any]
    context: int

    def stage(self, outputs: tuple[str, ...]) -> Graph:
        """How q, attention, mid, or gate and up, or one of these two, follow from earlier names."""

        def attention(v):
            return {"attention": tuple(attention_op.bind(v["q"], v["k"], v["v"], context=self.context))}

        def q(v):
            return {"q": self.layer(v).q_stage(v["x"], v["rotation"], adapter(v["params"]))}

        def output(v):
            return {"mid": self.layer(v).output_stage(v["x"], v["attention"][0], adapter(v["params"]))}

        def mlp_input(v):
            only = outputs[0] if len(outputs) == 1 else None
            gate, up = self.layer(v).mlp_input_stage(v["mid"], adapter(v["params"]), only)
            return {"gate": gate, "up": up}

        single = {("q",): q, ("attention",): attention, ("mid",): output}
        return trace(single.get(outputs, mlp_input), self.shapes).reduced(frozenset(outputs))

    def pull_back(self) -> Graph:
        """From the cotangent of the layer's output to "d_x" and "d_params", stage by stage."""
        return trace(partial(pulled_back, self.layer), self.shapes)

    def autodiff_bytes_per_token(self) -> int:
        """Bytes that `jax.vjp` of the whole layer keeps: distinct arrays with a token axis, attention as one kernel."""
        closed = jax.make_jaxpr(partial(autodiff_residuals, self.layer, self.context))(self.shapes)
        kept = {each for each in closed.jaxpr.outvars if not isinstance(each, Literal)}
        avals = [each.aval for each in kept if each.aval.shape[:1] == (TOKENS,)]
        return sum(aval.size * aval.dtype.itemsize for aval in avals) // TOKENS

    def layer(self, values: dict) -> DecoderLayer:
        return nnx.merge(self.definition, values["weights"])


def layer_graph(config: ModelConfig, modules: tuple[str, ...], dtype, rank: int, context: int) -> LayerGraph:
    """The graphs of a layer of this model, on one device (sharding changes none of the dependencies).

    Args:
        modules: names of the adapted modules.
        rank: columns of each adapter.
        context: keys that a query attends to, on average.
    """
    definition, shapes = abstract_decoder(config, dtype)
    layer, stacked = nnx.merge(definition, shapes).layer_stack()
    weights = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), stacked)
    value = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((TOKENS, *shape), dtype)
    d, ff, width = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = value(config.num_heads, width), value(config.num_kv_heads, width)
    named = {"x": value(d), "q": q, "k": kv, "v": kv, "mid": value(d), "gate": value(ff), "up": value(ff)}
    named["attention"] = (q, value(config.num_heads, dtype=jnp.float32))
    rest = {"weights": weights, "params": factor_shapes(config, modules, rank)}
    rest |= {"rotation": (value(width // 2, dtype=jnp.float32),) * 2, "d_out": value(d)}
    return LayerGraph(layer, named | rest, context)


def factor_shapes(config: ModelConfig, modules: tuple[str, ...], rank: int) -> dict[str, dict]:
    widths = module_widths(config)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return {"a": {m: shape(widths[m][0], rank) for m in modules}, "b": {m: shape(rank, widths[m][1]) for m in modules}}


def adapter(params: dict) -> TrainedAdapter:
    return TrainedAdapter(params["a"], params["b"], jnp.float32(1.0), "reference")


def pulled_back(layer_of: Callable, v: dict) -> dict:
    """The order of the backward step: down, gate and up, o, attention, then q, k and v."""
    layer, params, (attention, lse) = layer_of(v), v["params"], v["attention"]
    stage = lambda mid, gate, up, p: layer.mlp_output_stage(mid, gate, up, adapter(p))
    d_mid, d_gate, d_up, d_down = jax.vjp(stage, v["mid"], v["gate"], v["up"], params)[1](v["d_out"])
    stage = lambda mid, p: layer.mlp_input_stage(mid, adapter(p))
    d_mid_mlp, d_gate_up = jax.vjp(stage, v["mid"], params)[1]((d_gate, d_up))
    stage = lambda x, attention, p: layer.output_stage(x, attention, adapter(p))
    d_x, d_attention, d_o = jax.vjp(stage, v["x"], attention, params)[1](d_mid + d_mid_mlp)
    d_qkv = attention_gradient_op.bind(v["q"], v["k"], v["v"], attention, lse, d_attention)
    stage = lambda x, p: layer.qkv_stage(x, v["rotation"], adapter(p))
    d_x_attention, d_qkv = jax.vjp(stage, v["x"], params)[1](tuple(d_qkv))
    d_params = jax.tree.map(lambda *parts: sum(parts), d_down, d_gate_up, d_o, d_qkv)
    return {"d_x": d_x + d_x_attention, "d_params": d_params}


def autodiff_residuals(layer_of: Callable, context: int, v: dict) -> list[jax.Array]:
    """What one `jax.vjp` over layer input and adapters, weights frozen, keeps for later."""
    layer = layer_of(v)

    @jax.custom_vjp
    def attend(q, k, v):
        return attention_op.bind(q, k, v, context=context)[0]

    def attend_forward(q, k, v):
        out, lse = attention_op.bind(q, k, v, context=context)
        return out, (q, k, v, out, lse)

    attend.defvjp(attend_forward, lambda kept, d_out: tuple(attention_gradient_op.bind(*kept, d_out)))

    def whole(x, params):
        plus = adapter(params)
        mid = layer.output_stage(x, attend(*layer.qkv_stage(x, v["rotation"], plus)), plus)
        return layer.mlp_output_stage(mid, *layer.mlp_input_stage(mid, plus), plus)

    return jax.tree.leaves(jax.vjp(whole, v["x"], v["params"])[1])
