"""What tests of kernels in the interpreter share: a clean interpreter, and no race left unseen."""

import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call


@pytest.fixture
def no_races(capfd):
    """Fails the test if any kernel it interpreted had a race (the interpreter's own flag remembers the last kernel
    only, its printed reports are complete)."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
