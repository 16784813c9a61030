"""The name of a run in a tracking service: made at its first start, and kept in logs/loggers.json."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vscale.checkpoint.format import TrainState
from w2vscale.files import read_text, write_text

FILE = "logs/loggers.json"


@dataclass(frozen=True)
class Identity:
    """Names of a run. After a roll back its curve is another one, so it has another `id` in the same `group`."""

    group: str
    skipped_windows: int
    folder: str  # name of the run folder

    @property
    def id(self) -> str:
        """Unique among all runs of a service."""
        return f"{self.group}-skipped-{self.skipped_windows}" if self.skipped_windows else self.group

    @property
    def title(self) -> str:
        """A name to show."""
        return f"{self.folder} (skipped {self.skipped_windows})" if self.skipped_windows else self.folder


def identity(exp: Path, settings: Mapping[str, Any], state: TrainState) -> Identity:
    """Return the names of the run in `exp`; new ones if it has none, or starts again with other settings.

    Raises UserError if the file cannot be written.
    """
    path, folder = exp / FILE, exp.resolve().name
    checksum = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    with suppress(OSError, ValueError):
        stored = json.loads(read_text(path))
        if state.update or stored["settings"] == checksum:
            return Identity(stored["group"], state.skipped_windows, folder)
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", folder)[:64]
    group = f"{readable}-{uuid.uuid4().hex[:8]}"
    write_text(path, json.dumps({"group": group, "settings": checksum}) + "\n")
    return Identity(group, state.skipped_windows, folder)
