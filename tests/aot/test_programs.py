"""The engine's programs with the GPU's kernels, compiled for an H100 at the shapes of three layers of Llama-3.1-8B:
they read weights and pages where they lie."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flexjax.engine.lowering import LoweringProcesses
from flexjax.engine.programs import JobShape, Programs
from flexjax.layout import SlotLayout
from flexjax.models.build import abstract_decoder
from flexjax.models.config import ModelConfig
from flexjax.models.sharding import TP_AXIS
from flexjax.state import Dimensions, nbytes, pool_shape
from flexjax.steps.kernels import Kernels
from flexjax.steps.update import OptimizerSpec
from tests.aot.hopper import h100
from tests.aot.program_text import (
    CALLED,
    computations,
    entry,
    forgotten_results,
    launched,
    loop_body,
    moved,
    opcodes,
)

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=3,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=False,
    max_position_embeddings=131072,
)
KERNELS = Kernels.for_model("gpu", LLAMA, jnp.bfloat16)
JOB = JobShape(rank=16)
PROGRAMS = {
    "decode": lambda programs: programs.forward(SlotLayout(64, base_only=True)),
    "decode with adapters": lambda programs: programs.forward(SlotLayout(64)),
    "prompts": lambda programs: programs.forward(SlotLayout(64, 2048, base_only=True)),
    "taped": lambda programs: programs.forward(SlotLayout(64, 2048, tape=True)),
    "taped with dropout": lambda programs: programs.forward(SlotLayout(64, 2048, tape=True, dropout=True)),
    "loss": lambda programs: programs.loss(JOB),
    "backward": lambda programs: programs.backward(JOB),
    "lean backward": lambda programs: programs.lean_backward(JOB),
    "publish": lambda programs: programs.publish(JOB),
    "update": lambda programs: programs.update(JOB, OptimizerSpec()),
}


@pytest.fixture(scope="module")
def programs(plugin) -> Programs:
    """No axis of an activation is as long as one of a weight: 2048 slots of a window, 64 rows, 8192 of a microbatch."""
    definition, weights = abstract_decoder(LLAMA, jnp.bfloat16, 1)
    dims = Dimensions(
        model=LLAMA,
        dtype=jnp.bfloat16,
        max_rows=64,
        context=8192,
        pages=4096,
        rank_capacity=128,
        adapters=9,
        microbatch=8192,
        window=2048,
        tape=("x", "mid", "attention"),
        lean_tape=("x",),
    )
    return Programs(definition, weights, dims, KERNELS, Mesh(np.array([h100()]), (TP_AXIS,)))


def weight_shapes(programs: Programs) -> list[tuple[int, ...]]:
    """Of every matrix, with adapters behind it and without, of one layer of it, and of the pieces in which the loss
    takes the head."""
    wide = [leaf.shape for leaf in jax.tree.leaves((programs.weights, programs.frozen)) if leaf.size > 1e7]
    layers = [shape[1:] for shape in wide if len(shape) == 3]
    chunk = KERNELS.head_chunk
    pieces = [(LLAMA.hidden_size, size) for size in (chunk, LLAMA.vocab_size % chunk)]
    return [*wide, *layers, *pieces]


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_and_pages_are_read_where_they_lie(programs, name):
    compiled = PROGRAMS[name](programs)
    pool = pool_shape(programs.dims)
    layers, pages, page, row = pool.shape
    flat = (layers, pages * page, row)
    assert moved(compiled.call.as_text(), [*weight_shapes(programs), pool.shape, flat, pool.shape[1:], flat[1:]]) == []
    assert compiled.memory.temp_size_in_bytes < nbytes(pool) / 2


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_kernels_write_in_place_is_passed_on(programs, name):
    """See `pallas_kernels.mosaic.whole`."""
    assert forgotten_results(PROGRAMS[name](programs).call.as_text()) == []


@pytest.mark.parametrize("name", ["decode", "taped", "backward"])
def test_kernels_are_in_the_programs(programs, name):
    assert "mosaic_gpu" in PROGRAMS[name](programs).call.as_text()


LAUNCHES = {"decode": 9, "decode with adapters": 8, "prompts": 9, "taped": 9}
"""Of the compiler, a layer, beside products and kernels of ours."""


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_the_compiler_launches_in_a_layer(programs, name):
    """Fewer are to be written down: they are what the next change is held to."""
    found = launched(PROGRAMS[name](programs).call.as_text(), "layers/while")
    assert len(found) == LAUNCHES[name], found


def test_angles_are_made_once_a_step(programs):
    """They are the same for every layer."""
    text, made = PROGRAMS["taped"](programs).call.as_text(), {"cosine", "power"}
    assert made.isdisjoint(opcodes(text, loop_body(text, "layers/while")))
    assert made <= opcodes(text, entry(text))
    assert text.count(" cosine(") == 1


def test_what_a_backward_unit_makes_again_is_added_in_place(programs):
    """To q, to mid, and to gate with up, once each: the stages that are pulled back make no outputs. No
    sum waits in float32 to be added, and no product is copied."""
    text = programs.lean_backward(JOB).call.as_text()
    calls = [line for line in text.splitlines() if '"mosaic_gpu_v2"' in line and "/lora_expand/" in line]
    assert [re.search(r" = (\w+\[[\d,]*\])", call)[1] for call in calls] == [
        f"bf16[2048,{width}]" for width in (4096, 4096, 28672)
    ]
    assert all("output_to_operand_aliasing={{}: (0, {})}" in call for call in calls)
    fused = set(CALLED.findall(text))
    kept = [each for name, part in computations(text).items() if name not in fused for each in part]
    wide = [each for each in kept if each.shape[:1] == (2048,) and math.prod(each.shape) >= 2048 * LLAMA.hidden_size]
    assert wide
    assert [each.line for each in wide if " = f32[" in each.line or each.opcode in ("copy", "slice")] == []


@pytest.mark.parametrize(("name", "writes"), [("decode", 1), ("prompts", 1), ("taped", 2), ("taped with dropout", 2)])
def test_a_layer_writes_pages_at_once(programs, name, writes):
    """K/V and x before attention reads them; attention and mid after it. Each launch costs 3 to 5 microseconds beside
    its bytes."""
    assert sum(bool(PAGE_WRITE.search(line)) for line in in_layers(programs, name)) == writes


def test_tables_of_pages_are_not_taken_apart_in_every_layer(programs):
    """Each part would be a kernel of its own, beside those that write by them."""
    assert [line for line in in_layers(programs, "taped") if re.search(r" = s32\[32,\d+\]\S* fusion\(", line)] == []


def in_layers(programs: Programs, name: str) -> list[str]:
    """Instructions of the loop over layers."""
    return [line for line in PROGRAMS[name](programs).call.as_text().splitlines() if "layers/while/body" in line]


GATED = pytest.mark.parametrize(
    ("name", "slots"), [("decode with adapters", 64), ("taped", 2112), ("taped with dropout", 2112)]
)


PAGE_WRITE = re.compile(r'"mosaic_gpu_v2".*op_name="[^"]*/page_write/')
EXPANSION = re.compile(r'"mosaic_gpu_v2".*op_name="[^"]*/(lora_expand|gated_expand)/')
"""A kernel's call by the name that it was given."""


