"""Every field that the newest openai client can send is known: it does something, is without effect, or is refused by
name."""

import inspect

import pytest
from openai.resources.chat.completions import Completions as Chats
from openai.resources.completions import Completions
from openai.resources.files import Files
from openai.resources.fine_tuning.jobs import Jobs

from flexjax.server import files, fine_tuning
from flexjax.server.job_request import FIELDS
from flexjax.server.protocol import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    OTHER_FIELDS,
    SAMPLING_FIELDS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
)

CLIENTS_OWN = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
GENERATION = {*SAMPLING_FIELDS, *OTHER_FIELDS, *WITHOUT_EFFECT, *UNSUPPORTED}


@pytest.mark.parametrize(
    ("method", "known"),
    [
        (Chats.create, GENERATION | set(CHAT_FIELDS)),
        (Completions.create, GENERATION | set(COMPLETION_FIELDS)),
        (Jobs.create, set(FIELDS)),
        (Jobs.list_events, {*fine_tuning.PAGE, "fine_tuning_job_id"}),
        (Files.create, {*files.UPLOAD_FIELDS, "expires_after"}),
        (Files.list, set(files.PAGE)),
    ],
)
def test_what_the_client_sends_is_known(method, known):
    """``expires_after`` of a file is refused by name, as files stay until they are deleted."""
    assert set(inspect.signature(method).parameters) - CLIENTS_OWN <= known
