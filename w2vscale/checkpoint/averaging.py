"""The mean of several checkpoints of a run, as a checkpoint without optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import committed
from w2vscale.checkpoint.lazy import LazyTensor, counted_reads
from w2vscale.checkpoint.lock import locked
from w2vscale.checkpoint.new_folder import folder_for_one
from w2vscale.checkpoint.reader import CheckpointReader, best_first, open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import architecture_of, dump_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError, counted
from w2vscale.objectives import build_objective
from w2vscale.optim.canonical import model_only


class Averaged(NamedTuple):
    """The checkpoint that was written, and the values of `metric` of those averaged, by update, oldest first."""

    checkpoint: Path
    metric: str  # trainer.best_metric of the newest usable checkpoint
    scores: dict[int, float | None]


def average(
    run: Path,
    output: Path,
    *,
    last: int | None = None,
    best: int | None = None,
    weights: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Averaged:
    """Write `output`/checkpoints/update_… with the mean of the newest `last` or the `best` usable checkpoints of a run.

    The best have the lowest validation metric `trainer.best_metric` (of the newest); of equal ones the earlier.
    Parameters and floating-point buffers are averaged in float64. Other buffers, settings, update and hours seen are
    those of the newest of the checkpoints. Holds one tensor, and its sum in float64. `weights`: take the averaged
    ("ema") or the "raw" weights of each checkpoint, see `CheckpointReader.stored_names`; by default the averaged ones
    if all have them.

    Raises UserError if not exactly one of `last` and `best` is given, there are fewer checkpoints, they are of
    different models or incomplete, or `output` already has checkpoints.
    """
    if (last is None) == (best is None) or not (last or best):
        raise UserError("choose either --last N or --best N")
    folder = folder_for_one(output)
    paths = committed(run / "checkpoints")
    metric = _metric(paths)
    chosen = sorted(_choose(run, paths, last, best, metric, log), key=lambda checkpoint: checkpoint.state.update)
    _require_one_model(chosen)
    newest = chosen[-1]
    scores = {each.state.update: each.state.validation.get(metric) for each in chosen}
    if weights is None and not all(checkpoint.has_average for checkpoint in chosen):
        weights = "raw"
    *_, names = (checkpoint.stored_names(weights) for checkpoint in chosen)
    means = {
        f"model.{own}": LazyTensor.made(newest.specs[name], partial(_mean, name, chosen)) for own, name in names.items()
    }
    which = "weights" if weights == "raw" else newest.describe_weights(weights)
    origin = "; ".join(filter(None, (newest.state.data, f"the mean of the {which} at {_listed(scores)}")))
    state, expected = replace(newest.state, data=origin, validation={}), expected_of(newest.config, optimizer=False)
    with locked(output, log, of_a_run=False):
        folder = folder_for_one(output)  # another process may have written one
        store = CheckpointStore(folder, Ranks(), expected=expected, log=log)
        path = store.save(counted_reads(means, progress), state, dump_config(newest.config))
    return Averaged(path, metric, scores)


def _metric(paths: Sequence[Path]) -> str:
    """Return the setting `trainer.best_metric` of the newest checkpoint whose settings can be read."""
    for path in reversed(paths):
        with suppress(UserError):
            return CheckpointReader(path).config.trainer.best_metric
    return "loss"


def _choose(
    run: Path, paths: Sequence[Path], last: int | None, best: int | None, metric: str, log: Callable[[str], None]
) -> list[CheckpointReader]:
    """Return the newest `last`, or else the `best` usable checkpoints of a run."""
    candidates, kind = paths[::-1], "usable checkpoint"
    if last is None:
        validated = best_first(paths, metric, log)
        if paths and not validated:
            raise UserError(
                f"{run}: none of its {counted(len(paths), 'checkpoint')} has the validation metric {metric} "
                "(trainer.best_metric); use --last N"
            )
        candidates, kind = validated, "usable validated checkpoint"
    count = last or best or 0
    found = list(islice(_usable(candidates, log), count))
    if len(found) < count:
        which = f" ({_listed(each.state.update for each in found)})" if found else ""
        raise UserError(f"{run}: {counted(count, kind)} requested, but it has {len(found)}{which}")
    return found


def _usable(paths: Sequence[Path], log: Callable[[str], None]) -> Iterator[CheckpointReader]:
    for path in paths:
        try:
            yield open_checkpoint(path)
        except UserError as error:
            log(f"skipping unusable checkpoint: {error}")


def _require_one_model(checkpoints: Sequence[CheckpointReader]) -> None:
    """Raise a UserError unless all checkpoints are complete and of one model."""
    first, *others = checkpoints
    ours = _architecture(first)
    for other in others:
        theirs = _architecture(other)
        for key in ours | theirs:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{other.path}: {key} is {theirs.get(key)}, in {first.path.name} it is {ours.get(key)}: "
                    "checkpoints of different models cannot be averaged"
                )
    for checkpoint in checkpoints:
        checkpoint.require_model()


def _architecture(checkpoint: CheckpointReader) -> dict[str, object]:
    """All in which checkpoints of one model agree: settings that its weights depend on, and shapes."""
    sections = {"model": checkpoint.config.model, "objective": build_objective(checkpoint.config).settings}
    return {
        **{f"{name}.{key}": value for name, part in sections.items() for key, value in architecture_of(part).items()},
        **{name: spec.shape for name, spec in model_only(checkpoint.specs).items()},
    }


def _mean(name: str, checkpoints: Sequence[CheckpointReader]) -> Tensor:
    """The mean of a floating-point tensor over several checkpoints, summed in float64; of another the last one's."""
    if not checkpoints[-1].specs[name].dtype.is_floating_point:
        return checkpoints[-1].tensor(name)
    total = checkpoints[0].tensor(name).double()  # not zeros: 0 + -0 is not -0
    for checkpoint in checkpoints[1:]:
        total += checkpoint.tensor(name)
    return total.div_(len(checkpoints)).float()


def _listed(updates: Iterable[int]) -> str:
    """`updates 2, 4`."""
    numbers = sorted(updates)
    return f"update{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
