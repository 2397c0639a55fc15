"""A device that fails with the weights in its hands: clients are told, the process ends with a status that has it
started again, and the next one goes on with the job."""

import re

import httpx
import openai
import pytest

from tests.server.jobs import FAST, PROMPT, ROWS, create, ended, jsonl, upload
from tests.server.processes import adapter_bytes, served, write_config

JOB = {**FAST, "batch_size": 4, "max_steps": 100, "checkpoint_every": 20, "schedule": "constant"}
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}


def test_a_device_that_fails_ends_the_process_and_its_job_goes_on_in_the_next(tmp_path, compilation_cache):
    config = write_config(tmp_path, compilation_cache)
    with served(config, module="tests.server.broken_device") as (process, client):
        patient = client.with_options(max_retries=0)
        job = create(client, upload(client, jsonl(ROWS)).id, JOB, seed=5).id
        ends = set()
        while True:
            try:
                chunks = list(patient.completions.create(stream=True, **LONG))
                ends.add(chunks[-1].choices[0].finish_reason)
            except openai.APIConnectionError:
                break  # it is gone
            except openai.APIError as error:
                ends.add(error.code)
        assert process.wait(60) == 1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{client.base_url}models")
    log = config.with_name("log").read_text()
    assert "the engine has failed, the service stops: what writes adapters failed on the device" in log
    assert "start the service again" in log
    assert ends <= {"length", "internal_error", "engine_stopped"} and ends & {"internal_error", "engine_stopped"}
    with served(config) as (_, client):
        done = ended(client, job)
        assert done.status == "succeeded", done.error
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job, limit=1000)]
        assert any(re.search("goes on after step (40|60)", message) for message in messages)
        whole = ended(client, create(client, done.training_file, JOB, seed=5).id)
    assert adapter_bytes(config, done.fine_tuned_model) == adapter_bytes(config, whole.fine_tuned_model)
