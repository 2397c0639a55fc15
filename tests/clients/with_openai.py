"""Everything that an application does with OpenAI's client, from a chat to a model of its own. Knows no flexjax.

    python with_openai.py < TASK.json          (a Python with openai 2 or 3)
"""

import json
import sys
import time

import openai

GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
FINAL = ("succeeded", "failed", "cancelled")


def said(client: openai.OpenAI, model: str, task: dict) -> str:
    messages = [{"role": "user", "content": task["prompt"]}]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=task["tokens"], **GREEDY
    )
    return answer.choices[0].message.content


def chats(client: openai.OpenAI, task: dict) -> dict:
    """A chat at once and as a stream, both with log-probabilities."""
    messages = [{"role": "user", "content": task["prompt"]}]
    body = {"model": task["model"], "messages": messages, "logprobs": True, "top_logprobs": 2, **GREEDY}
    body["max_completion_tokens"] = task["tokens"]
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **body))
    spoken = [chunk.choices[0] for chunk in chunks if chunk.choices]
    (choice,) = whole.choices
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
        "bytes": [each.bytes for each in choice.logprobs.content],
        "logprobs": [each.logprob for each in choice.logprobs.content],
        "top": [max(top.logprob for top in each.top_logprobs) for each in choice.logprobs.content],
        "chunks": len(chunks),
        "streamed_text": "".join(each.delta.content or "" for each in spoken),
        "streamed_logprobs": [e.logprob for each in spoken if each.logprobs for e in each.logprobs.content],
        "streamed_finish_reason": spoken[-1].finish_reason,
        "streamed_usage": [chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens],
    }


def completions(client: openai.OpenAI, task: dict) -> dict:
    body = {"model": task["model"], "max_tokens": task["tokens"], "logprobs": 2, **GREEDY}
    echoed = client.completions.create(prompt=task["prompt"], echo=True, **body)
    both = client.completions.create(prompt=[task["prompt"], task["other"]], **body)
    return {
        "echo": echoed.choices[0].text,
        "logprobs": echoed.choices[0].logprobs.token_logprobs,
        "texts": [each.text for each in both.choices],
        "usage": [both.usage.prompt_tokens, both.usage.completion_tokens],
    }


def files(client: openai.OpenAI, task: dict) -> dict:
    content = task["rows"].encode()
    kept = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    spare = client.files.create(file=("spare.jsonl", content), purpose="fine-tune")
    before = [each.id for each in client.files.list()]
    deleted = client.files.delete(spare.id)
    return {
        "id": kept.id,
        "same": client.files.content(kept.id).read() == content and kept.bytes == len(content),
        "listed": kept.id in before and spare.id in before,
        "deleted": deleted.deleted and spare.id not in [each.id for each in client.files.list()],
        "refusal": refusal(lambda: client.files.create(file=("bad.jsonl", b"{}\nnope\n"), purpose="fine-tune")),
    }


def refusal(action) -> list:
    """The error's class, status and message."""
    try:
        action()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.message]
    return []


def waited(client: openai.OpenAI, job: str, states: tuple[str, ...]):
    deadline = time.monotonic() + 120
    while (found := client.fine_tuning.jobs.retrieve(job)).status not in states:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job} is {found.status}, not {states}")
        time.sleep(0.05)
    return found


def count_events(client: openai.OpenAI, job: str) -> int:
    return len(list(client.fine_tuning.jobs.list_events(job, limit=100)))


def wait_for_events(client: openai.OpenAI, job: str, count: int) -> int:
    """How many there are, once there are at least so many."""
    deadline = time.monotonic() + 120
    while (found := count_events(client, job)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job} has told of {found} events, not of {count}")
        time.sleep(0.05)
    return found


def steady_events(client: openai.OpenAI, job: str) -> int:
    """How many there are, once no more come: steps that were under way may still be told."""
    deadline, found = time.monotonic() + 120, -1
    while found != (found := count_events(client, job)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job} goes on telling events: {found}")
        time.sleep(1.0)
    return found


def create(client: openai.OpenAI, task: dict, file: str, **more):
    method = {"type": "supervised", "supervised": {"hyperparameters": {**task["hyperparameters"], **more}}}
    return client.fine_tuning.jobs.create(model=task["model"], training_file=file, method=method, seed=7, suffix="mine")


def steered_job(client: openai.OpenAI, task: dict, file: str) -> dict:
    """A job that would not end, paused, resumed and cancelled."""
    jobs = client.fine_tuning.jobs
    job = create(client, task, file, n_epochs=100_000).id
    waited(client, job, ("running",))
    wait_for_events(client, job, 5)
    statuses = [jobs.pause(job).status]
    events = [steady_events(client, job)]
    time.sleep(1.0)
    events.append(count_events(client, job))
    statuses.append(jobs.resume(job).status)
    events.append(wait_for_events(client, job, events[-1] + 5))
    statuses.append(jobs.cancel(job).status)
    return {"statuses": statuses, "events": events, "again": refusal(lambda: jobs.pause(job))}


def tuned(client: openai.OpenAI, task: dict, file: str) -> dict:
    """A job from its rows to answers of what it made, and the end of that."""
    jobs = client.fine_tuning.jobs
    done = waited(client, create(client, task, file, n_epochs=2).id, FINAL)
    model = done.fine_tuned_model
    events = list(jobs.list_events(done.id, limit=3))[::-1]
    checkpoints = list(jobs.checkpoints.list(done.id))
    names = [each.fine_tuned_model_checkpoint for each in checkpoints]
    return {
        "status": done.status,
        "model": model,
        "parent": getattr(client.models.retrieve(model), "parent", None),
        "listed": done.id in [each.id for each in jobs.list()],
        "steps": [each.data["step"] for each in events if each.data and "train_loss" in each.data],
        "losses": [each.data["train_loss"] for each in events if each.data and "train_loss" in each.data],
        "checkpoints": {each.step_number: each.fine_tuned_model_checkpoint for each in checkpoints},
        "results": client.files.content(done.result_files[0]).text.splitlines()[0],
        "text": said(client, model, task),
        "checkpoint_texts": {name: said(client, name, task) for name in names},
    }


def deleted(client: openai.OpenAI, task: dict) -> dict:
    """A model is deleted, and asked for afterwards."""
    model = task["delete"]
    answer = client.models.delete(model)
    gone = model not in [each.id for each in client.models.list()]
    asked = lambda: client.completions.create(model=model, prompt="a", max_tokens=1)
    return {"deleted": answer.deleted and gone, "refusal": refusal(asked)}


def everything(client: openai.OpenAI, task: dict) -> dict:
    found = {"chat": chats(client, task), "completions": completions(client, task), "files": files(client, task)}
    file = found["files"]["id"]
    return found | {"steered": steered_job(client, task, file), "tuned": tuned(client, task, file)}


def main() -> None:
    """A task with "delete" deletes that model; any other does everything else."""
    task = json.load(sys.stdin)
    with openai.OpenAI(base_url=task["url"], api_key=task["key"], max_retries=0, timeout=120) as client:
        found = deleted(client, task) if "delete" in task else everything(client, task)
    print(json.dumps({"version": openai.__version__, **found}))


if __name__ == "__main__":
    main()
