"""Copies and launches are found in a program's text: what programs look like when compiled for an H100."""

import jax
import jax.numpy as jnp

from tests.aot.hopper import compile_for_h100
from tests.aot.program_text import entry, launched, loop_body, moved, opcodes

LAYERS, DEPTH, WIDTH = 3, 256, 1024
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
STACK = jax.ShapeDtypeStruct((LAYERS, DEPTH, WIDTH), jnp.bfloat16)
ROWS = jax.ShapeDtypeStruct((64, DEPTH), jnp.bfloat16)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def text_of(function, *arguments, donate=()) -> str:
    return compile_for_h100(function, *arguments, donate=donate, options=OPTIONS).as_text()


def test_a_layer_taken_by_an_index_that_is_an_argument_is_copied():
    text = text_of(lambda stack, index, x: x @ stack[index], STACK, INDEX, ROWS)
    assert len(moved(text, [(DEPTH, WIDTH)])) == 1
    assert moved(text, [(DEPTH, WIDTH + 1)]) == []


def test_a_layer_of_a_scan_is_not():
    def layers(stack, x):
        return jax.lax.scan(lambda x, w: ((x @ w)[:, :DEPTH], None), x, stack)[0]

    assert moved(text_of(layers, STACK, ROWS), [(DEPTH, WIDTH), STACK.shape]) == []


def test_rows_written_in_place_are_no_copy_of_the_whole():
    write = lambda stack, index, row: stack.at[0, index].set(row)
    row = jax.ShapeDtypeStruct((WIDTH,), jnp.bfloat16)
    assert moved(text_of(write, STACK, INDEX, row, donate=(0,)), [STACK.shape]) == []
    assert len(moved(text_of(write, STACK, INDEX, row), [STACK.shape])) == 1  # not donated


def test_operations_of_a_loop_are_those_of_its_fusions_too():
    def steps(x, angle):
        with jax.named_scope("steps"):
            return jax.lax.scan(lambda x, _: (jnp.cos(x) * angle + 1, None), x, length=3)[0]

    angle = jax.ShapeDtypeStruct((64,), jnp.float32)
    inside, before = (text_of(f, angle, angle) for f in (steps, lambda x, y: steps(x, jnp.sin(y))))
    assert "cosine" in opcodes(inside, loop_body(inside, "steps/while"))
    assert "sine" not in opcodes(before, loop_body(before, "steps/while"))
    assert {"sine", "cosine"} <= opcodes(before, entry(before))


LOOP = """\
%fused_product (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %call.1 = f32[8]{0} custom-call(%p), custom_call_target="__cublas$lt$matmul"
}

%body (state: (f32[8])) -> (f32[8]) {
  %state = (f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=0
  %product = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_product
  %kernel = f32[8]{0} custom-call(%product), custom_call_target="mosaic_gpu_v2"
  %sorted = (f32[8]{0}, u8[4]{0}) custom-call(%kernel), custom_call_target="__cub$SortKeys"
  %start = ((f32[8]{0}), f32[8]{0}) unheard-of-start(%x)
  %done = f32[8]{0} unheard-of-done(%start)
  ROOT %next = (f32[8]{0}) tuple(%done)
}

ENTRY %main (x: f32[8]) -> (f32[8]) {
  %x.1 = f32[8]{0} parameter(0)
  %first = (f32[8]{0}) tuple(%x.1)
  ROOT %while = (f32[8]{0}) while(%first), condition=%c, body=%body, metadata={op_name="jit(f)/layers/while"}
}
"""


def test_what_is_not_known_to_launch_nothing_counts():
    assert launched(LOOP, "layers/while") == ["sorted", "start"]
