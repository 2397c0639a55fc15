"""Every way in which the gradient kernel is cut has a layout for each of its arrays: Mosaic searches for some of them,
for minutes where there is none."""

import functools

import pytest

from pallas_kernels import grouped_lora_grad
from pallas_kernels.grouped_lora.cases import Case
from pallas_kernels.grouped_lora.grad_tiling import takes
from tests.aot.hopper import compile_for_h100

SHAPES = [
    (tokens, modules, rank)
    for tokens in (64, 512, 1024, 2048)
    for modules in (1, 2, 3)
    for rank in (8, 32, 64)
    if takes(tokens, modules, rank)
]


@pytest.mark.parametrize(("tokens", "modules", "rank"), SHAPES)
def test_it_compiles(tokens, modules, rank):
    widths = (256, 128, 128)[:modules]
    case = Case("", tokens, 512, sum(widths), rank, widths=widths, keeps_h=True)
    arguments = case.make(seed=0)
    widths = arguments.pop("widths")
    run = functools.partial(grouped_lora_grad, widths=widths, implementation="mosaic_gpu")
    compiled = compile_for_h100(lambda values: run(**values), arguments)
    assert "mosaic_gpu" in compiled.as_text()
