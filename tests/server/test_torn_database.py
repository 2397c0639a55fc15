"""A database that lost its end with the power: what is there is the beginning of what was acknowledged, in whole
transactions; or the file is refused."""

import random
import shutil

import pytest

from flexjax.fields import ConfigError
from flexjax.server.store import Store
from tests.server.fault_record import TRIES, note

TRANSACTIONS, ROWS = 40, 3


def fill(store: Store, first: int, last: int) -> None:
    for number in range(first, last):
        with store.writing():
            for row in range(ROWS):
                name = f"{number}-{row}"
                fields = {"id": name, "created": number, "filename": name * 9, "purpose": "fine-tune", "bytes": 1}
                assert store.add("files", **fields, rows=1)


def names(count: int) -> list[str]:
    return [f"{number}-{row}" for number in range(count) for row in range(ROWS)]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """The files of a database whose process is killed now: most of it is still in the log."""
    folder = tmp_path_factory.mktemp("crashed")
    store = Store(folder / "live")
    fill(store, 0, TRANSACTIONS)
    shutil.copy(folder / "live", folder / "state"), shutil.copy(folder / "live-wal", folder / "state-wal")
    store.close()
    return folder


def copy_of(crashed, folder):
    for name in ("state", "state-wal"):
        shutil.copy(crashed / name, folder / name)
    return folder / "state", folder / "state-wal"


def test_a_killed_process_has_lost_nothing(crashed, tmp_path):
    path, _ = copy_of(crashed, tmp_path)
    store = Store(path)
    assert [row["id"] for row in store.rows("files", {})] == names(TRANSACTIONS)
    store.close()


@pytest.mark.parametrize("seed", range(10 * TRIES))
@pytest.mark.parametrize("damage", ["shorter", "flipped"])
def test_a_torn_log_gives_back_a_beginning(crashed, tmp_path, damage, seed):
    path, log = copy_of(crashed, tmp_path)
    content, turn = bytearray(log.read_bytes()), random.Random(seed)
    place = turn.randrange(32, len(content))
    if damage == "shorter":
        del content[place:]
    else:
        content[place] ^= 1 << turn.randrange(8)
    log.write_bytes(content)
    try:
        store = Store(path)
    except ConfigError as error:
        assert "no such table" not in str(error)
        note("torn log", damage=damage, seed=seed, transactions=-1)
        return
    found = [row["id"] for row in store.rows("files", {})]
    assert found == names(len(found) // ROWS), "a transaction is there in part, or one behind one that is lost"
    fill(store, TRANSACTIONS, TRANSACTIONS + 1)
    store.close()
    note("torn log", damage=damage, seed=seed, transactions=len(found) // ROWS)


@pytest.mark.parametrize("seed", range(5 * TRIES))
def test_a_database_that_has_lost_its_end_is_refused(tmp_path, seed):
    store = Store(tmp_path / "state")
    fill(store, 0, TRANSACTIONS)
    store.close()  # the log is now in the file
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[: random.Random(seed).randrange(1, len(content))])
    with pytest.raises(ConfigError, match="move it away"):
        Store(tmp_path / "state")
    note("torn database", seed=seed)
