"""Checkpoints: every bit comes back, torn ones are passed over, and a save that fails or is killed harms nothing."""

import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexjax.weights.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    latest_checkpoint,
    restore_arrays,
    save_checkpoint,
    torn_checkpoints,
)

ROOT = Path(__file__).resolve().parents[2]


def training_state() -> dict:
    """Adapter masters and the AdamW state after one step, with leaves of other types and values hard to keep."""
    generator = np.random.default_rng(0)
    adapter = {
        name: {"a": jnp.asarray(generator.standard_normal((2, 24, 4)), jnp.float32), "b": jnp.zeros((2, 4, 8))}
        for name in ("q_proj", "down_proj")
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    gradients = jax.tree.map(lambda leaf: leaf + 0.25, adapter)
    _, moments = optimizer.update(gradients, optimizer.init(adapter), adapter)
    strange = np.array([np.nan, -0.0, np.inf, 1e-40, 3.0], np.float32)
    return {
        "adapter": adapter,
        "optimizer": moments,
        "seed": jnp.uint32(7),
        "owner": jnp.arange(-3, 4, dtype=jnp.int32),
        "strange": jnp.asarray(strange),
        "half": jnp.asarray(strange, jnp.bfloat16),
        "nothing": (None, {}),
    }


def bits(tree) -> list[tuple]:
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def small(step: int) -> dict:
    return {"weights": jnp.full((300,), float(step)), "count": jnp.int32(step)}


def assert_holds(info: CheckpointInfo | None, step: int) -> None:
    assert info is not None and info.step == step and info.metadata == {"step": step}
    np.testing.assert_array_equal(restore_arrays(info, small(0))["weights"], np.full((300,), step, np.float32))


def folders(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def largest_array_file(folder: Path) -> Path:
    files = [path for path in (folder / "arrays").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_optimizer_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = training_state()
    metadata = {"losses": [0.1, 1 / 3, 2.5e-17], "position": {"epoch": 1}, "name": "näme"}
    path = save_checkpoint(tmp_path / "new" / "job", 12, state, metadata)
    info = latest_checkpoint(tmp_path / "new" / "job")
    assert info == CheckpointInfo(12, path, metadata, ())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    for like in (state, shapes):
        restored = restore_arrays(info, like)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)
        assert all(isinstance(leaf, jax.Array) and not leaf.committed for leaf in jax.tree.leaves(restored))


def test_leaves_go_where_their_sharding_says(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    split = jax.NamedSharding(mesh, jax.P(None, "tp"))
    weights = jax.device_put(jnp.arange(24.0).reshape(4, 6), split)
    save_checkpoint(tmp_path, 1, {"w": weights}, {})
    info = latest_checkpoint(tmp_path)
    struct = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=split)
    for like in (weights, struct):
        restored = restore_arrays(info, {"w": like})["w"]
        assert restored.sharding == split
        np.testing.assert_array_equal(restored, np.arange(24.0).reshape(4, 6))
    elsewhere = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[3]))
    assert restore_arrays(info, {"w": elsewhere})["w"].devices() == {jax.devices()[3]}


def test_no_directory_and_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000009.partial").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert torn_checkpoints(tmp_path) == ()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES = {
    "array file truncated": (lambda folder: truncate(largest_array_file(folder)), "bytes"),
    "array file gone": (lambda folder: largest_array_file(folder).unlink(), "is missing"),
    "array byte flipped": (lambda folder: flip(largest_array_file(folder)), "checksum"),
    "arrays gone": (lambda folder: shutil.rmtree(folder / "arrays"), "is missing"),
    "metadata truncated": (lambda folder: truncate(folder / "metadata.json"), "metadata.json has"),
    "metadata byte flipped": (lambda folder: flip(folder / "metadata.json"), "metadata.json does not"),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest truncated": (lambda folder: truncate(folder / "manifest.json"), "manifest.json"),
    "manifest empty": (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "manifest.json"),
    "manifest is no object": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_torn_checkpoint_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    inflict, symptom = DAMAGES[damage]
    for step in (10, 20):
        save_checkpoint(tmp_path, step, small(step), {"step": step})
    inflict(tmp_path / "step-00000020")
    info = latest_checkpoint(tmp_path)
    assert_holds(info, 10)
    (reason,) = info.skipped
    assert "step 20" in reason and str(tmp_path) in reason and symptom in reason
    assert caplog.messages == [reason]

    inflict(tmp_path / "step-00000010")
    assert latest_checkpoint(tmp_path) is None
    newer, older = torn_checkpoints(tmp_path)
    assert newer == reason and "step 10" in older


def test_every_byte_of_the_manifest_matters(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"w": jnp.ones((2,))}, {})
    manifest = tmp_path / "step-00000001" / "manifest.json"
    whole = manifest.read_bytes()
    for index in random.Random(0).sample(range(len(whole)), 60):
        manifest.write_bytes(whole[:index] + bytes([whole[index] ^ 0x01]) + whole[index + 1 :])
        assert latest_checkpoint(tmp_path) is None, f"byte {index} of {whole!r}"


def test_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, step, small(step), {"step": step}, keep=3)
    assert folders(tmp_path) == ["step-00000009", "step-00000010", "step-00000011"]
    path = save_checkpoint(tmp_path, 123_456_789, small(12), {"step": 12}, keep=1)
    assert folders(tmp_path) == [path.name]


