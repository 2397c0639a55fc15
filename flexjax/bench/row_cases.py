"""Cases that go over rows: page writes, head and loss, thin products."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.bench.device_values import device_normal
from flexjax.bench.kernel_case import MOST_CALLS, Alternative, KernelCase, calls_for
from flexjax.bench.timing import compiled
from pallas_kernels import linear_cross_entropy, page_write
from pallas_kernels.linear_cross_entropy import api as loss_api
from pallas_kernels.linear_cross_entropy import cases as loss_cases
from pallas_kernels.model_shapes import ModelShape
from pallas_kernels.page_write import api as write_api
from pallas_kernels.page_write import cases as write_cases
from pallas_kernels.page_write.api import write_pages, write_parts

PAGE = write_cases.PAGE

LOSS_CALLS = 2
"""The head alone is larger than any cache."""


def row_write_case(name: str, model: ModelShape, rows: int, pool_bytes: float) -> KernelCase:
    """Rows to distinct random slots, as decode rows go."""
    case = case_of(name, model, rows, pool_bytes)
    shape = f"{rows} rows of {model.row_width} values, random slots of {case.pages} pages, {MOST_CALLS} layers"
    return write_case(case, "page_write", shape, prepare_write, row_write_call, write_api.IMPLEMENTATIONS)


def case_of(name: str, model: ModelShape, rows: int, pool_bytes: float) -> write_cases.Case:
    """Rows as wide as a model's, into a pool of at least so many bytes; its layers are written one by one."""
    pages = -(-round(pool_bytes) // (MOST_CALLS * PAGE * model.row_width * 2))
    return write_cases.Case(name, model.row_width, rows, 0, pages, layers=1)


def write_case(case: write_cases.Case, operation: str, shape: str, prepare, call, implementations) -> KernelCase:
    """A write of the case's rows in every layer; each row is read and written."""
    return KernelCase(
        name=case.name,
        operation=operation,
        shape=shape,
        bytes=2 * case.rows * case.width * 2,
        flops=0,
        calls=MOST_CALLS,
        prepare=functools.partial(prepare, case, MOST_CALLS),
        call=call,
        implementations=tuple(implementations),
    )


def prepare_write(case: write_cases.Case, layers: int, implementation: str):
    slots = jnp.asarray(replace(case, width=1).make(seed=0)["slots"])
    pool = device_normal(1, (layers, case.pages, PAGE, case.width), case.dtype)
    return pool, {"rows": device_normal(2, (case.rows, case.width), case.dtype), "slots": slots}


def row_write_call(implementation: str):
    write = compiled(page_write, implementation=implementation)
    return lambda pool, given, index: (write(pool, np.int32(index), given["rows"], given["slots"]), ())


def page_case(name: str, model: ModelShape, rows: int, pool_bytes: float) -> KernelCase:
    """Whole pages of K and V to distinct random pages, as windows and long prompts go."""
    case = case_of(name, model, rows, pool_bytes)
    pages = f"{rows // PAGE} pages of {PAGE} rows of {model.row_width} values"
    shape = f"{pages}, {case.pages} pages, {MOST_CALLS} layers"
    return write_case(case, "write_pages", shape, prepare_pages, page_write_call, write_api.IMPLEMENTATIONS)


def prepare_pages(case: write_cases.Case, layers: int, implementation: str):
    pages = np.random.default_rng(0).permutation(case.pages)[: case.rows // PAGE]
    pool = device_normal(1, (layers, case.pages, PAGE, case.width), case.dtype)
    return pool, {"values": device_normal(2, (case.rows, case.width), case.dtype), "pages": jnp.asarray(pages)[:, None]}


def page_write_call(implementation: str):
    write = compiled(write_pages, implementation=implementation)
    return lambda pool, given, index: (write(pool, np.int32(index), given["values"], given["pages"]), ())


def parts_case(case: write_cases.PartsCase, cold_bytes: float) -> KernelCase:
    """What a layer keeps at a time, in one launch; each value is read and written."""
    case = replace(case, drops=False)
    moved = 2 * 2 * (case.rows * case.width + case.tiles * PAGE * (case.width + sum(case.columns)))
    calls = calls_for(moved, cold_bytes)
    apart = Alternative(parts_call("mosaic_gpu", at_once=False), on_gpu_only=True, engine_options=True)
    return KernelCase(
        name=f"page_write {case.name}",
        operation="write_parts",
        shape=f"{case.rows} rows, {case.tiles} tiles of {(case.width, *case.columns)} values a row, {calls} layers",
        bytes=moved,
        flops=0,
        calls=calls,
        prepare=functools.partial(prepare_parts, case, calls),
        call=parts_call,
        implementations=tuple(write_api.IMPLEMENTATIONS),
        alternatives={"a launch for each part": apart},
    )


def prepare_parts(case: write_cases.PartsCase, layers: int, implementation: str):
    parts = jax.tree.map(jnp.asarray, case.parts(np.random.default_rng(0)))
    return device_normal(1, (layers, case.pages, PAGE, case.width), case.dtype), parts


def parts_call(implementation: str, at_once: bool = True):
    write = compiled(write_parts, implementation=implementation)

    def call(pool, parts, index):
        for together in [parts] if at_once else [[part] for part in parts]:
            pool = write(pool, np.int32(index), together)
        return pool, ()

    return call


def loss_case(name: str, model: ModelShape, tokens: int, chunk: int) -> KernelCase:
    """Loss and hidden-state gradient; the head moves once and is in two products."""
    case = loss_cases.head_of(model, tokens, chunk)
    return KernelCase(
        name=name,
        operation="linear_cross_entropy",
        shape=f"{tokens} tokens, {model.hidden} to {model.vocabulary}, chunks of {chunk}",
        bytes=2 * model.hidden * model.vocabulary + 6 * tokens * model.hidden,
        flops=4 * tokens * model.hidden * model.vocabulary,
        calls=LOSS_CALLS,
        prepare=functools.partial(prepare_loss, case),
        call=functools.partial(loss_call, chunk=chunk, transposed=model.tied),
        implementations=tuple(loss_api.IMPLEMENTATIONS),
        alternatives={"xla, whole logits": Alternative(functools.partial(whole_logits, transposed=model.tied))},
    )


def prepare_loss(case: loss_cases.Case, implementation: str):
    targets = replace(case, hidden=1).make(seed=0)["targets"]
    shape = (case.vocabulary, case.hidden) if case.transposed else (case.hidden, case.vocabulary)
    hidden = [device_normal(seed, (case.tokens, case.hidden), case.dtype) for seed in range(LOSS_CALLS)]
    head = device_normal(LOSS_CALLS, shape, case.dtype, 3 * case.hidden**-0.5)
    return (), {"hidden": hidden, "head": head, "targets": jnp.asarray(targets)}


def loss_call(implementation: str, chunk: int, transposed: bool):
    run = compiled(linear_cross_entropy, chunk=chunk, transposed=transposed, implementation=implementation)
    return lambda state, given, index: (state, run(given["hidden"][index], given["head"], given["targets"]))


def whole_logits(state, given, index, transposed: bool):
    head, targets = given["head"].T if transposed else given["head"], given["targets"]

    def total_loss(hidden):
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        loss = jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=1) - target, 0.0)
        return loss.sum(), loss

    d_hidden, loss = jax.grad(total_loss, has_aux=True)(given["hidden"][index])
    return state, (loss, d_hidden.astype(jnp.float32))


def product_case(rows: int, inputs: int, outputs: int, cold_bytes: float) -> KernelCase:
    """A thin product x W^T, weights as the engine keeps them: how much bandwidth the compiler's choice leaves."""
    moved = 2 * (inputs * outputs + rows * (inputs + outputs))
    calls = calls_for(moved, cold_bytes)
    return KernelCase(
        name=f"product of {rows} rows, {inputs} to {outputs}",
        operation="product",
        shape=f"{rows} rows, {inputs} to {outputs}, {calls} layers",
        bytes=moved,
        flops=2 * rows * inputs * outputs,
        calls=calls,
        prepare=functools.partial(prepare_product, rows, inputs, outputs, calls),
        call=lambda implementation: multiply,
        implementations=("reference",),
        beside_reference=False,
    )


def prepare_product(rows: int, inputs: int, outputs: int, layers: int, implementation: str):
    """Every call has an x of its own: products that share an operand are merged by the compiler, which copies the
    weights side by side for that."""
    x = [device_normal(seed, (rows, inputs)) for seed in range(layers)]
    return (), (x, device_normal(layers, (layers, outputs, inputs)))


def multiply(state, given, index):
    x, weights = given
    return state, x[index] @ weights[index].T
