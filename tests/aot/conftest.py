"""What compilations for an H100 need: the compiler's plugin, and a folder for what it says of each kernel."""

import importlib.util

import pytest

from tests.aot.kernel_report import dump_into


@pytest.fixture(autouse=True, scope="session")
def plugin():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("compiling for an H100 needs jax's CUDA plugin: make test-aot installs it into .venv-aot")


@pytest.fixture
def reports(monkeypatch, tmp_path):
    """Folder that kernels compiled by this test leave their reports in."""
    for name, value in dump_into(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path
