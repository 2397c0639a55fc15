"""litellm: answers whole and streamed, and which of its exceptions a refusal becomes. Knows no flexjax.

    python with_litellm.py < TASK.json          (a Python with litellm)
"""

import json
import sys
from importlib.metadata import version

import litellm

MOST = 100
"""Requests until one must have been refused."""


def answered(task: dict, **body):
    """Of a chat with the server as litellm's "openai" provider."""
    messages = [{"role": "user", "content": task["prompt"]}]
    server = {"api_base": task["url"], "api_key": task["key"], "max_retries": 0}
    usual = {"model": f"openai/{task['model']}", "messages": messages, "max_tokens": task["tokens"], "temperature": 0}
    return litellm.completion(**{**server, **usual, "extra_body": {"ignore_eos": True}, **body})


def refusal(task: dict, **body) -> list:
    """litellm's class for it, the status, the message, and after how many seconds to try again."""
    try:
        answered(task, **body)
    except litellm.exceptions.APIError as error:
        raise RuntimeError("litellm has no class of its own for this") from error
    except Exception as error:  # its exceptions have only OpenAI's as their common ancestors
        if getattr(error, "status_code", None) is None:
            raise
        headers = getattr(error, "litellm_response_headers", None) or {}
        return [type(error).__name__, error.status_code, str(error), headers.get("retry-after")]
    return []


def refused_at_last(task: dict) -> list:
    """Ask until the owner's requests of this minute are used up."""
    for _ in range(MOST):
        if found := refusal(task, max_tokens=1):
            return found
    return []


def answers(task: dict) -> dict:
    """The same chat whole and streamed."""
    whole = answered(task)
    chunks = list(answered(task, stream=True, stream_options={"include_usage": True}))
    spoken = [chunk.choices[0] for chunk in chunks if chunk.choices]
    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    count = lambda usage: [usage.prompt_tokens, usage.completion_tokens]
    return {
        "text": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": count(whole.usage),
        "streamed_text": "".join(each.delta.content or "" for each in spoken),
        "streamed_finish_reason": [each.finish_reason for each in spoken if each.finish_reason],
        "streamed_usage": count(usages[-1]),
    }


def main() -> None:
    task = json.load(sys.stdin)
    found = answers(task) | {
        "version": version("litellm"),
        "wrong_key": refusal(task, api_key="sk-wrong"),
        "wrong_model": refusal(task, model="openai/ghost"),
        "too_long": refusal(task, messages=[{"role": "user", "content": "a" * 2000}]),
        "wrong_field": refusal(task, temperature=-1),
        "too_many": refused_at_last(task),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
