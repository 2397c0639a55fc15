"""Where a model lies: paths stay paths, hub names need a network, and every failure says what was asked for."""

import pytest
from huggingface_hub import constants

from flexjax.weights import hub
from flexjax.weights.hub import resolve_model


def test_paths_are_taken_as_they_are(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve_model(tmp_path) == tmp_path and resolve_model(str(file)) == file


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "some/model.gguf", "~/nowhere", "a/b/c"])
def test_a_path_to_nothing_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="does not exist: no such directory or .gguf file"):
        resolve_model(name)


def test_other_misuse(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"must be a directory or a \.gguf file"):
        resolve_model(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="revision is 'main'.*only hub names have revisions"):
        resolve_model(tmp_path, revision="main")
    with pytest.raises(ValueError, match="no valid hub name"):
        resolve_model("owner/--bad..name--")


def test_hub_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'owner/model' at revision 'v1' is no path.*could not be downloaded"):
        resolve_model("owner/model", revision="v1")


def test_hub_name_and_revision_are_passed_on(monkeypatch, tmp_path):
    asked = {}
    download = lambda name, **options: asked.update(options, name=name) or str(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model("owner/model", "v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "v2")
    assert "*.safetensors" in asked["allow_patterns"] and "*.bin" not in asked["allow_patterns"]
