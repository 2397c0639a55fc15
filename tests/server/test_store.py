"""The database: what is kept, in which order it is given, and which files are refused."""

import sqlite3

import pytest

from flexjax.fields import ConfigError
from flexjax.server.data_folder import DataFolder
from flexjax.server.store import MIGRATIONS, SCHEMA, VERSION, Store, new_id


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.sqlite"


@pytest.fixture
def store(path):
    store = Store(path)
    yield store
    store.close()


def add(store, name: str, **values) -> bool:
    row = {"created": 1, "filename": name, "purpose": "fine-tune", "bytes": 3, "rows": 1}
    return store.add("files", id=f"file-{name}", **{**row, **values})


def names(rows) -> list[str]:
    return [row["filename"] for row in rows]


def test_rows_come_in_the_order_in_which_they_were_added(store):
    for name in "bca":
        assert add(store, name)
    assert names(store.rows("files", {})) == ["b", "c", "a"]
    assert names(store.rows("files", {}, newest_first=True, limit=2)) == ["a", "c"]
    last = store.find("files", id="file-c")["seq"]
    assert names(store.rows("files", {}, beyond=last)) == ["a"]
    assert names(store.rows("files", {}, beyond=last, newest_first=True)) == ["b"]
    assert store.remove("files", "file-b") and not store.remove("files", "file-b")
    assert add(store, "d") and names(store.rows("files", {"purpose": "fine-tune"})) == ["c", "a", "d"]


def test_a_key_is_kept_once(store):
    event = {"created": 1, "job": "j", "key": "step 1", "level": "info", "message": "", "type": "metrics"}
    assert store.add("events", id="1", **event, data={"step": 1})
    assert not store.add("events", id="2", **event, data={"step": 2})
    assert [row["data"] for row in store.rows("events", {"job": "j"})] == [{"step": 1}]


def test_what_fails_in_the_middle_is_not_written(store):
    with pytest.raises(RuntimeError), store.writing():
        add(store, "a")
        with store.writing():
            add(store, "b")
        raise RuntimeError
    assert store.rows("files", {}) == []


def test_another_connection_sees_what_was_written_before_it_is_closed(store, path):
    with store.writing():
        add(store, "a")
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT filename FROM files").fetchall() == [("a",)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


def test_files_that_are_no_database_of_ours_are_refused(tmp_path):
    (tmp_path / "torn").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(ConfigError, match="cannot be used as the database"):
        Store(tmp_path / "torn")
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(ConfigError, match=f"version 9, and this program knows those up to {VERSION}"):
        Store(tmp_path / "newer")


def test_a_database_from_before_adapters_were_kept_goes_on(path):
    """Written as the second version wrote it."""
    with sqlite3.connect(path) as old:
        old.executescript(f"{SCHEMA}{MIGRATIONS[0]}PRAGMA user_version = 2;")
        old.execute("INSERT INTO files VALUES (1, 'file-a', 5, 'a.jsonl', 'fine-tune', 3, 1, 'ann')")
    old.close()
    row = {"created": 1, "owner": "ann", "name": "x", "path": "p", "folder": "p", "fingerprint": "f"}
    for number in range(2):  # the second time there is nothing to change
        store = Store(path)
        assert [each["id"] for each in store.rows("files", {"owner": "ann"})] == ["file-a"]
        assert store.add("adapters", id=str(number), **row) is (number == 0), "a name is kept once"
        assert store.add("adapters", id=f"bobs-{number}", **{**row, "owner": "bob"}) is (number == 0)
        assert [each["id"] for each in store.rows("adapters", {})] == ["0", "bobs-0"]
        store.close()


def test_a_data_folder_has_one_server(tmp_path):
    first = DataFolder(tmp_path)
    with pytest.raises(ConfigError, match="another server uses"):
        DataFolder(tmp_path)
    first.close()
    DataFolder(tmp_path).close()


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    folder = DataFolder(tmp_path)

    def fail(path):
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError):
        folder.write_file("file-a", fail)
    folder.write_file("file-b", lambda path: path.write_text("whole"))
    assert [each.name for each in (tmp_path / "files").iterdir()] == ["file-b"]
    (tmp_path / "files" / "file-c.partial").write_text("left by a killed process")
    (tmp_path / "files" / "file-d").write_text("never acknowledged")
    (tmp_path / "files" / "mine.txt").write_text("of the folder's owner")
    folder.sweep({"file-b"}, [])
    assert sorted(each.name for each in (tmp_path / "files").iterdir()) == ["file-b", "mine.txt"]
    folder.close()


def test_identifiers_look_like_openais():
    assert len({new_id("file") for _ in range(1000)}) == 1000
    assert new_id("ftjob").startswith("ftjob-") and new_id("ftjob")[6:].isalnum()
