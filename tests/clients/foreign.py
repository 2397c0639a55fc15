"""Clients in environments of their own: a script of this folder is run by their Python and says in JSON what it saw."""

import json
import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OMP_NUM_THREADS": "1",
}
"""None of them shall look for anything beyond this machine."""

SECONDS = 300


ENVIRONMENTS = os.environ.get("FLEXJAX_CLIENTS")
"""Folder with an environment for each client, by its name."""


def needs(client: str) -> pytest.MarkDecorator:
    """Skips a test, before it starts a server, where there are no such environments."""
    reason = f"FLEXJAX_CLIENTS names no folder with an environment for {client}: see make test-clients"
    return pytest.mark.skipif(not ENVIRONMENTS, reason=reason)


def drive(client: str, script: str, task: dict) -> dict:
    """Run a script with the client's Python.

    Args:
        task: what it is given on its standard input, as JSON.

    Returns:
        The last line that it printed; "version" is the client's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET
    command, said = [str(Path(ENVIRONMENTS, client, "bin", "python")), str(FOLDER / script)], json.dumps(task)
    options = {"capture_output": True, "text": True, "timeout": SECONDS}
    done = subprocess.run(command, input=said, env=environment, **options)
    assert done.returncode == 0, f"{script} with {client}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(done.stdout.splitlines()[-1])