def test_step_saved_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    for step, value in ((1, 1), (2, 2), (2, 3), (2, 4)):
        path = save_checkpoint(tmp_path, step, small(value), {"value": value})
    info = latest_checkpoint(tmp_path)
    assert (info.path, info.step, info.metadata) == (path, 2, {"value": 4})
    assert folders(tmp_path) == ["step-00000001", path.name]
    np.testing.assert_array_equal(restore_arrays(info, small(0))["count"], 4)


def test_leftovers_and_torn_later_steps_go_with_the_next_save(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, small(step), {"step": step})
    flip(largest_array_file(tmp_path / "step-00000020"))
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000030.partial")
    (tmp_path / "notes.txt").write_text("not ours")
    assert_holds(latest_checkpoint(tmp_path), 10)
    save_checkpoint(tmp_path, 15, small(15), {"step": 15})
    assert folders(tmp_path) == ["notes.txt", "step-00000010", "step-00000015"]
    assert_holds(latest_checkpoint(tmp_path), 15)


def test_a_later_whole_checkpoint_is_never_lost(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 20, small(20), {"step": 20})
    with pytest.raises(CheckpointError, match="checkpoint of step 10 .*step-00000020.*checkpoint_dir"):
        save_checkpoint(tmp_path, 10, small(10), {"step": 10})
    assert_holds(latest_checkpoint(tmp_path), 20)
    assert folders(tmp_path) == ["step-00000020"]


def test_other_tree_is_an_error_that_names_the_leaves(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, training_state(), {})
    info = latest_checkpoint(tmp_path)
    like = training_state()
    like["adapter"]["k_proj"] = like["adapter"].pop("q_proj")
    like["owner"] = jnp.zeros((8,), jnp.int32)
    like["half"] = like["half"].astype(jnp.float16)
    with pytest.raises(CheckpointError) as error:
        restore_arrays(info, like)
    for part in (
        "['adapter']['q_proj']['a'] is not wanted",
        "['adapter']['k_proj']['b'] is missing",
        "['owner'] is int32[7], wanted is int32[8]",
        "['half'] is bfloat16[5], wanted is float16[5]",
        str(info.path),
    ):
        assert part in str(error.value)
    assert "down_proj" not in str(error.value) and "optimizer" not in str(error.value)


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: flip(largest_array_file(folder))])
def test_checkpoint_damaged_after_it_was_found(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_checkpoint(tmp_path, 1, small(1), {})
    info = latest_checkpoint(tmp_path)
    damage(info.path)
    with pytest.raises(CheckpointError, match="step 1 in .* is torn"):
        restore_arrays(info, small(0))


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, 1, small(1), {"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(CheckpointError, match="step 2 cannot be written to .*File too large") as error:
            save_checkpoint(tmp_path, 2, {"weights": jnp.ones((100_000,))}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(tmp_path) in str(error.value)
    assert caplog.messages == []
    assert folders(tmp_path) == ["step-00000001"]
    assert_holds(latest_checkpoint(tmp_path), 1)
    save_checkpoint(tmp_path, 2, small(2), {"step": 2})
    assert_holds(latest_checkpoint(tmp_path), 2)


def test_directory_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for directory in (file, file / "below"):
        with pytest.raises(CheckpointError, match=str(directory)):
            save_checkpoint(directory, 1, small(1), {})
    with pytest.raises(CheckpointError, match=str(file)):
        latest_checkpoint(file)


@pytest.mark.parametrize("numbers", [{"step": -1}, {"step": 1, "keep": 0}])
def test_impossible_numbers(tmp_path: Path, numbers: dict) -> None:
    with pytest.raises(ValueError, match="step is .* and keep is "):
        save_checkpoint(tmp_path, arrays=small(1), metadata={}, **numbers)


def test_metadata_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, small(1), {"array": jnp.ones(2)})
    assert folders(tmp_path) == []


def test_saving_from_a_thread_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    def save() -> None:
        for step in range(3):
            save_checkpoint(tmp_path, step, small(step), {"step": step})

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert_holds(latest_checkpoint(tmp_path), 2)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


SAVES_FOREVER = """
import sys
from pathlib import Path

import numpy as np

from flexjax.weights.checkpoint import latest_checkpoint, save_checkpoint

directory = Path(sys.argv[1])
latest = latest_checkpoint(directory)
step = latest.step if latest else 0
print("ready", flush=True)
while True:
    step += 1
    arrays = {f"leaf{index}": np.full((400_000,), 10 * step + index, np.float32) for index in range(8)}
    save_checkpoint(directory, step, arrays, {"step": step})
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """The last step that was reported saved, or the one after it, is there and whole, whenever the process died."""
    like = {f"leaf{index}": jax.ShapeDtypeStruct((400_000,), jnp.float32) for index in range(8)}
    moments = random.Random(5)
    saved = 0
    for _ in range(3):
        command = [sys.executable, "-c", SAVES_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0.3, 1.3))
            process.kill()
            reported = process.stdout.read().split()
        saved = int(reported[-1]) if reported else saved
        info = latest_checkpoint(tmp_path)
        if info is None:
            assert saved == 0
            continue
        assert info.step in (saved, saved + 1) and info.metadata == {"step": info.step} and info.skipped == ()
        for index, leaf in enumerate(restore_arrays(info, like).values()):
            np.testing.assert_array_equal(leaf, np.full((400_000,), 10 * info.step + index, np.float32))
        saved = info.step
    assert saved > 0, "no kill came after the first save"
