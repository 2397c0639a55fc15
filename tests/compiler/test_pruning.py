"""The pruning table against tables worked out by hand, real gradients, closed forms and what jax.vjp really keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexjax.compiler.layer_graph import NAMES
from flexjax.compiler.pruning import pruning_table
from flexjax.fields import ConfigError
from flexjax.models.decoder import DecoderLayer
from flexjax.models.layers import rotary_frequencies, rotation_of
from flexjax.models.lora import MODULES, module_widths
from flexjax.models.trained_adapter import TrainedAdapter
from flexjax.state import TAPE_NAMES, Dimensions

ALL = set(NAMES)
LOWEST = {
    ("down_proj",): {"gate", "up"},  # its input is silu(gate) * up
    ("up_proj",): {"mid", "gate"},  # d_up = d_h * silu(gate); its own input is norm(mid)
    ("gate_proj",): {"mid", "gate", "up"},
    ("o_proj",): {"attention", "mid", "gate", "up"},  # its input, and the way down to it through the MLP
    ("q_proj",): ALL,
    ("k_proj",): ALL,
    ("v_proj",): ALL,
    ("up_proj", "down_proj"): {"mid", "gate", "up"},
    ("o_proj", "down_proj"): {"attention", "mid", "gate", "up"},
    MODULES: ALL,
}
"""Worked out by hand from the derivatives of a pre-norm layer with frozen weights."""


def test_names_are_those_of_the_tape():
    assert NAMES == TAPE_NAMES


@pytest.mark.parametrize("modules", LOWEST, ids="+".join)
def test_lowest_layer_needs_what_was_worked_out_by_hand(tiny, modules):
    assert set(pruning_table(tiny, modules, "float32", lowest=True).needed) == LOWEST[modules]


@pytest.mark.parametrize("modules", [("down_proj",), ("q_proj",), MODULES], ids="+".join)
def test_a_layer_with_an_adapted_one_below_needs_all_names(tiny, modules):
    """The input's cotangent passes through both norms, the gated product and attention."""
    assert set(pruning_table(tiny, modules, "float32", lowest=False).needed) == ALL


def test_biases_and_larger_models_change_nothing(qwen_14b):
    assert pruning_table(qwen_14b, ("down_proj",), "bfloat16", lowest=True).needed == ("gate", "up")
    assert set(pruning_table(qwen_14b, MODULES, "bfloat16", lowest=False).needed) == ALL


# --- against real gradients

TOKENS = 10


def dense_attention(q, k, v):
    """Causal attention; q [T, H, D], k and v [T, Hkv, D]."""
    k, v = (jnp.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf))
    return jnp.einsum("hqk,khd->qhd", weights, v)


def attention_gradient(v, d_attention):
    """From the values that the kernel reads: delta = sum(d_out * out) stands in for the softmax's own derivative."""
    q, k, value, out = v["q"], v["k"], v["v"], v["attention"]
    group = q.shape[1] // k.shape[1]
    k, value = (jnp.repeat(each, group, axis=1) for each in (k, value))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jnp.where(causal, jnp.exp(scores - v["lse"]), 0.0)
    delta = jnp.einsum("qhd,qhd->hq", d_attention, out)[:, :, None]
    d_scores = weights * (jnp.einsum("qhd,khd->hqk", d_attention, value) - delta) * q.shape[-1] ** -0.5
    d_q = jnp.einsum("hqk,khd->qhd", d_scores, k)
    d_k, d_v = jnp.einsum("hqk,qhd->khd", d_scores, q), jnp.einsum("hqk,qhd->khd", weights, d_attention)
    return d_q, *(d.reshape(len(d), -1, group, d.shape[-1]).sum(2) for d in (d_k, d_v))


