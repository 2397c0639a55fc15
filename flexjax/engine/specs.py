"""How every array of the engine is cut over shards."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from flexjax.models.lora import MODULES, PRODUCTS, ROW_PARALLEL
from flexjax.models.sharding import TP_AXIS
from flexjax.state import AdapterStack, Gradients, Master, summed_over_shards

WEIGHT_SPECS = {
    "qkv": P(None, TP_AXIS, None),
    "qkv_bias": P(None, TP_AXIS),
    "o": P(None, None, TP_AXIS),
    "gate_up": P(None, TP_AXIS, None),
    "down": P(None, None, TP_AXIS),
}
POOL_SPEC = P(None, None, None, TP_AXIS)


def weight_specs(weights: nnx.State) -> nnx.State:
    """How each weight is cut over shards, by its name; what the table does not list is replicated."""
    return jax.tree_util.tree_map_with_path(lambda path, _: WEIGHT_SPECS.get(weight_name(path), P()), weights)


def weight_name(path) -> str:
    """Last attribute name on a state path, "qkv" for layers.qkv."""
    return [str(getattr(k, "key", "")) for k in path if isinstance(getattr(k, "key", None), str)][-1]


def factor_specs(modules=MODULES) -> dict[str, dict[str, P]]:
    """Each LoRA factor follows the backbone's sharding at its outer end and is whole at its rank end."""
    a = {name: P(None, TP_AXIS, None) if name in ROW_PARALLEL else P() for name in modules}
    b = {name: P() if name in ROW_PARALLEL else P(None, None, TP_AXIS) for name in modules}
    return {"a": a, "b": b}


def stack_specs() -> AdapterStack:
    """As the frozen matrices, and as B of a product's modules, which agree."""
    specs = factor_specs()["b"]
    b = {product: specs[modules[0]] for product, modules in PRODUCTS.items()}
    return AdapterStack(a={product: WEIGHT_SPECS[product] for product in PRODUCTS}, b=b)


def gradient_specs(modules) -> Gradients:
    partial = {
        factor: {name: P(TP_AXIS) if summed_over_shards(name, factor) else spec for name, spec in specs.items()}
        for factor, specs in factor_specs(modules).items()
    }
    return Gradients(**partial, hidden=P(), d_k=P(None, TP_AXIS, None), d_v=P(None, TP_AXIS, None))


def master_specs(master: Master, modules) -> Master:
    """Moments are sharded as the factor they belong to; counters and factored statistics are replicated."""
    specs = factor_specs(modules)
    shapes = {(f, n): getattr(master, f)[n].shape for f in ("a", "b") for n in modules}

    def moment_spec(path, leaf):
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))[-2:]
        return specs[keys[0]][keys[1]] if shapes.get(keys) == leaf.shape else P()

    return Master(**specs, optimizer=jax.tree_util.tree_map_with_path(moment_spec, master.optimizer))
