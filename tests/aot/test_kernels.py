"""Every kernel at real shapes, compiled for an H100: it fits, spills nothing, and writes in place what is donated."""

import re

import pytest

from tests.aot.hopper import compile_for_h100
from tests.aot.kernel_calls import CALLS
from tests.aot.kernel_report import SHARED_LIMIT, read_reports

SPILLS = {}
"""Bytes that a kernel may spill, by its name, each with its reason beside it; 0 for all others."""

HASH = re.compile(r'kernel_hash = "((?:[^"\\]|\\.)*)"')


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Kernels that this process has compiled; each is compiled, and reported, once."""
    return set()


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kernel_fits_and_writes_in_place(call, reports, seen):
    compiled = compile_for_h100(call.function, *call.arguments, donate=call.in_place)
    kernels = set(HASH.findall(compiled.as_text()))
    assert kernels
    found = read_reports(reports)
    assert len(found) == len(kernels - seen)
    seen |= kernels
    for report in found:
        assert report.spilled_bytes <= SPILLS.get(report.name.rpartition("_")[0], 0), report
        assert report.shared_bytes <= SHARED_LIMIT, report
        assert report.complaints == (), report
    written = sum(call.arguments[i].size * call.arguments[i].dtype.itemsize for i in call.in_place)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == written
    assert memory.temp_size_in_bytes <= call.temporaries
