"""Where a model lies: a name that a user gave becomes a path on this machine, downloaded if need be."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

PATTERNS = ["*.json", "*.jinja", "*.safetensors"]
"""Files of a hub repository that are fetched: no pickles, no other frameworks."""


def resolve_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The directory or ``.gguf`` file that a name means.

    Args:
        name_or_path: a directory, a ``.gguf`` file, or a hub name such as ``meta-llama/Llama-3.2-1B``.
        revision: branch, tag or commit of a hub name.

    Raises:
        FileNotFoundError: it reads like a path and nothing is there, or it is a hub name that can be reached neither
            on the network nor in the local cache.
        ValueError: a file that is no ``.gguf``, or a revision for a path.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {path} is a path; only hub names have revisions")
        if path.is_file() and path.suffix != ".gguf":
            raise ValueError(f"model is the file {path}; it must be a directory or a .gguf file")
        return path
    if looks_like_path(str(name_or_path)):
        raise FileNotFoundError(f"model {str(name_or_path)!r} does not exist: no such directory or .gguf file")
    return download(str(name_or_path), revision)


def looks_like_path(name: str) -> bool:
    """Whether a name can be no hub name: hub names are ``owner/model`` or ``model``."""
    return name.startswith((".", "~", os.sep)) or name.endswith((".gguf", os.sep)) or name.count("/") > 1


def download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise ValueError(f"model {name!r} is no path that exists and no valid hub name: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"model {name!r}{at} is no path that exists, is not in the local hub cache and could not be downloaded "
            f"({type(error).__name__}: {first_line(error)}); give a directory or a .gguf file, or allow the network"
        ) from error


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
