"""Weights & Biases. Its files lie in `wandb/` of the run folder; WANDB_MODE=offline keeps them for `wandb sync`."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from w2vscale.errors import UserError
from w2vscale.loggers.base import RunFacts
from w2vscale.loggers.identity import Identity
from w2vscale.loggers.remote import Service
from w2vscale.loggers.rows import Row
from w2vscale.loggers.wandb_file import last_step


class WandbService(Service):
    """A run of W&B with one step per update. Steps only increase, so it has all up to the last one.

    Raises UserError if wandb is not installed, or there is neither a key nor an offline mode.
    """

    def __init__(self, project: str, facts: RunFacts) -> None:
        self.setting = f"logging.wandb={project}"
        self._project, self._facts = project, facts
        self._wandb = _import()
        self._run: Any = None
        self._last = -1
        self._hooks = sys.exit, sys.excepthook  # wandb replaces them
        self._check_access()

    def open(self, who: Identity) -> None:
        self.close(complete=False)
        folder = os.environ.get("WANDB_DIR") or str(self._facts.exp)
        settings = self._wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, init_timeout=60.0
        )
        self._run = self._wandb.init(
            project=self._project, id=who.id, name=who.title, group=who.group, dir=folder,
            config=_plain(self._facts.settings), reinit="create_new", settings=settings,
            **({} if self._offline else {"resume": "allow"}),
        )  # fmt: skip
        if self._offline:
            id = self._run.id  # in a sweep, the agent has chosen it
            files = (Path(folder) / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")
            self._last = max((last_step(path) for path in files), default=-1)
        else:
            self._last = self._run.starting_step - 1

    def has(self, row: Row) -> bool:
        return row.update <= self._last

    def send(self, row: Row) -> None:
        wandb, values = self._wandb, dict[str, Any]()
        for split, metrics in row.scalars.items():
            values |= {self._facts.tags.of(split, key): value for key, value in metrics.items()}
        values |= {name: wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in row.texts.items()}
        values |= {name: wandb.Image(_opened(png)) for name, png in row.images.items()}
        values |= {
            name: wandb.Audio(audio.waveform_S, sample_rate=audio.sampling_rate) for name, audio in row.audio.items()
        }
        values |= {
            name: wandb.Histogram(np_histogram=(np.asarray(one.counts), np.asarray(one.edges)))
            for name, one in row.histograms.items()
        }
        self._run.log(values, step=row.update, commit=True)

    def close(self, *, complete: bool) -> None:
        run, self._run = self._run, None
        if run is not None:
            # Any other exit code than 0 marks the run as failed, which an interrupted one is not.
            run.finish(exit_code=0)
            sys.exit, sys.excepthook = self._hooks

    def abandon(self) -> None:
        """Cancel the hook with which wandb would wait for the service when the process ends."""
        with suppress(Exception):
            from wandb.sdk import wandb_setup

            connection: Any = wandb_setup.singleton()._connection
            connection._cleanup()

    def _check_access(self) -> None:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        try:
            settings: Any = wandb_setup.singleton().settings
        except ValueError as error:  # a variable WANDB_… has a value that wandb refuses
            raise UserError(f"{self.setting}: wandb refuses its settings: {' '.join(str(error).split())}") from None
        self._offline = settings._offline or settings._noop
        if self._offline:
            return
        try:
            key: Any = wbauth.authenticate_session(
                host=settings.base_url, source="logging.wandb", prompt=False, update_session=False
            )
        except Exception as error:
            raise UserError(f"{self.setting}: {' '.join(str(error).split())}") from None
        if key is None:
            raise UserError(
                f"{self.setting}: no key for {settings.base_url}: run `wandb login`, set WANDB_API_KEY, or log to "
                "files with WANDB_MODE=offline"
            )


def _import() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("logging.wandb: wandb is not installed: pip install 'w2vscale[wandb]'") from None
    return wandb


def _opened(png: bytes) -> Any:
    from PIL import Image

    return Image.open(BytesIO(png))


def _plain(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {section: dict(values) for section, values in settings.items()}
