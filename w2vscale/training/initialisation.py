"""What a new run's parameters start from: drawn values, or those of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import Config, ModelConfig, load_config
from w2vscale.config.tree import ARCHITECTURE
from w2vscale.errors import UserError
from w2vscale.interop.importing import form_of, read_model
from w2vscale.optim.canonical import model_shapes


@dataclass(frozen=True)
class Source:
    """A model to start from: its settings, the shapes of its tensors, and each of them whole, fp32, by our names."""

    model: ModelConfig
    vocabulary: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]


def open_source(path: Path, log: Callable[[str], None] = lambda text: None) -> Source:
    """A checkpoint, a folder that Transformers' `save_pretrained` wrote, or fairseq's `.pt` file.

    Raises:
        UserError: it cannot be used.
    """
    form = form_of(path)
    if form is not None:
        model, ctc, state = read_model(path, form, log)
        log(f"starting from {path} ({form})")
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return Source(model, ctc.vocabulary, shapes, state.__getitem__)
    checkpoint = open_checkpoint(path, log)
    checkpoint.require_model()
    log(f"starting from {checkpoint.path}")
    config = checkpoint.config
    return Source(
        config.model,
        config.ctc.vocabulary,
        model_shapes(checkpoint.specs),
        lambda name: checkpoint.tensor(f"model.{name}"),
    )


def with_architecture_of_source(config: Config, stored: Path | None = None) -> Config:
    """Settings of fine-tuning whose model is, in all that its weights depend on, that of `trainer.init_from`.

    Of a run that is continued, `stored` is the settings file: `trainer.init_from` need not be there any more.

    Raises:
        UserError: the checkpoint cannot be used, or the settings do not fit its model.
    """
    if config.trainer.init_from is None:
        return config
    model = load_config(stored).model if stored is not None else open_source(config.trainer.init_from).model
    theirs = model.model_dump(mode="json")
    document = config.model_dump(mode="json")
    document["model"] |= {key: theirs[key] for key in ARCHITECTURE}
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise UserError(f"trainer.init_from={config.trainer.init_from}: {error.errors()[0]['msg']}") from None


def as_baseline(config: Config) -> Config:
    """The same fine-tuning of weights that were never pretrained, so that nothing is frozen."""
    document = config.model_dump(mode="json")
    document["trainer"]["init_from"] = None
    document["ctc"]["freeze_encoder_updates"] = 0
    document["model"]["feature_grad_mult"] = 1.0
    return Config.model_validate(document)


def starting_values(
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    drawn: Iterator[tuple[str, Tensor]],
    log: Callable[[str], None],
) -> Iterator[tuple[str, Tensor]]:
    """Each of `drawn`, or in its place that of `trainer.init_from`, one whole tensor at a time.

    `shapes` are those of `drawn`. The log gets a table of what is taken, missing, of another shape, and not used.

    Raises:
        UserError: tensors are missing there or have other shapes, or the model is another, and `trainer.init_allow`
            does not name them.
    """
    if config.trainer.init_from is None:
        yield from drawn
        return
    source = open_source(config.trainer.init_from, log)
    missing = {name: "is missing" for name in shapes if name not in source.shapes}
    reshaped = {
        name: f"is {list(source.shapes[name])} there and {list(shape)} here"
        for name, shape in shapes.items()
        if name in source.shapes and source.shapes[name] != shape
    }
    theirs = source.model.model_dump(mode="json")
    if config.ctc.vocabulary != source.vocabulary:
        spelled_otherwise = (name for name in shapes if name.startswith("head.") and name not in reshaped | missing)
        reshaped |= dict.fromkeys(spelled_otherwise, "is for another ctc.vocabulary there")
    settings = {
        f"model.{key}": f"is {theirs[key]} there and {value} here"
        for key, value in config.model.model_dump(mode="json").items()
        if key in ARCHITECTURE and theirs[key] != value
    }
    new_head = {name for name in missing if name.startswith("head.")}  # of a model that was only pretrained
    _refuse_unless_allowed(
        settings | reshaped | {name: what for name, what in missing.items() if name not in new_head}, config, log
    )
    unused = {name for name in source.shapes if name not in shapes}
    for line in _table(shapes, missing=set(missing), reshaped=set(reshaped), unused=unused):
        log(line)
    for name, problem in (reshaped | missing).items():
        log(f"drawn anew: {name} {problem}")
    for name, value in drawn:
        taken = name not in missing and name not in reshaped
        yield name, source.tensor(name) if taken else value


def _refuse_unless_allowed(problems: Mapping[str, str], config: Config, log: Callable[[str], None]) -> None:
    allowed = [re.compile(pattern) for pattern in config.trainer.init_allow]
    refused = [name for name in problems if not any(pattern.search(name) for pattern in allowed)]
    if refused:
        told = "; ".join(f"{name} {problems[name]}" for name in refused[:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"trainer.init_from={config.trainer.init_from}: {told}{more}; if that is meant, name it in "
            "trainer.init_allow"
        )
    for pattern in allowed:
        if not any(map(pattern.search, problems)):
            log(f"warning: trainer.init_allow: {pattern.pattern} matches nothing that is missing or differs")


def _table(names: Iterable[str], *, missing: set[str], reshaped: set[str], unused: set[str]) -> Iterator[str]:
    """How many tensors of each module are taken, missing, of another shape, and not used."""
    counts: dict[str, list[int]] = {}
    for name in (*names, *sorted(unused)):
        parts = name.split(".")
        row = counts.setdefault(".".join(parts[: 1 + (parts[0] == "encoder")]), [0] * 4)
        row[1 if name in missing else 2 if name in reshaped else 3 if name in unused else 0] += 1
    width = max(map(len, counts))
    yield f"{'tensors of':{width}}  taken  missing  other shape  not used"
    for module, (taken, absent, other, left) in counts.items():
        yield f"{module:{width}}  {taken:5}  {absent:7}  {other:11}  {left:8}"
