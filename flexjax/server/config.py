"""ServerConfig: the [server] table, what the HTTP service may take and where it keeps things."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flexjax.config import PATH, from_table
from flexjax.fields import ConfigError, check_range, check_types
from flexjax.server.owner_limits import OwnerLimits

GOOD_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True)
class ServerConfig:
    """Attributes:
    host, port: address to listen on; port 0 takes a free one.
    api_keys: keys of the operator; with these or with others, clients without a key get status 401.
    api_keys_file: text with an owner and a key on each line; "" is none.
    allowed_origins: sites, as "https://chat.example.org", whose pages may use the service from a browser; "*" is all.
    data_dir: folder of the service: its database, uploaded files, what jobs leave. One server at a time uses it.
    adapter_dir: folder from which clients may load adapters, owners of ``api_keys_file`` from the folder of their name
        in it; None is ``adapters`` in the data folder.
    max_queue: sequences that may wait for a row; a request beyond them is refused with status 429.
    requests_per_minute, tokens_per_minute: of each owner, 0 is no limit; what goes beyond is refused with status 429.
        Requests are those that have the server work; tokens are of prompts and answers.
    max_sequences, max_unfinished_jobs, max_total_file_bytes, best_priority, max_job_weight: of each owner, who has no
        other in its table (see `OwnerLimits`).
    owners: tables of owners of ``api_keys_file``, with fields of `OwnerLimits`.
    max_checkpoints: of each job that are kept as models, the newest; 0 keeps all.
    max_body_bytes: largest body of a request; max_file_bytes: of an upload.
    drain_seconds: that running requests have to end, once the service is told to stop.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_keys_file: str = field(default="", metadata=PATH)
    allowed_origins: tuple[str, ...] = ()
    data_dir: str = field(default="runs/service", metadata=PATH)
    adapter_dir: str | None = field(default=None, metadata=PATH)
    max_queue: int = 1024
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_sequences: int = 0
    max_unfinished_jobs: int = 0
    max_total_file_bytes: int = 0
    best_priority: int | None = None
    max_job_weight: float = 0.0
    owners: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_checkpoints: int = 64
    max_body_bytes: int = 8 * 2**20
    max_file_bytes: int = 512 * 2**20
    drain_seconds: float = 30.0

    def __post_init__(self):
        check_types(self)
        check_range(self, "port", 0, 65535)
        for name in ("max_queue", "requests_per_minute", "tokens_per_minute", "max_checkpoints"):
            check_range(self, name, 0)
        for name in ("max_body_bytes", "max_file_bytes"):
            check_range(self, name, 1)
        check_range(self, "drain_seconds", 0.0)
        for each in self.allowed_origins:
            if not GOOD_ORIGIN.fullmatch(each):
                raise ConfigError(f"allowed_origins holds {each!r}; an origin is scheme://host[:port], or *")
        for owner in (None, *self.owners):
            self.limits_of(owner)

    def limits_of(self, owner: str | None) -> OwnerLimits:
        """An owner's; None is one without a table. Raises ConfigError."""
        usual = {each.name: getattr(self, each.name) for each in fields(OwnerLimits)}
        if owner is None:
            return OwnerLimits(**usual)
        own = self.owners[owner]
        if not isinstance(own, Mapping):
            raise ConfigError(f"owners.{owner} is {own!r}; it must be a table")
        return from_table(OwnerLimits, {**usual, **own}, f"owners.{owner}")

    @property
    def adapters(self) -> Path:
        """The folder of `adapter_dir`, decided."""
        return Path(self.adapter_dir if self.adapter_dir is not None else Path(self.data_dir) / "adapters")
