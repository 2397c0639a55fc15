"""Copies are found in a program's text: what two programs look like when compiled for an H100."""

import jax
import jax.numpy as jnp

from tests.aot.hopper import compile_for_h100
from tests.aot.program_text import moved

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
