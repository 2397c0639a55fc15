"""Owners beside one another: each sees, uses and deletes its own, and what is others' is not there."""

import json
import re
import sqlite3
import threading

import httpx
import openai
import pytest

from flexjax.request import SamplingParams
from flexjax.server.store import SCHEMA, Store
from tests.server.conftest import HEADERS
from tests.server.jobs import ROWS, SHORT, create, ended, jsonl, upload

PROMPT = "hello there"
GREEDY = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def job(people):
    """A job of ann's that has succeeded."""
    ann = people["ann"]
    done = ended(ann, create(ann, upload(ann, jsonl(ROWS)).id, SHORT, suffix="anns", seed=3).id)
    assert done.status == "succeeded", done.error
    return done


def post(server, owner: str, action: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body, headers=HEADERS[owner], timeout=30)


def text(engine, adapter: str | None) -> str:
    return engine.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), adapter)[0].text


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer sk-eve", "Basic sk-ann", "sk-ann", "Bearer sk-ann, Bearer sk-bob"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/ghost", "/tokenize", "/health/", "//v1/models"])
def test_without_a_key_there_is_nothing(owned, path, header):
    headers = {} if header is None else {"Authorization": header}
    with httpx.Client() as client:
        answer = client.send(client.build_request("GET", owned.url + path, headers=headers))
    error = answer.json()["error"]
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert error["type"] == "authentication_error" and "sk-" not in error["message"]


def test_the_openai_client_knows_the_refusal(owned):
    with openai.OpenAI(base_url=f"{owned.url}/v1", api_key="sk-eve", max_retries=0) as eve:
        with pytest.raises(openai.AuthenticationError) as caught:
            eve.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics"])
def test_what_watches_the_server_needs_no_key(owned, path):
    assert httpx.get(owned.url + path).status_code == 200


def test_files_are_their_owners(people):
    ann, bob = people["ann"], people["bob"]
    file = upload(ann, jsonl(ROWS), "anns.jsonl").id
    ghost = "file-" + "x" * 24
    assert file in [each.id for each in ann.files.list()] and list(bob.files.list()) == []
    for act in (bob.files.retrieve, bob.files.content, bob.files.delete):
        messages = []
        for identifier in (file, ghost):
            with pytest.raises(openai.NotFoundError) as caught:
                act(identifier)
            messages.append(caught.value.body["message"].replace(identifier, "it"))
        assert messages[0] == messages[1], "what is another's looks like what is not there"
    with pytest.raises(openai.BadRequestError, match="no uploaded file"):
        create(bob, file, SHORT)
    with pytest.raises(openai.BadRequestError, match="which is not in this list"):
        bob.files.list(after=file)
    assert ann.files.content(file).content == jsonl(ROWS) and ann.files.delete(file).deleted


def test_jobs_are_their_owners(people, job):
    ann, bob = people["ann"], people["bob"]
    assert job.id in [each.id for each in ann.fine_tuning.jobs.list()]
    assert list(bob.fine_tuning.jobs.list()) == [] and list(people["operator"].fine_tuning.jobs.list()) == []
    jobs = bob.fine_tuning.jobs
    for act in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as caught:
            act(job.id)
        assert caught.value.code == "fine_tune_not_found"
    (result,) = job.result_files
    assert ann.files.content(result).text.startswith("step,")
    with pytest.raises(openai.NotFoundError):
        bob.files.content(result)


def test_trained_models_and_checkpoints_are_their_owners(owned, people, job):
    ann, bob = people["ann"], people["bob"]
    checkpoint = ann.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    for name in (job.fine_tuned_model, checkpoint):
        said = ann.completions.create(model=name, prompt=PROMPT, **GREEDY)
        assert said.model == name and said.choices[0].text == text(owned.engine, name)
        assert name in [each.id for each in ann.models.list()]
        assert name not in [each.id for each in bob.models.list()]
        file = upload(bob, jsonl(ROWS)).id
        for act in (
            lambda: bob.models.retrieve(name),  # noqa: B023
            lambda: bob.completions.create(model=name, prompt=PROMPT, **GREEDY),  # noqa: B023
            lambda: bob.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}]),  # noqa: B023
            lambda: create(bob, file, SHORT, model=name),  # noqa: B023
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                act()
            assert caught.value.code == "model_not_found"
        body = {"prompt": "a", "model": name}
        asked = [httpx.post(f"{owned.url}/tokenize", json=body, headers=HEADERS[who]) for who in ("ann", "bob")]
        assert [each.status_code for each in asked] == [200, 404]
        assert post(owned, "bob", "unload", lora_name=name).status_code == 404