class RealLayer:
    """A layer with random weights, its named values, and its gradients by `jax.vjp` of each stage."""

    def __init__(self, config, modules, seed=0):
        rng, widths = np.random.default_rng(seed), module_widths(config)
        random = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)
        definition, shapes = nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, jnp.float32, 1, nnx.Rngs(0))))
        self.layer = nnx.merge(definition, jax.tree.map(lambda s: random(*s.shape), shapes))
        self.params = {
            "a": {name: random(widths[name][0], 4) for name in modules},
            "b": {name: random(4, widths[name][1]) for name in modules},
        }
        self.rotation = rotation_of(jnp.arange(TOKENS), rotary_frequencies(config))
        self.x, self.d_out = random(TOKENS, config.hidden_size), random(TOKENS, config.hidden_size)

    def adapter(self, params):
        return TrainedAdapter(params["a"], params["b"], jnp.float32(0.5), "reference")

    def output(self, x, params):
        adapter = self.adapter(params)
        mid = self.layer.output_stage(x, dense_attention(*self.layer.qkv_stage(x, self.rotation, adapter)), adapter)
        return self.layer.mlp_output_stage(mid, *self.layer.mlp_input_stage(mid, adapter), adapter)

    def values(self):
        adapter = self.adapter(self.params)
        q, k, v = self.layer.qkv_stage(self.x, self.rotation, adapter)
        attention = dense_attention(q, k, v)
        scores = jnp.einsum("qhd,khd->hqk", q, jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        mid = self.layer.output_stage(self.x, attention, adapter)
        gate, up = self.layer.mlp_input_stage(mid, adapter)
        return dict(x=self.x, q=q, k=k, v=v, attention=attention, lse=lse, mid=mid, gate=gate, up=up)

    def gradients(self, v):
        """(d_params, d_x) from named values alone."""
        layer, params = self.layer, self.params
        pull = lambda stage, *primals: jax.vjp(stage, *primals, params)[1]
        down = lambda mid, gate, up, p: layer.mlp_output_stage(mid, gate, up, self.adapter(p))
        d_mid, d_gate, d_up, d_1 = pull(down, v["mid"], v["gate"], v["up"])(self.d_out)
        d_mid_mlp, d_2 = pull(lambda mid, p: layer.mlp_input_stage(mid, self.adapter(p)), v["mid"])((d_gate, d_up))
        project = lambda x, out, p: layer.output_stage(x, out, self.adapter(p))
        d_x, d_attention, d_3 = pull(project, v["x"], v["attention"])(d_mid + d_mid_mlp)
        qkv = lambda x, p: layer.qkv_stage(x, self.rotation, self.adapter(p))
        d_x_qkv, d_4 = pull(qkv, v["x"])(attention_gradient(v, d_attention))
        return jax.tree.map(lambda *parts: sum(parts), d_1, d_2, d_3, d_4), d_x + d_x_qkv


def changed(values, name, to):
    """The values with one name (attention with its log-sum-exp) replaced."""
    names = ("attention", "lse") if name == "attention" else (name,)
    return values | {each: to(values[each]) for each in names}


def test_gradients_from_named_values_equal_autodiff(tiny):
    layer = RealLayer(tiny, MODULES)
    d_params, d_x = jax.jit(lambda: layer.gradients(layer.values()))()
    wanted_x, wanted_params = jax.jit(lambda: jax.vjp(layer.output, layer.x, layer.params)[1](layer.d_out))()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    jax.tree.map(close, (d_params, d_x), (wanted_params, wanted_x))


@pytest.mark.parametrize("modules", list(LOWEST)[:5], ids="+".join)
def test_only_needed_names_reach_the_adapters_gradients(tiny, modules):
    """Not-a-number in a name that is not needed leaves every gradient as it was; noise in a needed one does not."""
    layer = RealLayer(tiny, modules)
    values, gradients = jax.jit(layer.values)(), jax.jit(layer.gradients)
    expected, _ = gradients(values)
    same = lambda other: all(jax.tree.leaves(jax.tree.map(np.array_equal, expected, gradients(other)[0])))
    needed = pruning_table(tiny, modules, "float32", lowest=True).needed
    for name in NAMES:
        if name in needed:
            assert not same(changed(values, name, lambda value: 1.1 * value + 0.1)), name
        else:
            assert same(changed(values, name, lambda value: jnp.full_like(value, jnp.nan))), name


def test_every_name_reaches_the_inputs_cotangent(tiny):
    layer = RealLayer(tiny, ("down_proj",))
    values, gradients = jax.jit(layer.values)(), jax.jit(layer.gradients)
    _, expected = gradients(values)
    for name in NAMES:
        assert not np.array_equal(expected, gradients(changed(values, name, lambda v: 1.1 * v + 0.1))[1]), name


# --- costs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "tp"),
    [
        *(("tiny", 1), ("tiny", 2), ("narrow", 1), ("smollm", 1), ("smollm", 3)),
        *(("llama_8b", 1), ("llama_8b", 2), ("llama_8b", 8), ("qwen_14b", 4)),
    ],
)
def test_columns_are_those_of_the_tape(request, model, dtype, tp):
    config = request.getfixturevalue(model)
    table = pruning_table(config, ("down_proj",), dtype, lowest=True, tp=tp)
    dims = Dimensions(config, dtype, 1, 64, 1, 8, 1, 64, 64, TAPE_NAMES, tp)
    columns = {name: dims.tape_layout.span(name) for name in dims.tape_layout.names}
    columns["attention"] += columns.pop("lse", 0)
    assert {cost.name: cost.columns for cost in table.costs} == columns
    widths = dims.tape_layout.widths[: len(TAPE_NAMES)]
    assert [cost.bytes for cost in table.costs] == [w * tp * jnp.dtype(dtype).itemsize for w in widths]
    assert table.column_bytes * 64 * config.num_layers == dims.page_bytes


