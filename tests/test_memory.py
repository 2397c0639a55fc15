"""The memory plan against bytes counted by hand, and what it refuses."""

import math

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.memory import MemoryPlan, OutOfMemory, measuring_bytes, pages_wanted, plan_memory
from flexjax.models.config import ModelConfig
from flexjax.state import Dimensions

LLAMA_8B = ModelConfig(
    **dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32),
    **dict(num_heads=32, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=None),
    **dict(tie_word_embeddings=False, attention_bias=False, max_position_embeddings=131072),
)
DIMS = Dimensions(
    **dict(model=LLAMA_8B, dtype=jnp.bfloat16, max_rows=64, context=4096, pages=0, rank_capacity=64, adapters=5),
    **dict(microbatch=4096, window=512, tape=("x", "q")),
)
GIB = 2**30


def plan(**settings) -> MemoryPlan:
    defaults = dict(weights=15 * GIB, temporaries=GIB, limit=70 * GIB, jobs=2)
    return plan_memory(DIMS, **{**defaults, **settings})


def test_every_byte_of_an_8b_model():
    fixed = dict(plan().fixed)
    # per layer and column: inputs and outputs of q, k, v, o, gate, up, down
    columns = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336)
    assert fixed["resident adapters"] == 32 * 64 * columns * 2
    assert fixed["adapter masters, moments and gradients"] == 4 * 32 * 64 * columns * 4
    assert fixed["accumulators of backward passes (2 jobs)"] == 2 * 4096 * (4096 * 2 + 2 * 8 * 128 * 4)
    assert fixed["row state"] == 64 * 4 + 64 * 4096 * 4
    assert plan().page_bytes == 32 * 64 * 2 * 8 * 128 * 2, "64 tokens of keys and values in every layer"


def test_wanted_pages_are_for_full_rows_and_microbatches_and_half_again():
    tape, finals = 1 + 2 + 2, 7  # K/V, then x and q of two pages each; ten blocks share a page for final states
    assert pages_wanted(DIMS, jobs=1) == math.ceil(1.5 * (64 * 64 + 64 * tape + finals))


def test_what_the_compiler_measures_with_fits_the_reserve():
    """64 rows and the head: two bfloat16 operands, two float32 results, five guards of 16 MiB and 32 MiB to work in."""
    assert measuring_bytes(DIMS) == 2 * 4096 * (64 + 128256) + 2 * 4 * 64 * 128256 + (5 * 16 + 32) * 2**20
    assert dict(plan(measuring=3 * GIB).fixed)["reserve"] == 3 * GIB
    assert dict(plan(measuring=GIB).fixed)["reserve"] == int(0.02 * 70 * GIB)


@given(limit=st.integers(1 * GIB, 200 * GIB), jobs=st.integers(1, 4))
def test_a_plan_fits_its_limit_or_is_refused(limit, jobs):
    try:
        chosen = plan(limit=limit, jobs=jobs)
    except OutOfMemory as refusal:
        assert "max_model_len" in str(refusal) and f"{limit:,} bytes" in str(refusal)
        return
    assert chosen.total <= limit and chosen.pages >= 64
    assert chosen.pages == min(chosen.affordable, pages_wanted(DIMS, jobs))


def test_the_users_number_of_pages_is_taken_or_refused():
    assert plan(pages=100).pages == 100
    with pytest.raises(OutOfMemory, match="100000 pages of 8,388,608 bytes are needed"):
        plan(pages=100_000)
    with pytest.raises(OutOfMemory, match="one sequence of max_model_len = 4096 takes 64"):
        plan(pages=63)


def test_the_table_adds_up():
    chosen = plan()
    rows = chosen.rows()
    assert sum(size for _, size in rows) == chosen.limit
    assert f"pages ({chosen.pages} of 64 tokens)" in str(chosen)