def test_another_owners_export_cannot_be_loaded_as_ones_own(owned, job):
    """By default the operator loads adapters from the folder where finished models are."""
    name = job.fine_tuned_model
    assert (owned.service.folder.adapter(name) / "adapter_config.json").exists()
    ghost = post(owned, "operator", "load", lora_name="mine", lora_path="ft:ghost")
    for path in (name, f"./{name}", f"poet/../{name}", f"{name}/."):
        refused = post(owned, "operator", "load", lora_name="mine", lora_path=path)
        assert refused.status_code == ghost.status_code == 404 and "There is no folder" in refused.text
    for owner in ("ann", "bob"):
        assert post(owned, owner, "load", lora_name="mine", lora_path=f"../{name}").status_code == 400


def test_an_owner_loads_from_its_own_part_of_the_adapter_folder(owned, people):
    """Ann has a poet, bob a painter, and the operator both."""
    root = owned.config.adapters.resolve()
    if not (link := root / "ann" / "link").is_symlink():
        link.symlink_to(root / "bob" / "painter")
    load = lambda owner, path: post(owned, owner, "load", lora_name="own", lora_path=path)
    message = lambda answer: answer.json()["error"]["message"]
    for path in ("painter", "ann/poet", "bob/painter"):
        refused = load("ann", path)
        assert refused.status_code == 404 and "in the server's adapter_dir/ann" in message(refused)
    for path in ("../bob/painter", "../painter", "../ann/../bob/painter", "..", f"{root}/bob/painter", "link", "/"):
        refused = load("ann", path)
        assert refused.status_code == 400 and "outside the server's adapter_dir/ann" in message(refused)
    for path in ("ann/poet", "bob/painter", "ann", f"{root}/ann/poet", "ghost"):
        refused = load("operator", path)
        assert refused.status_code == 404 and str(root) not in message(refused).replace(path, "")
    for owner, path in (("ann", "poet"), ("ann", f"{root}/ann/poet"), ("operator", "poet")):
        assert load(owner, path).status_code == 200
        said = people[owner].completions.create(model="own", prompt=PROMPT, **GREEDY).choices[0].text
        assert said == text(owned.engine, "house"), "which is a poet"
        assert post(owned, owner, "unload", lora_name="own").status_code == 200
    (root / "ann" / "empty").mkdir(exist_ok=True)
    refused = message(load("ann", "empty"))
    assert "adapter_dir/ann/empty" in refused and str(root) not in refused


def test_two_owners_give_one_name_to_two_adapters(owned, people):
    paths = {"ann": "poet", "bob": "painter"}
    try:
        for owner, path in paths.items():
            assert post(owned, owner, "load", lora_name="own", lora_path=path).status_code == 200
        said = {}
        for owner in paths:
            answer = people[owner].completions.create(model="own", prompt=PROMPT, **GREEDY)
            said[owner] = answer.choices[0].text
            card = people[owner].models.retrieve("own")
            assert answer.model == "own" and (card.root, card.parent) == (paths[owner], "tiny")
        assert said["ann"] == text(owned.engine, "house") != said["bob"] != text(owned.engine, None)
        with pytest.raises(openai.NotFoundError):
            people["operator"].completions.create(model="own", prompt=PROMPT, **GREEDY)
        for name in ("bob\x1fown", "ann\x1fown", "\x1fown", "\x1f"):
            with pytest.raises(openai.NotFoundError):
                people["ann"].completions.create(model=name, prompt=PROMPT, **GREEDY)
        assert post(owned, "bob", "unload", lora_name="own").status_code == 200
        assert people["ann"].completions.create(model="own", prompt=PROMPT, **GREEDY).choices[0].text == said["ann"]
    finally:
        for owner in paths:
            post(owned, owner, "unload", lora_name="own")