def silu_of(slots: int, text: str) -> bool:
    """Whether an operation of the compiler's makes silu(gate)."""
    return bool(re.search(rf"\[{slots},{LLAMA.intermediate_size}\]\S* exponential\(", text))


@GATED
def test_gate_and_up_are_read_once_by_a_kernel_of_their_own(programs, name, slots):
    """Nothing else makes silu(gate) * up."""
    text = PROGRAMS[name](programs).call.as_text()
    assert sorted(EXPANSION.findall(text)) == ["gated_expand", *["lora_expand"] * 3]
    assert not silu_of(slots, text)


@GATED
def test_expanded_alone_gate_and_up_are_activated_by_the_compiler(programs, name, slots):
    """What the kernel is measured against."""
    kernels = dataclasses.replace(KERNELS, gated_expand="lora_expand")
    apart = Programs(programs.definition, programs.frozen, programs.dims, kernels, programs.mesh)
    text = PROGRAMS[name](apart).call.as_text()
    assert EXPANSION.findall(text) == ["lora_expand"] * 4
    assert silu_of(slots, text)
    assert moved(text, weight_shapes(programs)) == [] == forgotten_results(text)


def test_a_program_lowered_in_another_process_is_the_same(programs, caplog):
    """Its kernels are those of the process that asked, in place and without copies."""
    with LoweringProcesses("gpu", 1) as lowering:
        others = Programs(programs.definition, programs.frozen, programs.dims, KERNELS, programs.mesh, None, lowering)
        PROGRAMS["decode"](others)  # lowered here, while the process starts
        compiled = PROGRAMS["taped"](others)
    text = compiled.call.as_text()
    assert "lowered in this process" not in caplog.text
    assert compiled.memory == PROGRAMS["taped"](programs).memory
    assert text.count("mosaic_gpu") == PROGRAMS["taped"](programs).call.as_text().count("mosaic_gpu")
    assert moved(text, weight_shapes(programs)) == [] == forgotten_results(text)
