"""The cases for timing describe calls that their operations accept; only the small model's are made."""

import functools

import jax
import pytest

import pallas_kernels
from pallas_kernels.gated_expand import cases as gated_expand_cases
from pallas_kernels.grouped_lora import cases as grouped_lora_cases
from pallas_kernels.linear_cross_entropy import cases as linear_cross_entropy_cases
from pallas_kernels.lora_expand import cases as lora_expand_cases
from pallas_kernels.model_shapes import SMOLLM2_135M
from pallas_kernels.page_write import cases as page_write_cases
from pallas_kernels.paged_attention import cases as paged_attention_cases
from pallas_kernels.window_attention_grad import cases as window_attention_grad_cases

LARGE = {
    "gated_expand": gated_expand_cases.LARGE,
    "grouped_lora_grad": grouped_lora_cases.LARGE,
    "linear_cross_entropy": linear_cross_entropy_cases.LARGE,
    "lora_expand": lora_expand_cases.LARGE,
    "page_write": page_write_cases.LARGE,
    "paged_attention": paged_attention_cases.LARGE,
    "window_attention_grad": window_attention_grad_cases.LARGE,
    "write_pages": page_write_cases.LARGE_PAGES,
    "write_parts": page_write_cases.LARGE_PARTS,
}


@pytest.mark.parametrize("name", sorted(LARGE))
def test_cases_of_the_small_model_are_accepted(name):
    of_small_model = [case for case in LARGE[name] if SMOLLM2_135M.name in case.name]
    assert of_small_model
    for case in of_small_model:
        arguments = case.make(seed=0)
        static = {key: value for key, value in arguments.items() if isinstance(value, int | float | tuple)}
        arrays = {key: value for key, value in arguments.items() if key not in static}
        jax.eval_shape(functools.partial(getattr(pallas_kernels, name), **static), **arrays)


@pytest.mark.parametrize("name", sorted(LARGE))
def test_names_are_unique(name):
    names = [case.name for case in LARGE[name]]
    assert len(set(names)) == len(names)
