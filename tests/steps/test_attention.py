"""Where slots stand and where their keys and values go, against a batch written out by hand."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from flexjax.layout import SlotLayout
from flexjax.steps.attention import places_of, token_positions
from flexjax.steps.kernels import Kernels


@pytest.fixture
def batch() -> SimpleNamespace:
    """Rows at position 70 of pages (5, 9) and idle; tiles at position 64 of pages (8, 3), idle, and at 0 of page 6."""
    return SimpleNamespace(
        row_position=jnp.array([70, -1]),
        row_pages=jnp.array([[5, 9], [4, 4]]),
        tile_position=jnp.array([64, 0, 0]),
        tile_length=jnp.array([10, 0, 64]),
        tile_pages=jnp.array([[8, 3], [2, 2], [6, 0]]),
    )


def test_positions(batch):
    assert token_positions(batch, SlotLayout(2)).tolist() == [70, 0]
    positions = token_positions(batch, SlotLayout(2, 192)).tolist()
    assert positions == [70, 0, *range(64, 128), *range(64), *range(64)]


def test_places_of_keys_and_values(batch):
    """A tile writes its whole page, the part beyond its length too; idle slots write nowhere."""
    layer = SimpleNamespace(query_heads=2, kv_heads=1, config=SimpleNamespace(head_dim=8))
    decode = places_of(batch, SlotLayout(2), layer, Kernels())
    assert decode.rows.tolist() == [9 * 64 + 6, -1] and decode.tiles is None
    mixed = places_of(batch, SlotLayout(2, 192), layer, Kernels())
    assert mixed.rows.tolist() == [9 * 64 + 6, -1]
    assert mixed.tiles.tolist() == [[3], [-1], [6]]
    assert mixed.row_plan is None and mixed.tile_plan is None, "the references need no plan"
