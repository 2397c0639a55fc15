"""Adapters in the host's memory: never more bytes than allowed where files have them, never another's weights."""

import dataclasses

import numpy as np
import pytest

from flexjax.engine.adapter_host import HostAdapters
from flexjax.engine.adapters import NoRoomForAdapter
from flexjax.weights.adapter import LoraAdapter, LoraTerm, fresh_adapter
from flexjax.weights.peft import read_adapter, read_outline, write_adapter
from tests.tiny_model import CONFIG

BYTES = fresh_adapter(CONFIG, rank=4, alpha=8, target_modules=("q_proj",)).nbytes


def adapter(seed: int) -> LoraAdapter:
    fresh = fresh_adapter(CONFIG, rank=4, alpha=8, target_modules=("q_proj",), seed=seed)
    a, b = fresh.weights["q_proj"]
    return fresh.with_weights({"q_proj": (a, np.random.default_rng(seed).standard_normal(b.shape))})


@pytest.fixture
def reads() -> list:
    """Folders that were read."""
    return []


@pytest.fixture
def host(reads) -> HostAdapters:
    """Room for two."""

    def read(folder):
        reads.append(folder.name)
        return read_adapter(folder, CONFIG)

    return HostAdapters(2 * BYTES, read)


@pytest.fixture
def folders(tmp_path) -> list:
    for number in range(4):
        write_adapter(tmp_path / str(number), adapter(number))
    return [tmp_path / str(number) for number in range(4)]


def assert_is(found: LoraAdapter, number: int) -> None:
    for mine, theirs in zip(found.weights["q_proj"], adapter(number).weights["q_proj"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_those_used_longest_ago_are_read_again(host, reads, folders):
    assert CONFIG.num_layers * 4 * 4 * (CONFIG.hidden_size + CONFIG.num_heads * CONFIG.head_dim) == BYTES
    for number in (0, 1):
        host.keep(number, adapter(number), folders[number])
    host.fetch(0)
    host.keep(2, adapter(2), folders[2])
    assert host.bytes == 2 * BYTES
    for number in (0, 2, 1, 0):
        assert_is(host.fetch(number), number)
    assert reads == ["1", "0"], "1 was used before 0, and was read in the place of 0, the older of the two left"


def test_one_that_is_only_known_is_read_when_it_is_needed(host, reads, folders):
    host.know(3, read_outline(folders[3], CONFIG), folders[3])
    assert reads == [] and host.bytes == 0
    assert_is(host.fetch(3), 3)
    assert_is(host.fetch(3), 3)
    assert reads == ["3"]


def test_one_in_no_file_stays_until_it_is_in_one(host, reads, folders):
    for number in range(3):
        host.keep(number, adapter(number))
    assert host.bytes == 3 * BYTES
    with pytest.raises(NoRoomForAdapter, match=f"adapter_host_bytes is {2 * BYTES}.* take {3 * BYTES}; export"):
        host.require_room(1)
    assert not host.saved(0, folders[1]), "another adapter is no copy of it"
    assert not host.saved(0, folders[0] / "ghost")
    assert host.saved(0, folders[0]) and host.bytes == 2 * BYTES
    with pytest.raises(NoRoomForAdapter):
        host.require_room(1)
    host.forget(1)
    assert not host.saved(1, folders[1]), "it is not known any more"
    host.require_room(BYTES)
    assert_is(host.fetch(0), 0)


def test_files_that_have_changed_are_refused(host, folders):
    host.keep(0, adapter(0), folders[0])
    host.keep(1, adapter(1), folders[1]), host.keep(2, adapter(2), folders[2])
    write_adapter(folders[0], adapter(3))
    with pytest.raises(ValueError, match="its files have changed; load it again"):
        host.fetch(0)
    host.know(3, dataclasses.replace(read_outline(folders[3], CONFIG), use_rslora=True), folders[3])
    with pytest.raises(ValueError, match="its files have changed"):
        host.fetch(3)
    (folders[1] / "adapter_model.safetensors").unlink()
    host.fetch(2), host.keep(4, adapter(0), folders[3]), host.keep(5, adapter(0), folders[3])
    with pytest.raises(FileNotFoundError):
        host.fetch(1)


def test_one_larger_than_all_room_is_served_and_not_kept(reads, folders):
    small = HostAdapters(BYTES - 1, lambda folder: read_adapter(folder, CONFIG))
    small.keep(0, adapter(0), folders[0])
    assert small.bytes == 0
    assert_is(small.fetch(0), 0)
    assert small.bytes == 0


def test_one_that_must_be_a_certain_adapter_is_that_or_refused(host, folders):
    """And why it could not be read is known until it could."""
    for number, fingerprint in ((0, adapter(0).fingerprint), (1, adapter(0).fingerprint)):
        host.know(number, read_outline(folders[number], CONFIG), folders[number], fingerprint)
    assert_is(host.fetch(0), 0)
    assert host.fault(0) is host.fault(1) is host.fault(9) is None
    with pytest.raises(ValueError, match="its files have changed"):
        host.fetch(1)
    assert host.fault(1).startswith(f"the adapter in {folders[1]} is not the one") and host.fault(0) is None
    write_adapter(folders[1], adapter(0))
    assert_is(host.fetch(1), 0)
    assert host.fault(1) is None


def test_a_fingerprint_is_of_all_that_decides_an_answer(folders):
    """Weights, rank, scale and kind of scale; what it was trained on changes nothing."""
    one = adapter(0)
    same = (read_adapter(folders[0], CONFIG), dataclasses.replace(one, base_model_name="x", dropout=0.5))
    assert {each.fingerprint for each in same} == {one.fingerprint}
    scaled = dataclasses.replace(one, terms={"q_proj": (LoraTerm(4, 9.0),) * CONFIG.num_layers})
    others = (adapter(1), dataclasses.replace(one, use_rslora=True), scaled)
    assert len({each.fingerprint for each in (one, *others)}) == 4
