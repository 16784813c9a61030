"""Whether a run has nothing left to do. Decided from its folder, without PyTorch, whose import takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2vscale.checkpoint.format import Document, TrainState, committed, damage, read_document, size_problem
from w2vscale.checkpoint.lock import locked
from w2vscale.config import Config, DataConfig, load_config, load_yaml
from w2vscale.data.manifest import Corpus
from w2vscale.errors import UserError
from w2vscale.files import read_text, regular
from w2vscale.loggers.identity import is_undelivered, with_effect
from w2vscale.objectives.settings import effective
from w2vscale.training.early_stopping import describe_end, stopped_early
from w2vscale.training.run_log import RunLog

LARGEST_HEADER = 10**8  # bytes; the limit of the safetensors library


def finished_run(config: Config, exp: Path, log: Callable[[str], None], *, fine_tuned: bool = False) -> str | None:
    """Return a line that says why a run resumed in `exp` would have nothing to do; None if it might have.

    The line is also written to its log.

    It has nothing to do if its newest checkpoint has reached its end (see `reached_end`), was made with the same data
    and settings (but for those that change no update, such as `logging`), and all of its files are there with their
    sizes. Everything else, such as another setting, a damaged checkpoint, one to upload to `checkpoint.store`, or a
    tracking service that lacks something, is left to the run. `fine_tuned`: the architecture in the settings gives way
    to that of the model in `trainer.init_from`.

    Raises UserError if another process uses the folder.
    """
    if config.checkpoint.store is not None or reached_end(config, exp) is None:
        return None
    services = (f"logging.wandb={config.logging.wandb}", f"logging.mlflow={config.logging.mlflow}")
    if any(is_undelivered(exp, service) for service in services):
        return None
    with locked(exp, log):
        try:
            path = committed(exp / "checkpoints")[-1]
            document = read_document(path)
            end = reached_end(config, exp)
            finished = (
                end is not None
                and (exp / "config.yaml").is_file()
                and (exp / "run.sh").is_file()
                and not any(path.parent.glob("replaced_*"))  # a kill has interrupted its last save
                and _is_whole(path, document)
                and _has_settings(path / "config.yaml", config, fine_tuned=fine_tuned)
                and _has_data(document.state, config.data)
            )
        except (UserError, OSError, IndexError):  # the run says what is wrong
            return None
        if not finished:
            return None
        line = (
            f"nothing to do: {end}; all files of {path} are there and have the right sizes (to compare "
            f"checksums: w2vscale checkpoint verify {exp})"
        )
        run_log = RunLog(exp)
        run_log.line(line)
        run_log.open()
    return line


def reached_end(config: Config, exp: Path) -> str | None:
    """Return how the run in `exp` has ended, by its newest checkpoint; None if an update or a validation is left.

    It ends at `trainer.updates`, or earlier by `trainer.early_stopping`.
    """
    with suppress(UserError, OSError):
        for path in committed(exp / "checkpoints")[-1:]:
            state = read_document(path).state
            if config.data.validation and not state.validation:  # a stop signal has prevented it
                return None
            if state.update >= config.trainer.updates:
                return f"the run has reached trainer.updates={config.trainer.updates}"
            if stopped_early(config, state):
                return describe_end(state, config, exp)
    return None


def with_architecture(config: Config, other: Config) -> dict[str, Any]:
    """The settings as plain values, with the architecture of another model."""
    document = config.model_dump(mode="json")
    ours = {"max_frames", *(config.model.model_fields_set & {"waveform_eps"})}  # not part of the architecture
    document["model"] = other.model.model_dump(mode="json") | {key: document["model"][key] for key in ours}
    return document


def _is_whole(path: Path, document: Document) -> bool:
    """Whether the files of a checkpoint are those that it lists, and a run can be resumed from them."""
    tensors = {name for name in document.files if name.endswith(".safetensors")}
    return (
        {file.name for file in path.glob("*.safetensors")} == tensors
        and not any(size_problem(path / name, document.files[name]) for name in tensors)
        and not any(damage(path / name, facts) for name, facts in document.files.items() if name not in tensors)
        and any(_has_optimizer_state(path / name) for name in sorted(tensors))
    )


def _has_optimizer_state(file: Path) -> bool:
    """Whether a safetensors file has any, by its header. Imported and averaged checkpoints have none."""
    with open(file, "rb", opener=regular) as opened:
        size = min(int.from_bytes(opened.read(8), "little"), LARGEST_HEADER)
        try:
            return any(name.startswith("optim.") for name in json.loads(opened.read(size)))
        except (ValueError, RecursionError, TypeError):
            return False


def _has_settings(file: Path, config: Config, *, fine_tuned: bool) -> bool:
    """Whether a config.yaml has all of these settings, and the same values of those that could matter here."""
    stored = load_config(file)
    if fine_tuned and config.trainer.init_from is not None:
        config = Config.model_validate(with_architecture(config, stored))
    before, now = effective(stored), effective(config)
    written = load_yaml(read_text(file)) or {}
    complete = all({*values} <= {*(written.get(section) or {})} for section, values in now.items())
    return complete and before["checkpoint"] == now["checkpoint"] and with_effect(before) == with_effect(now)


def _has_data(state: TrainState, data: DataConfig) -> bool:
    """Whether the manifests of `data.train` still have the content that the checkpoint was trained on."""
    if data.mode == "stream" or not all(isinstance(place, Path) for place in (*data.train, *data.validation)):
        return False
    if data.validation:
        Corpus(data.validation, setting="data.validation", schemes=data.url_schemes)
    corpus = Corpus(data.train, schemes=data.url_schemes)
    return state.data.endswith(f", of manifests {corpus.fingerprint}")
