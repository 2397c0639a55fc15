"""What ``flexjax bench kernels`` times on a GPU compiles, and holds no copy of what it is to write in place."""

import functools

import jax
import pytest

from flexjax.bench.kernel_cases import FULL, all_cases
from flexjax.bench.timing import LAUNCHES, unrolled
from flexjax.engine.programs import COMPILER_OPTIONS
from flexjax.state import nbytes
from tests.aot.hopper import compile_for_h100

OPTIONS = COMPILER_OPTIONS["gpu"] | LAUNCHES["gpu"][0]


@pytest.mark.parametrize("case", all_cases(FULL, None), ids=lambda case: case.name)
def test_program_of_a_case(case):
    chosen = case.chosen(on_gpu=True)
    state, arguments = jax.eval_shape(functools.partial(case.prepare, chosen))
    program = functools.partial(unrolled, case.call(chosen), case.calls)
    compiled = compile_for_h100(program, state, arguments, donate=(0,), options=OPTIONS)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes(state)
    assert chosen != "mosaic_gpu" or compiled.as_text().count('custom_call_target="mosaic_gpu') >= case.calls
