"""Keys and whose they are: what is accepted, what is refused, and that no message holds a key."""

import pytest

from flexjax.fields import ConfigError
from flexjax.server.config import ServerConfig
from flexjax.server.keys import OPERATOR, ApiKeys, read_keys


def keys_of(tmp_path, text: str, *operators: str) -> ApiKeys:
    (tmp_path / "keys").write_text(text)
    return read_keys(ServerConfig(api_keys=operators, api_keys_file=str(tmp_path / "keys")))


def test_without_keys_nobody_is_asked():
    keys = read_keys(ServerConfig())
    assert not keys and keys.owner("anything") is None and keys.summary.startswith("no key is asked for")


def test_a_key_stands_for_its_owner(tmp_path):
    keys = keys_of(tmp_path, "# people\n\nann  sk-1\nbob sk-2\nann sk-3\n", "sk-op")
    found = [keys.owner(key) for key in ("sk-1", "sk-2", "sk-3", "sk-op", "sk-", "SK-1", "", "é")]
    assert found == ["ann", "bob", "ann", OPERATOR, None, None, None, None] and keys
    assert keys.summary == "a key is asked for; there are 4, of 3 owners"


@pytest.mark.parametrize(
    ("text", "operators", "message"),
    [
        ("ann secret more\n", (), "keys line 1: there are 3 words"),
        ("\nann\n", (), "keys line 2: there are 1 words"),
        ("a/b secret\n", (), "keys line 1: the owner must be"),
        (". secret\n", (), "keys line 1: the owner must be .* names a folder of adapter_dir"),
        (".. secret\n", (), "keys line 1: the owner must be"),
        (".hidden secret\n", (), "must not begin with a dot"),
        ("ann.partial secret\n", (), "or end in .partial"),
        ("ann secret\nAnn secret2\n", (), "the owners Ann and ann differ in capitals only"),
        ("ann s\N{LATIN SMALL LETTER E WITH ACUTE}cret\n", (), "keys line 1: a key must be"),
        ("ann secret\nbob secret\n", (), "hold a key twice"),
        ("ann secret\n", ("secret",), "hold a key twice"),
        ("ann secret\n", ("two secret words",), "api_keys number 1: a key must be"),
        ("# nobody\n", (), "holds no key"),
    ],
)
def test_mistakes_are_named_and_keys_are_not(tmp_path, text, operators, message):
    with pytest.raises(ConfigError, match=message) as caught:
        keys_of(tmp_path, text, *operators)
    assert "secret" not in str(caught.value) and "cret" not in repr(ServerConfig(api_keys=("secret",)))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="api_keys_file is .*/ghost, which cannot be read"):
        read_keys(ServerConfig(api_keys_file=str(tmp_path / "ghost")))
