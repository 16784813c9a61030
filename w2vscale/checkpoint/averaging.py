"""The mean of several checkpoints of a run, as a checkpoint of the model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from w2vscale.analysis.report import read_metrics
from w2vscale.checkpoint.consolidation import whole_tensors
from w2vscale.checkpoint.inspection import Description, describe
from w2vscale.checkpoint.reading import committed, update_of
from w2vscale.checkpoint.shards import StoredTensor
from w2vscale.checkpoint.store import CheckpointStore, folder_for_one
from w2vscale.config import architecture_of, dump_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.objectives import state_shapes as parameter_shapes
from w2vscale.optim.canonical import canonical_shapes

HIGHER_IS_BETTER = {"accuracy"}


@dataclass(frozen=True)
class Averaged:
    """The checkpoint that was written, and the updates it is the mean of, oldest first."""

    checkpoint: Path
    updates: list[int]
    metric: str | None
    figures: Mapping[int, float]
    """The metric at each update, where the best were taken."""


def average(
    run: Path,
    output: Path,
    *,
    last: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Averaged:
    """Write `output`/checkpoints/update_… with the mean weights of a run's `last` or `best` usable checkpoints.

    The best are those with the lowest `metric` (default: loss; of accuracy the highest) of a validation at their
    update, as metrics.jsonl has it; of equal ones the first. Settings, update and hours seen are those of the newest
    that is averaged. Sums are float64. Holds the result, and beside it one tensor.

    Raises:
        UserError: not one of `last` and `best` is given, there are fewer checkpoints, no validation has the metric,
            the checkpoints are of different models, or `output` has checkpoints already.
    """
    count = last if best is None else best
    if not count or (last is not None and (best is not None or metric is not None)):
        raise UserError("choose either --last N or --best N, the latter with --metric FIGURE if it is not the loss")
    folder = folder_for_one(output)
    metric = None if best is None else metric or "loss"
    figures: dict[int, float] = {}
    paths = sorted(committed(run / "checkpoints"), key=update_of)
    if metric is None:
        paths.reverse()
    else:
        figures = _validations(run, metric)
        paths = _best_first(paths, figures, run, metric)
    chosen = _first_usable(paths, count, run, log, validated=metric is not None)
    chosen.sort(key=lambda found: found.checkpoint.state.update)
    tensors = _weights(chosen)
    means: dict[str, Tensor] = {}
    for name, parts in tensors.items():
        means[name] = mean(name, parts)
        if progress is not None:
            progress(len(means), len(tensors))
    newest, updates = chosen[-1], [found.checkpoint.state.update for found in chosen]
    state = newest.checkpoint.state
    origin = "; ".join(filter(None, (state.data, f"the mean of the weights at {_listed(updates)}")))
    weights = canonical_shapes(parameter_shapes(newest.config), optimizer=False)
    path = CheckpointStore(folder, Ranks(), expected=weights, log=log).save(
        means, replace(state, data=origin, validation_loss=None), dump_config(newest.config)
    )
    return Averaged(path, updates, metric, {update: figures[update] for update in updates if update in figures})


def _validations(run: Path, metric: str) -> dict[int, float]:
    """The metric at each update that was validated, where it is finite."""
    records = read_metrics(run / "metrics.jsonl", "validation")
    if not records:
        raise UserError(f"{run}: no validation in its metrics.jsonl; use --last N")
    known = set().union(*records) - {"split", "update"}
    if metric not in known:
        raise UserError(f"--metric {metric}: its validations have {', '.join(sorted(known))}")
    return {record["update"]: record[metric] for record in records if record.get(metric) is not None}


def _best_first(paths: Sequence[Path], figures: Mapping[int, float], run: Path, metric: str) -> list[Path]:
    validated = [path for path in paths if update_of(path) in figures]
    if paths and not validated:
        raise UserError(
            f"{run}: no validation at the updates of its checkpoints ({_listed(map(update_of, paths))}), "
            f"but at {_listed(figures)}; use --last N"
        )
    sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
    return sorted(validated, key=lambda path: sign * figures[update_of(path)])


def _first_usable(
    paths: Sequence[Path], count: int, run: Path, log: Callable[[str], None], *, validated: bool
) -> list[Description]:
    found = list(islice(_usable(paths, log), count))
    if len(found) < count:
        kind = "usable checkpoints with a validation" if validated else "usable checkpoints"
        which = f" ({_listed(sorted(each.checkpoint.state.update for each in found))})" if found else ""
        raise UserError(f"{run}: {count} {kind} are asked for, it has {len(found)}{which}")
    return found


def _usable(paths: Sequence[Path], log: Callable[[str], None]) -> Iterator[Description]:
    for path in paths:
        try:
            yield describe(path)
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")


def _weights(checkpoints: Sequence[Description]) -> dict[str, list[StoredTensor]]:
    """The model's tensors by name, of each checkpoint.

    Raises:
        UserError: the checkpoints are of different models, or a tensor is not whole.
    """
    first, *others = checkpoints
    ours = _architecture(first)
    for other in others:
        theirs = _architecture(other)
        for key in ours | theirs:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{other.checkpoint.path}: {key} is {theirs.get(key)}, in {first.checkpoint.path.name} "
                    f"{ours.get(key)}: different models have no mean"
                )
    for found in checkpoints:
        for name, tensor in found.tensors.items():
            if fault := tensor.fault():
                raise UserError(f"{found.checkpoint.path}: {name}: {fault}")
    names = [name for name in first.tensors if name.startswith("model.")]
    return {name: [found.tensors[name] for found in checkpoints] for name in names}


def _architecture(found: Description) -> dict[str, object]:
    """All in which checkpoints of one model agree: settings that its weights depend on, and shapes."""
    objective = build_objective(found.config)
    return {
        **{f"model.{key}": value for key, value in architecture_of(found.config.model).items()},
        **{f"objective.{key}": value for key, value in architecture_of(objective.settings).items()},
        **{name: tensor.shape for name, tensor in found.tensors.items() if name.startswith("model.")},
    }


def mean(name: str, parts: Sequence[StoredTensor]) -> Tensor:
    """The mean of one tensor over several checkpoints: summed in float64, returned in fp32."""
    wholes = (next(whole_tensors({name: part})).double() for part in parts)
    total = next(wholes)  # not zeros: 0 + -0 is not -0
    for whole in wholes:
        total += whole
    return (total / len(parts)).float()


def _listed(updates: Iterable[int]) -> str:
    """Some updates in words."""
    numbers = [str(update) for update in updates]
    return f"update{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
