"""Checkpoints of a training state: written whole or not at all, and proven whole before they are used.

A directory holds one folder a step:

    step-00000012/
        arrays/         every leaf under its path in the tree, written by orbax
        metadata.json   what the caller keeps beside the arrays
        manifest.json   size and SHA-256 of every other file

A folder is filled under another name and gets its own once all its bytes are on the disk, so a folder with that name
can only be torn by a disk that loses or changes bytes; the manifest shows that. One process writes to a directory at a
time. Nothing here knows what the arrays mean or when a checkpoint is due.
"""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax import checkpoint as orbax

from flexjax.weights.verified_folder import fault, publish

logger = logging.getLogger(__name__)

ARRAYS, METADATA = "arrays", "metadata.json"

PARTIAL = ".partial"
"""Ends the names of folders that are being filled or deleted; the next save deletes what a killed process left."""

FOLDER = re.compile(r"step-(?P<step>\d{8,})(?:\.(?P<again>\d+))?")
"""A finished checkpoint. A step that is saved again gets a number, so that no finished folder is ever written over."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or restored into the tree that was asked for."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose every byte was verified.

    Attributes:
        step: what the caller numbered it with.
        path: its folder.
        metadata: as it was saved, through JSON (tuples come back as lists, keys as strings).
        skipped: newer checkpoints that are torn, one sentence each, newest first.
    """

    step: int
    path: Path
    metadata: dict[str, Any]
    skipped: tuple[str, ...] = ()


