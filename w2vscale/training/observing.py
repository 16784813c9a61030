"""What a run logs besides its metrics: pictures and audio of validation utterances, and histograms of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.deferred import DeferredTensor
from w2vscale.distributed.process_group import errors_on_all_ranks, largest_over_ranks, sum_over_ranks
from w2vscale.errors import UserError
from w2vscale.loggers.base import Histogram
from w2vscale.loggers.fan_out import Loggers, make_loggers
from w2vscale.loggers.identity import identity, note_start
from w2vscale.loggers.rows import read_rows
from w2vscale.objectives import effective
from w2vscale.training.run import Run

SAMPLES = 3  # utterances that are shown
BINS = 64  # of a histogram


def open_loggers(run: Run, log: Callable[[str], None]) -> Loggers:
    """Open the loggers of a run where it begins or continues. Collective.

    Raises UserError on all ranks if one cannot be used.
    """
    with errors_on_all_ranks():
        loggers = make_loggers(run.config, run.objective, run.exp, log, enabled=run.ranks.is_main)
        if run.ranks.is_main:
            _note_start(run, log)
        loggers.begin(run.state, run.config)
    return loggers


def _note_start(run: Run, log: Callable[[str], None]) -> None:
    """Note from where and with which settings a run continues, before the lines of later updates are deleted."""
    lines, settings = read_rows(run.exp) if run.state.update else [], effective(run.config)
    logged = max((line.update for line in lines), default=0)
    cause = note_start(run.exp, settings, run.state, logged=logged, named=run.named)
    if cause is not None and (run.config.logging.wandb, run.config.logging.mlflow) != (None, None):
        log(f"{cause}: W&B and MLflow get them as a new run, {identity(run.exp, settings, run.state).id}")


def is_due(update: int, every: int, *, after: int, last: bool) -> bool:
    """Whether something that is wanted every `every` updates happens at `update`; the chance before was at `after`.

    It does at the first chance at or after each multiple, and at the `last` one. With `every` = 0, never.
    """
    return bool(every) and (last or update // every > after // every)


def log_samples(
    run: Run, loggers: Loggers, batch: MicroBatch | None, update: int, log: Callable[[str], None], *, last: bool
) -> None:
    """Log what the objective shows of a validation micro-batch, drawn on rank 0, if it is due. Collective.

    A picture that cannot be drawn does not end the run: the failure is logged.
    """
    every, trainer, layers = run.config.logging.samples_every, run.config.trainer, run.config.model.layers
    if batch is None or not is_due(update, every, after=max(update - trainer.validate_every, 0), last=last):
        return
    blocks = sorted({one if one > 0 else layers + 1 + one for one in run.config.logging.attention_layers})
    with run.engine.averaged():  # the weights that the validation has evaluated
        details = run.engine.inspect(batch, run.objective, samples=SAMPLES, blocks=blocks)
    if details is None or not run.ranks.is_main or not batch.utterances:
        return
    from w2vscale.loggers.drawing import draw  # matplotlib takes a second

    try:
        picture = draw(details, run.config.model)
    except Exception as error:
        log(f"warning: logging.samples_every: the samples of update {update} cannot be drawn: {error!r}")
        return
    try:
        loggers.show(picture, update)
    except UserError as error:
        log(f"warning: logging.samples_every: {error}")


def log_histograms(run: Run, loggers: Loggers, update: int, *, after: int, last: bool, repeated: bool = False) -> None:
    """Log histograms of some weights, if they are due (see `is_due`). Collective: each rank counts what it holds.

    `repeated`: this was called for the update before, when it was not known to be the last one.
    """
    every = run.config.logging.histograms_every
    if not is_due(update, every, after=after, last=last) or (
        repeated and is_due(update, every, after=after, last=False)
    ):
        return
    for name, own, size in watched(run):
        loggers.histogram(f"weights/{name}", update, histogram(own, size))


def watched(run: Run) -> Iterator[tuple[str, NDArray[np.float32], int]]:
    """Yield name, what this rank holds, and number of elements of some weights: of three blocks, and of the heads.

    Collective.
    """
    pattern = watched_names(run.config)
    for name, tensor in run.engine.export_state().items():
        if pattern.fullmatch(name) and len(tensor.shape) > 1:
            whole: Tensor = tensor.make() if isinstance(tensor, DeferredTensor) else tensor
            own = whole.to_local() if isinstance(whole, DTensor) else whole
            yield name.removeprefix("model."), own.detach().float().cpu().numpy(), tensor.shape.numel()


def watched_names(config: Config) -> re.Pattern[str]:
    """Return which tensors of a checkpoint are watched."""
    layers = config.model.layers
    blocks = "|".join(str(block) for block in sorted({0, layers // 2, layers - 1}))
    return re.compile(
        rf"model\.encoder\.(feature_projection|transformer\.blocks\.({blocks})\.(attention\.qkv|feed_forward\.output))"
        r"\.weight|model\.(?!encoder\.).*"
    )


def histogram(own: NDArray[np.float32], size: int) -> Histogram:
    """Return the histogram of a tensor of `size` elements that is sharded over the ranks. Collective.

    Several ranks may hold the same part, as long as all parts are held equally often.
    """
    finite = own[np.isfinite(own)]
    low, high = largest_over_ranks([-float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))])
    low = -low
    if not low < high:  # constant, or nothing is finite
        low, high = (low - 0.5, low + 0.5) if np.isfinite(low) else (0.0, 1.0)
    edges = np.linspace(low, high, BINS + 1)
    counts, _ = np.histogram(finite, edges)
    values = finite.astype(np.float64)
    own_sums = [*counts.tolist(), float(values.sum()), float(np.square(values).sum()), own.size]
    *sums, held = sum_over_ranks(own_sums)
    *numbers, total, squares = (one * size / held for one in sums)
    return Histogram(tuple(edges.tolist()), tuple(numbers), total, squares)
