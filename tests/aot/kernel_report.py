"""What ptxas and Mosaic say of the kernels that a compilation makes, read from what they write into a folder."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block of an H100 can have."""

BARRIER_BYTES = 8
COMPLAINTS = re.compile(r"serialized|Potential Performance Loss|warning|error", re.IGNORECASE)


@dataclass(frozen=True)
class Report:
    """One kernel.

    Attributes:
        registers: of a thread. spilled_bytes: written to and read from local memory by a thread.
        shared_bytes: of a block, barriers included.
        complaints: lines in which ptxas warns.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    complaints: tuple[str, ...]


def dump_into(folder: Path) -> dict[str, str]:
    """Environment variables that make Mosaic write there. It reads them at each compilation; a kernel that this
    process compiled before is not compiled again and leaves nothing."""
    return {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1", "MOSAIC_GPU_DUMP_TO": os.fspath(folder)}


def read_reports(folder: Path) -> list[Report]:
    return [read_report(path) for path in sorted(folder.glob("*.ptxas"))]


def read_report(path: Path) -> Report:
    """``path``: NAME.ptxas, beside which NAME.resources.txt lies."""
    text, resources = path.read_text(), path.with_name(f"{path.stem}.resources.txt").read_text()
    stored, loaded = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
    scratch = re.search(r"smem_scratch_bytes=(\d+)", resources)
    barriers = sum(int(each) * int(times) for each, times in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources))
    return Report(
        name=path.stem,
        registers=int(re.search(r"Used (\d+) registers", text)[1]),
        spilled_bytes=int(stored) + int(loaded),
        shared_bytes=int(scratch[1]) + BARRIER_BYTES * barriers,
        complaints=tuple(line for line in text.splitlines() if COMPLAINTS.search(line)),
    )
