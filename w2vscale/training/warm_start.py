"""What the parameters of a new run start from: drawn values, or those of another model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from w2vscale.checkpoint.lazy import LazyTensor
from w2vscale.checkpoint.opening import open_on_all_ranks
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.remote import local_model
from w2vscale.config import Config, architecture_of, load_config
from w2vscale.errors import UserError
from w2vscale.interop.importing import form_of, read_model
from w2vscale.objectives import Objective, build_objective
from w2vscale.storage.urls import Url
from w2vscale.training.finished import with_architecture

ENCODER = "encoder."  # prefix of the tensors that every objective shares; the others are heads


@dataclass(frozen=True)
class Source:
    """A model to start from: its settings, and its tensors by our names, fp32."""

    config: Config
    tensors: Mapping[str, LazyTensor]


def open_source(path: Path, log: Callable[[str], None] = lambda text: None) -> Source:
    """Open a checkpoint, a folder that `save_pretrained` of Transformers wrote, or a `.pt` file of fairseq or
    fairseq2. Collective.

    Each rank compares a part of the files of a checkpoint with their checksums. Raises UserError if the source cannot
    be used.
    """
    form = form_of(path)
    if form is not None:
        config, state = read_model(path, form, log)
        log(f"starting from {path} ({form})")
        return Source(config, state)
    checkpoint = open_on_all_ranks(path, log)
    tensors = checkpoint.model_tensors()
    log(f"starting from {checkpoint.path}{': its averaged weights' if checkpoint.has_average else ''}")
    return Source(checkpoint.config, tensors)


def source_config(place: Path | Url) -> Config:
    """The settings of a source, see `open_source`; not collective. Reads no tensor, so damaged values are not noticed.

    What is at a URL is copied to this machine first. Raises UserError if the source cannot be used.
    """
    path = local_model(place)
    form = form_of(path)
    return open_checkpoint(path, hashed=False).config if form is None else read_model(path, form)[0]


def fine_tuning_config(config: Config, *, scratch: bool = False, stored: Path | None = None) -> Config:
    """The settings of a fine-tuning run, with the architecture of the model in `trainer.init_from`.

    `scratch`: the baseline with the same architecture, randomly initialised and with nothing frozen. `stored`: config
    file of the run that is resumed, whose `trainer.init_from` need not exist any more. Raises UserError if the
    objective is not one for fine-tuning, the source cannot be used, or the settings do not fit its model.
    """
    objective = build_objective(config)
    if not objective.vocabulary:
        raise UserError(
            f"objective.name={config.objective.name} has no vocabulary; use a fine-tuning preset such as ctc_1h"
        )
    source = config.trainer.init_from
    if scratch and source is None:
        raise UserError("--scratch needs trainer.init_from: the checkpoint whose architecture is used")
    document = config.model_dump(mode="json")
    if source is not None:
        document = with_architecture(config, load_config(stored) if stored is not None else source_config(source))
    if scratch:
        document["trainer"]["init_from"] = None
        document["objective"] = objective.unfrozen().model_dump(mode="json")
        document["regularization"]["feature_grad_mult"] = 1.0
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise UserError(f"trainer.init_from={source}: {error.errors()[0]['msg']}") from None


def starting_tensors(
    config: Config,
    objective: Objective,
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    log: Callable[[str], None],
) -> dict[str, LazyTensor]:
    """Return the tensors that a new model takes from `trainer.init_from`; the others are initialised. Collective.

    `path` is where `trainer.init_from` is on this machine. `shapes` are those of the new model. Logs a table of what is
    loaded, missing, of another shape, and not used. Heads are initialised if the source was trained for another
    objective. Raises UserError if tensors are missing there or have other shapes, or the architecture differs, and
    `trainer.init_allow` does not name them.
    """
    source = open_source(path, log)
    same_objective = source.config.objective.name == config.objective.name
    # The heads of another objective mean something else, whatever their shapes.
    there = {
        name: tensor.shape for name, tensor in source.tensors.items() if same_objective or name.startswith(ENCODER)
    }
    missing = {name: "is missing" for name in shapes if name not in there}
    reshaped = {
        name: f"is {list(there[name])} there and {list(shape)} here"
        for name, shape in shapes.items()
        if name in there and there[name] != shape
    }
    heads = [name for name in shapes if name in there and not name.startswith(ENCODER)]
    other = _different_head(source, objective) if same_objective else None
    # Shapes show which heads another setting is about; if none does, it is about all.
    if other and not any(name in reshaped for name in heads):
        reshaped |= dict.fromkeys(heads, f"is for another {other} there")
    theirs, ours = architecture_of(source.config.model), architecture_of(config.model)
    settings = {
        f"model.{key}": f"is {theirs[key]} there and {value} here"
        for key, value in ours.items()
        if theirs[key] != value
    }
    expected = {name: what for name, what in missing.items() if same_objective or name.startswith(ENCODER)}
    _refuse_unless_allowed(settings | reshaped | expected, config, log)
    unused = {name for name in source.tensors if name not in shapes or name not in there}
    for line in _table(shapes, missing=set(missing), reshaped=set(reshaped), unused=unused):
        log(line)
    for name, problem in (reshaped | missing).items():
        log(f"newly initialised: {name} {problem}")
    return {name: source.tensors[name] for name in shapes if name not in missing and name not in reshaped}


def _different_head(source: Source, objective: Objective) -> str | None:
    """A setting of the objective that the heads belong to and that differs in the source."""
    theirs, ours = architecture_of(build_objective(source.config).settings), architecture_of(objective.settings)
    return next((f"objective.{key}" for key, value in ours.items() if theirs[key] != value), None)


def _refuse_unless_allowed(problems: Mapping[str, str], config: Config, log: Callable[[str], None]) -> None:
    allowed = [re.compile(pattern) for pattern in config.trainer.init_allow]
    refused = [name for name in problems if not any(pattern.search(name) for pattern in allowed)]
    if refused:
        listed = "; ".join(f"{name} {problems[name]}" for name in refused[:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"trainer.init_from={config.trainer.init_from}: {listed}{more}; use a preset with the architecture of "
            "the source, or the folder of its import, or name what may differ in trainer.init_allow"
        )
    for pattern in allowed:
        if not any(map(pattern.search, problems)):
            log(f"warning: trainer.init_allow: {pattern.pattern} matches nothing that is missing or differs")


def _table(names: Iterable[str], *, missing: set[str], reshaped: set[str], unused: set[str]) -> Iterator[str]:
    """The number of tensors of each module that are loaded, missing, of another shape, and not used."""
    counts: dict[str, list[int]] = {}
    for name in (*names, *sorted(unused)):
        parts = name.split(".")
        row = counts.setdefault(".".join(parts[: 1 + (parts[0] == "encoder")]), [0] * 4)
        row[1 if name in missing else 2 if name in reshaped else 3 if name in unused else 0] += 1
    width = max(map(len, counts))
    yield f"{'tensors of':{width}}  loaded  missing  other shape  not used"
    for module, (loaded, absent, other, left) in counts.items():
        yield f"{module:{width}}  {loaded:6}  {absent:7}  {other:11}  {left:8}"
