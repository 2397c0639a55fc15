"""A folder that appears whole or not at all, with a manifest that proves later that no byte of it was lost or changed.

Knows nothing of what the files hold.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""Lies in the folder and gives size and SHA-256 of every other file."""


def publish(unfinished: Path, folder: Path) -> None:
    """Adds the manifest, forces every byte to the disk, and renames the folder to its final name.

    Args:
        unfinished: the filled folder, on the same file system.
        folder: its final name, not in use.

    Raises:
        OSError: something cannot be written.
    """
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    manifest = {path.relative_to(unfinished).as_posix(): _measure(path) for path in files}
    (unfinished / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    unfinished.rename(folder)
    flush(folder.parent)


def fault(folder: Path) -> str | None:
    """What is wrong with the files of a published folder; None if they are those that were written. Reads all bytes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, written in manifest.items():
            found = _measure(folder / name)
            if found["bytes"] != written["bytes"]:
                return f"{name} has {found['bytes']} bytes, {written['bytes']} were written"
            if found != written:
                return f"{name} does not have the checksum that was written"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file it lists cannot be read: {error}"
    return None if manifest else f"{MANIFEST} lists no file"


def _measure(file: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