def test_adapters_of_the_configuration_are_for_all_and_stay(owned, people):
    for owner, client in people.items():
        assert client.completions.create(model="house", prompt=PROMPT, **GREEDY).choices[0].text == text(
            owned.engine, "house"
        )
        assert {"tiny", "house"} <= {each.id for each in client.models.list()}
        for action, body in (("load", {"lora_path": "painter"}), ("unload", {})):
            refused = post(owned, owner, action, lora_name="house", **body)
            assert refused.status_code == 400 and "the server's configuration" in refused.json()["error"]["message"]


def test_refusals_name_nobody_elses_adapters(owned, job):
    """As the engine words them, quoted names and plain ones."""
    readable, name = owned.service.catalog.readable, job.fine_tuned_model
    assert post(owned, "ann", "load", lora_name="held", lora_path="poet").status_code == 200
    try:
        words = f"adapter 'bob\\x1fmine' finds all 3 places taken by ann\x1fheld, house, {name}; raise max_adapters"
        hidden = "adapter 'mine' finds all 3 places taken by another's, house, another's; raise max_adapters"
        assert readable("bob", words) == hidden
        assert readable("ann", f"taken by ann\x1fheld, {name}") == f"taken by held, {name}"
        gone = readable("bob", "taken by ann\x1funloaded meanwhile, house")
        assert "ann" not in re.findall(r"\w+", gone) and "max_adapters" in gone
        assert "unloaded" not in readable("operator", "taken by bob\x1funloaded, \x1fmine")
    finally:
        post(owned, "ann", "unload", lora_name="held")


def test_requests_of_owners_at_the_same_time_keep_apart(owned, people):
    """Both ask for "own" at once, many times: a wrong adapter would show in the text."""
    paths, said = {"ann": "poet", "bob": "painter"}, {"ann": set(), "bob": set()}
    for owner, path in paths.items():
        assert post(owned, owner, "load", lora_name="own", lora_path=path).status_code == 200

    def ask(owner: str) -> None:
        for _ in range(6):
            answer = people[owner].completions.create(model="own", prompt=PROMPT, n=2, **GREEDY)
            said[owner] |= {choice.text for choice in answer.choices}

    threads = [threading.Thread(target=ask, args=(owner,)) for owner in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for owner in paths:
        post(owned, owner, "unload", lora_name="own")
    assert len(said["ann"]) == len(said["bob"]) == 1 and said["ann"] != said["bob"]


def test_a_database_from_before_there_were_owners_is_the_operators(tmp_path):
    """Written as the first version wrote it."""
    path = tmp_path / "state.sqlite"
    with sqlite3.connect(path) as old:
        old.executescript(f"{SCHEMA}PRAGMA user_version = 1;")
        old.execute("INSERT INTO files VALUES (1, 'file-a', 5, 'a.jsonl', 'fine-tune', 3, 1)")
        request = json.dumps({"model": "tiny"})
        columns = (1, "ftjob-a", 5, "ft:tiny:flexjax::a", request, "succeeded", None, 6, None, 9)
        old.execute(f"INSERT INTO jobs VALUES ({', '.join('?' * len(columns))})", columns)
    old.close()
    for _ in range(2):  # the second time there is nothing to change
        store = Store(path)
        assert [row["id"] for row in store.rows("files", {"owner": ""})] == ["file-a"]
        found = store.find("jobs", owner="")
        assert (found["id"], found["request"], found["trained_tokens"]) == ("ftjob-a", {"model": "tiny"}, 9)
        store.close()


def test_keys_that_are_switched_on_show_the_operator_what_was_there(model, adapter_dir, serving, tmp_path):
    with serving(data_dir=str(tmp_path / "data")) as server, server.client() as client:
        file = upload(client, jsonl(ROWS)).id
    (tmp_path / "keys").write_text("ann sk-ann\n")
    keys = {"api_keys": ("sk-operator",), "api_keys_file": str(tmp_path / "keys")}
    with serving(data_dir=str(tmp_path / "data"), **keys) as server:
        seen = {}
        for owner in ("ann", "operator"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"sk-{owner}", max_retries=0) as client:
                seen[owner] = [each.id for each in client.files.list()]
                upload(client, jsonl(ROWS), f"{owner}.jsonl")
    assert seen == {"ann": [], "operator": [file]}
    with serving(data_dir=str(tmp_path / "data")) as server, server.client() as client:
        assert [each.filename for each in client.files.list()] == ["operator.jsonl", "rows.jsonl"]
