"""Every case, however large, describes a call that its operation accepts; nothing is allocated to see that."""

import jax
import pytest

import pallas_kernels
from pallas_kernels.grouped_lora import cases as grouped_lora_cases
from pallas_kernels.linear_cross_entropy import cases as linear_cross_entropy_cases
from pallas_kernels.page_write import cases as page_write_cases
from pallas_kernels.paged_attention import cases as paged_attention_cases
from pallas_kernels.window_attention_grad import cases as window_attention_grad_cases

LARGE = {
    "grouped_lora": grouped_lora_cases.LARGE,
    "grouped_lora_grad": grouped_lora_cases.LARGE_GRAD,
    "linear_cross_entropy": linear_cross_entropy_cases.LARGE,
    "page_write": page_write_cases.LARGE,
    "paged_attention": paged_attention_cases.LARGE,
    "window_attention_grad": window_attention_grad_cases.LARGE,
}


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=case.name) for name, cases in LARGE.items() for case in cases]
)
def test_large_cases_are_accepted(name, case):
    results = jax.eval_shape(lambda: getattr(pallas_kernels, name)(**case.make(seed=0)))
    assert all(result.size for result in jax.tree.leaves(results))


@pytest.mark.parametrize("name", sorted(LARGE))
def test_names_are_unique(name):
    names = [case.name for case in LARGE[name]]
    assert len(set(names)) == len(names)
