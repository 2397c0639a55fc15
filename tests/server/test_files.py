"""Files uploaded, listed, read back and deleted with OpenAI's client; what is wrong is named with its line."""

import httpx
import openai
import pytest

from tests.server.jobs import jsonl, upload

ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "two"}]},
]
PAIRS = [{"prompt": "one and ", "completion": "two"}, {"prompt": "a", "completion": "b"}]


@pytest.fixture(scope="module")
def small(serving):
    """A server that takes files of at most 2000 bytes."""
    with serving(max_file_bytes=2000) as server, server.client() as client:
        yield server, client


@pytest.mark.parametrize("rows", [ROWS, PAIRS])
def test_a_file_is_given_back_as_it_came(client, rows):
    content = jsonl(rows)
    file = upload(client, content, "folder/some rows.jsonl")
    assert file.id.startswith("file-") and file.filename == "some rows.jsonl"
    assert (file.object, file.purpose, file.bytes, file.status) == ("file", "fine-tune", len(content), "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.list(limit=1).data == [file]
    gone = client.files.delete(file.id)
    assert (gone.id, gone.deleted) == (file.id, True)
    for action in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            action(file.id)


def test_lists_have_pages(serving):
    with serving() as server, server.client() as client:
        ids = [upload(client, jsonl(ROWS), f"{number}.jsonl").id for number in range(5)]
        page = client.files.list(limit=2)
        assert [each.id for each in page.data] == [ids[4], ids[3]] and page.has_more
        page = page.get_next_page()
        assert [each.id for each in page.data] == [ids[2], ids[1]] and page.has_more
        page = page.get_next_page()
        assert [each.id for each in page.data] == [ids[0]] and not page.has_more
        assert [each.id for each in client.files.list(limit=3)] == ids[::-1]
        assert [each.id for each in client.files.list(order="asc", after=ids[2])] == ids[3:]
        assert list(client.files.list(purpose="assistants")) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("after=ghost", "after"), ("order=up", "order"), ("lmit=1", "lmit")],
)
def test_wrong_queries_are_refused(server, query, param):
    answer = httpx.get(f"{server.url}/v1/files?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([b'{"prompt": "a", "completion": "b"}', b'{"prompt": "a"'], ["rows.jsonl, line 2: not valid JSON"]),
        ([b'{"prompt": "a", "completion": ""}'], ["line 1: completion is empty"]),
        ([b"", b'{"prompt": "a", "answer": "b"}'], ["line 2: unknown key 'answer'"]),
        ([b'{"messages": [{"role": "king", "content": "b"}]}'], ["line 1: message 1 has the role 'king'"]),
        ([b'{"messages": [{"role": "user", "content": "b"}]}'], ["line 1: no trained token"]),
        ([b'{"prompt": "\xff", "completion": "b"}', b"[]"], ["line 1: not UTF-8", "line 2: a row must be an object"]),
        ([b""], ["rows.jsonl holds no rows"]),
    ],
)
def test_bad_rows_are_named_by_their_line(client, server, lines, words):
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, b"\n".join(lines) + b"\n")
    assert caught.value.param == "file" and all(each in str(caught.value) for each in words)
    assert server.config.data_dir not in str(caught.value), "where the server keeps things is its own"


def test_refused_files_leave_nothing(small):
    server, client = small
    before = {file.id for file in client.files.list()}
    with pytest.raises(openai.BadRequestError):
        upload(client, b"nonsense")
    for length in (2001, 400_000):
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, b"x" * length)
        assert caught.value.status_code == 413 and "max_file_bytes" in caught.value.message
    assert {file.id for file in client.files.list()} == before
    assert {file.name for file in (server.service.folder.root / "files").iterdir()} == before


def form(server, *, data=None, files=None, **settings) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/files", data=data, files=files, timeout=20, **settings)


def test_forms_that_are_wrong_are_refused(server):
    file = {"file": ("a.jsonl", jsonl(PAIRS))}
    wrong = [
        (form(server, data={"purpose": "batch"}, files=file), 400, "purpose"),
        (form(server, files=file), 400, "purpose"),
        (form(server, data={"purpose": "fine-tune", "purpse": "x"}, files=file), 400, "purpse"),
        (form(server, data={"purpose": "fine-tune"}, files={"fle": ("a", b"a")}), 400, "file"),
        (form(server, files={"file": ("a\nb", jsonl(PAIRS))}, data={"purpose": "x"}), 400, "purpose"),
    ]
    for answer, status, param in wrong:
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert httpx.post(f"{server.url}/v1/files", json={"purpose": "fine-tune"}).status_code == 415


def test_torn_forms_are_refused(server):
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"prompt"'
    for kind in ("multipart/form-data; boundary=b", "multipart/form-data", "x; boundary=b"):
        answer = httpx.post(f"{server.url}/v1/files", content=head, headers={"Content-Type": kind}, timeout=20)
        assert answer.status_code in (400, 415), answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/health").status_code == 200
