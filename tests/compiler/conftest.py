"""Models of known sizes, from a hand-sized one to Llama-3.1-8B."""

import pytest

from flexjax.models.config import ModelConfig


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return ModelConfig("llama", 32, 16, 24, 3, 4, 2, 4, 1e-5, 10000.0, None, False, False, 256)


@pytest.fixture(scope="session")
def narrow() -> ModelConfig:
    """Two layers whose pages have no room behind the final hidden state."""
    return ModelConfig("llama", 32, 48, 24, 2, 8, 4, 4, 1e-5, 10000.0, None, False, False, 256)


@pytest.fixture(scope="session")
def smollm() -> ModelConfig:
    """SmolLM2-135M."""
    return ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100000.0, None, True, False, 2048)


@pytest.fixture(scope="session")
def llama_8b() -> ModelConfig:
    """Llama-3.1-8B."""
    return ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0, None, False, False, 8192)


@pytest.fixture(scope="session")
def qwen_14b() -> ModelConfig:
    """Qwen2.5-14B."""
    return ModelConfig("qwen2", 152064, 5120, 13824, 48, 40, 8, 128, 1e-6, 1000000.0, None, False, True, 32768)
