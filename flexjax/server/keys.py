"""ApiKeys: whom the keys of clients stand for. It knows no requests."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from flexjax.config import nearest
from flexjax.fields import ConfigError
from flexjax.server.config import ServerConfig
from flexjax.server.data_folder import PARTIAL

OPERATOR = ""
"""Owner of what is made where no keys are asked for, and of what is made with keys that are given without an owner."""

GOOD_OWNER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
"""It names a folder too."""

GOOD_KEY = re.compile(r"[\x21-\x7e]{1,512}")


class ApiKeys:
    """Only digests of keys are kept. False where there are none, so that nobody is asked for one.

    Args:
        pairs: an owner and a key each; an owner may have several.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self._owners = tuple((digest(key), owner) for owner, key in pairs)

    def __bool__(self) -> bool:
        return bool(self._owners)

    @property
    def owners(self) -> frozenset[str]:
        """Those that are apart from the operator."""
        return frozenset(owner for _, owner in self._owners if owner != OPERATOR)

    @property
    def summary(self) -> str:
        """For whoever starts the server."""
        if not self:
            return "no key is asked for: whoever reaches the address may use it"
        return f"a key is asked for; there are {len(self._owners)}, of {len({name for _, name in self._owners})} owners"

    def owner(self, key: str) -> str | None:
        """Whose key it is; None if it is nobody's. Takes as long whichever key is sent, right or wrong."""
        sent, found = digest(key), None
        for each, owner in self._owners:
            if hmac.compare_digest(each, sent):
                found = owner
        return found


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_keys(config: ServerConfig) -> ApiKeys:
    """The keys of ``api_keys``, which are the operator's, and those of the file ``api_keys_file``.

    Raises:
        ConfigError: the file cannot be read or has a line that is wrong, a key is no key or is there twice, or there is
            none of an owner who has a table. The message has no key in it.
    """
    pairs = [(OPERATOR, checked_key(key, f"api_keys number {place}")) for place, key in enumerate(config.api_keys, 1)]
    if config.api_keys_file:
        pairs += read_file(Path(config.api_keys_file))
    if len({key for _, key in pairs}) < len(pairs):
        raise ConfigError("api_keys and api_keys_file hold a key twice; every key must stand for one owner")
    keys = ApiKeys(pairs)
    for owner in config.owners:
        if owner not in keys.owners:
            hint = nearest(owner, keys.owners)
            raise ConfigError(f"owners.{owner}: api_keys_file has no key of an owner {owner!r}{hint}")
    return keys


def read_file(path: Path) -> list[tuple[str, str]]:
    """Pairs of a file with an owner and a key on each line; empty lines, and such that begin with #, say nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file is {path}, which cannot be read: {error}") from error
    numbered = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    pairs = [pair_of(words, f"{path} line {number}") for number, words in numbered if not words[0].startswith("#")]
    if not pairs:
        raise ConfigError(f"api_keys_file is {path}, which holds no key; it needs a line with an owner and a key")
    require_folders({owner for owner, _ in pairs}, path)
    return pairs


def require_folders(owners: set[str], path: Path) -> None:
    """Raises ConfigError if two owners would have one folder where a file system does not tell their names apart."""
    spelled: dict[str, str] = {}
    for owner in sorted(owners):
        if spelled.setdefault(owner.lower(), owner) != owner:
            raise ConfigError(f"{path}: the owners {spelled[owner.lower()]} and {owner} differ in capitals only")


def pair_of(words: list[str], where: str) -> tuple[str, str]:
    if len(words) != 2:
        raise ConfigError(f"{where}: there are {len(words)} words; it must be an owner and a key")
    owner, key = words
    if not GOOD_OWNER.fullmatch(owner) or owner.endswith(PARTIAL):
        raise ConfigError(
            f"{where}: the owner must be 1 to 64 letters, digits, dots, dashes or underscores, must not begin with a "
            f"dot or end in {PARTIAL}: it names a folder of adapter_dir"
        )
    return owner, checked_key(key, where)


def checked_key(key: str, where: str) -> str:
    if not GOOD_KEY.fullmatch(key):
        raise ConfigError(f"{where}: a key must be 1 to 512 characters of ASCII without spaces")
    return key
