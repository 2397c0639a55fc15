"""What ``flexjax bench kernels`` times on a GPU compiles, and holds no copy of what it is to write in place."""

import functools

import jax
import pytest

from flexjax.bench.kernel_case import KernelCase
from flexjax.bench.kernel_cases import FULL, all_cases
from flexjax.bench.timing import LAUNCHES, Call, unrolled
from flexjax.engine.programs import COMPILER_OPTIONS
from flexjax.state import nbytes
from tests.aot.hopper import compile_for_h100

OPTIONS = COMPILER_OPTIONS["gpu"] | LAUNCHES["gpu"][0]


CASES = all_cases(FULL, None)
BY_KERNELS = ("lora_expand", "lora_expand, then added", "a launch for each part")
"""Alternatives that call kernels of ours."""

RIVALS = [(case, name) for case in CASES for name in case.alternatives if name in BY_KERNELS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_program_of_a_case(case):
    chosen = case.chosen(on_gpu=True)
    kernels = kernels_in(case, case.call(chosen))
    assert chosen != "mosaic_gpu" or kernels >= case.calls


@pytest.mark.parametrize(("case", "rival"), RIVALS, ids=[case.name for case, _ in RIVALS])
def test_its_alternative_has_kernels_too(case, rival):
    parts = {f"page_write {each.name}": 2 + len(each.columns) for each in FULL.parts}
    assert kernels_in(case, case.alternatives[rival].call) == case.calls * parts.get(case.name, 1)


def kernels_in(case: KernelCase, call: Call) -> int:
    """Calls of kernels in the compiled program, which writes the whole state in place."""
    state, arguments = jax.eval_shape(functools.partial(case.prepare, case.chosen(on_gpu=True)))
    program = functools.partial(unrolled, call, case.calls)
    compiled = compile_for_h100(program, state, arguments, donate=(0,), options=OPTIONS)
    assert compiled.memory_analysis().alias_size_in_bytes == nbytes(state)
    return compiled.as_text().count('custom_call_target="mosaic_gpu')