def test_bytes_of_an_8b_layer(llama_8b):
    """By hand: rows of 2 * 8 * 128 = 2048 values, which attention fills without its log-sum-exp."""
    table = pruning_table(llama_8b, MODULES, "bfloat16", lowest=False)
    expected = dict(x=(8192, 2), q=(8192, 2), attention=(8192, 2), mid=(8192, 2), gate=(28672, 7), up=(28672, 7))
    assert {cost.name: (cost.bytes, cost.columns) for cost in table.costs} == expected
    assert table.columns(("x", "attention", "up")) == 11
    assert table.columns(NAMES) == 22
    assert table.pruned_bytes == 90112


@pytest.mark.parametrize("modules", [(), ("q_proj",), ("v_proj", "o_proj", "gate_proj"), MODULES], ids="+".join)
def test_recompute_flops_have_closed_forms(llama_8b, modules):
    """2 mn per token and m x n product. Beside it an adapter is one operation for all of the product's modules that are
    made, those too that have no adapter: not k and v, nobody wants them again. Attention reads 1000 keys."""
    modules, rank, context = modules or ("down_proj",), 16, 1000
    table = pruning_table(llama_8b, modules, "bfloat16", lowest=False, rank=rank, mean_context=context)

    def lora(width, **made):
        adapted = sum(f"{name}_proj" in modules for name in made)
        return 2 * rank * (adapted * width + sum(made.values())) if adapted else 0

    q = 2 * 4096 * 4096 + lora(4096, q=4096)
    attention = 4 * context * 32 * 128
    mid = 2 * 4096 * 4096 + lora(4096, o=4096)
    product = 2 * 4096 * 2 * 14336
    both, gate, up = (lora(4096, **made) for made in (dict(gate=14336, up=14336), dict(gate=14336), dict(up=14336)))
    assert table.recompute_flops(("x",)) == q + attention + mid + product + both
    assert table.recompute_flops(("x", "gate", "up")) == q + attention + mid
    assert table.recompute_flops(("x", "gate")) == q + attention + mid + product // 2 + up
    assert table.recompute_flops(("x", "attention", "up")) == q + mid + product // 2 + gate
    assert table.recompute_flops(("x", "q", "mid")) == attention + product + both
    assert table.recompute_flops(NAMES) == 0


def test_recompute_stops_at_what_the_lowest_layer_needs(llama_8b):
    """down_proj alone reads gate and up: with mid at hand neither q nor attention is made again."""
    table = pruning_table(llama_8b, ("down_proj",), "bfloat16", lowest=True, mean_context=1000)
    assert table.recompute_flops(("x", "mid")) == 2 * 4096 * 2 * 14336
    assert table.recompute_flops(("x", "gate", "up")) == 0


@pytest.mark.parametrize("modules", [("down_proj",), ("q_proj", "v_proj", "up_proj")], ids="+".join)
def test_autodiff_bytes_are_what_vjp_keeps(tiny, modules):
    """Counted on the arrays that a real `jax.vjp` holds. Its attention keeps q, k, v, out and log-sum-exp."""
    layer = RealLayer(tiny, modules)

    @jax.custom_vjp
    def attend(q, k, v):
        return dense_attention(q, k, v)

    kept_by_attention = lambda q, k, v: (q, k, v, dense_attention(q, k, v), q[..., 0])
    attend.defvjp(lambda *qkv: (attend(*qkv), kept_by_attention(*qkv)), lambda kept, d_out: kept[:3])

    def output(x, params):
        adapter = layer.adapter(params)
        mid = layer.layer.output_stage(x, attend(*layer.layer.qkv_stage(x, layer.rotation, adapter)), adapter)
        return layer.layer.mlp_output_stage(mid, *layer.layer.mlp_input_stage(mid, adapter), adapter)

    kept = {id(leaf): leaf for leaf in jax.tree.leaves(jax.vjp(output, layer.x, layer.params)[1])}
    real = sum(leaf.nbytes for leaf in kept.values() if leaf.shape[:1] == (TOKENS,)) // TOKENS
    table = pruning_table(tiny, modules, "float32", lowest=False, rank=4)
    assert table.autodiff_bytes == real
    assert table.autodiff_bytes > table.pruned_bytes


# --- words


def test_the_table_prints(llama_8b):
    text = str(pruning_table(llama_8b, ("down_proj",), "bfloat16", lowest=True, mean_context=1024))
    lines = [line.split() for line in text.splitlines()]
    assert ["gate", "yes", "28,672", "7", "117.44", "mid"] in lines
    assert ["q", "no", "8,192", "2", "33.55", "x"] in lines
    assert "lowest adapted layer, adapters on down_proj" in text


def test_bad_modules_and_shards_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"target_modules has lm_head; it needs one or more of q_proj"):
        pruning_table(tiny, ("lm_head", "q_proj"), "float32", lowest=True)
    with pytest.raises(ConfigError, match="target_modules is empty"):
        pruning_table(tiny, (), "float32", lowest=True)
    with pytest.raises(ConfigError, match=r"num_attention_heads is 4, which tp = 3 does not divide; lower tp"):
        pruning_table(tiny, MODULES, "float32", lowest=True, tp=3)