def save_checkpoint(directory: Path, step: int, arrays: Any, metadata: dict[str, Any], keep: int = 2) -> Path:
    """Writes the checkpoint of a step, then deletes what it makes superfluous.

    The arrays are copied to the host first. They must not be donated before this returns; any thread may call it, but
    none with a running event loop.

    Args:
        directory: made if it does not exist.
        step: from 0; the newest of the directory, or one that is saved again.
        arrays: pytree of jax or numpy arrays of at least one value each; nodes without leaves are not stored.
        metadata: anything that JSON can hold.
        keep: how many steps to keep, the newest ones, this one included.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: the directory cannot be written or its disk is full; the checkpoints in it are left as they
            were. Or it holds a whole checkpoint of a later step, which belongs to a run that went further.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step} and keep is {keep}; step starts at 0 and at least 1 checkpoint is kept")
    text = json.dumps(metadata, indent=1, sort_keys=True)
    leaves = {name: np.asarray(leaf) for name, leaf in _by_path(jax.device_get(arrays)).items()}
    directory = Path(directory).absolute()
    _refuse_later(directory, step)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(directory)
        folder = _unused_folder(directory, step)
        _write(folder, leaves, text)
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore reports a full disk as any of the three
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {directory}: {error}. Earlier checkpoints are "
            f"unharmed; make room there or set checkpoint_dir to another directory"
        ) from error
    _delete_superfluous(directory, folder, keep)
    return folder


def latest_checkpoint(directory: Path) -> CheckpointInfo | None:
    """The newest checkpoint that is whole; None if there is none (`torn_checkpoints` then says why).

    Reads all bytes of every checkpoint it looks at, and logs a warning for each that is torn.

    Raises:
        CheckpointError: the directory exists but cannot be listed.
    """
    skipped = []
    for step, folder in _newest_first(directory):
        damage = fault(folder)
        if damage is None:
            metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
            return CheckpointInfo(step, folder, metadata, tuple(skipped))
        skipped.append(_sentence(step, folder, damage))
        logger.warning("%s", skipped[-1])
    return None


def torn_checkpoints(directory: Path) -> tuple[str, ...]:
    """One sentence for each checkpoint of the directory that is torn, newest first.

    Raises:
        CheckpointError: the directory exists but cannot be listed.
    """
    found = [(step, folder, fault(folder)) for step, folder in _newest_first(directory)]
    return tuple(_sentence(step, folder, damage) for step, folder, damage in found if damage is not None)


def restore_arrays(info: CheckpointInfo, like: Any) -> Any:
    """The arrays of a checkpoint, to the bit, as a tree of jax arrays with the structure of ``like``.

    Args:
        like: pytree of arrays or ShapeDtypeStructs. A leaf is put where its sharding says; one without a sharding, or
            an array that is not committed to its device, becomes an uncommitted array on the default device.

    Raises:
        CheckpointError: paths, shapes or dtypes of the leaves are not those of the checkpoint (all are named), or its
            files changed since it was found.
    """
    damage = fault(info.path)
    if damage is not None:
        raise CheckpointError(_sentence(info.step, info.path, damage))
    folder, wanted = info.path.absolute() / ARRAYS, _by_path(like)
    as_numpy = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    with orbax.PyTreeCheckpointer() as checkpointer:
        _check_fits(info, checkpointer.metadata(folder).item_metadata.tree, wanted)
        stored = checkpointer.restore(folder, args=orbax.args.PyTreeRestore(restore_args=as_numpy))
    leaves = [jax.device_put(stored[name], _placement(leaf)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves in the order of the tree, each under its path, such as "['optimizer'][0].mu['q_proj']"."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _placement(leaf: Any) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _check_fits(info: CheckpointInfo, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    def kind(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    differences = [f"{name} is not wanted" for name in stored if name not in wanted]
    differences += [f"{name} is missing" for name in wanted if name not in stored]
    differences += [
        f"{name} is {kind(stored[name])}, wanted is {kind(leaf)}"
        for name, leaf in wanted.items()
        if name in stored and kind(stored[name]) != kind(leaf)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint {info.path} holds other arrays than those to be restored: {'; '.join(differences)}. "
            f"Resume with the settings it was made with, or set checkpoint_dir to another directory"
        )


def _write(folder: Path, leaves: dict[str, np.ndarray], metadata: str) -> None:
    """Fills the folder under another name, then publishes it."""
    unfinished = folder.with_name(folder.name + PARTIAL)
    try:
        unfinished.mkdir()
        with _orbax_logs_nothing(), orbax.PyTreeCheckpointer(use_compression=False) as checkpointer:
            checkpointer.save(unfinished / ARRAYS, args=orbax.args.PyTreeSave(leaves))
        (unfinished / METADATA).write_text(metadata, encoding="utf-8")
        publish(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def _orbax_logs_nothing() -> Iterator[None]:
    """Silences the tracebacks that orbax logs from its threads before it raises the same error here."""

    def elsewhere(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    log = logging.getLogger("absl")
    log.addFilter(elsewhere)
    try:
        yield
    finally:
        log.removeFilter(elsewhere)


def _sentence(step: int, folder: Path, damage: str) -> str:
    return f"the checkpoint of step {step} in {folder} is torn: {damage}"


def _newest_first(directory: Path) -> list[tuple[int, Path]]:
    """Step and folder of all finished checkpoints, whole or torn; of a step saved twice the later one comes first."""
    directory = Path(directory).absolute()
    try:
        named = [(FOLDER.fullmatch(entry.name), entry) for entry in directory.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoint directory {directory} cannot be listed: {error}") from error
    found = [(int(match["step"]), int(match["again"] or 0), entry) for match, entry in named if match]
    return [(step, entry) for step, _, entry in sorted(found, reverse=True)]


def _refuse_later(directory: Path, step: int) -> None:
    for later, folder in _newest_first(directory):
        if later > step and fault(folder) is None:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {directory}: {folder.name} there is of a later "
                f"step. Resume from it, move it away, or set checkpoint_dir to another directory"
            )


def _unused_folder(directory: Path, step: int) -> Path:
    taken = [folder for existing, folder in _newest_first(directory) if existing == step]
    name = f"step-{step:08d}"
    if not taken:
        return directory / name
    return directory / f"{name}.{int(FOLDER.fullmatch(taken[0].name)['again'] or 0) + 1}"


def _delete_leftovers(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.name.endswith(PARTIAL) and FOLDER.fullmatch(entry.name.removesuffix(PARTIAL)):
            shutil.rmtree(entry)


def _delete_superfluous(directory: Path, newest: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` steps up to ``newest``. Later ones are torn, or saving had been refused."""
    folders = _newest_first(directory)
    kept: dict[int, Path] = {}
    for step, folder in folders[[folder for _, folder in folders].index(newest) :]:
        if len(kept) < keep:
            kept.setdefault(step, folder)
    for _, folder in folders:
        if folder in kept.values():
            continue
        try:
            doomed = folder.rename(folder.with_name(folder.name + PARTIAL))  # never seen half deleted
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("the superfluous checkpoint %s cannot be deleted: %s", folder, error)
