"""Training from Python, and runs as objects: `w2vscale.train` and `w2vscale.Run`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from w2vscale.checkpoint.format import committed
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_metrics

if TYPE_CHECKING:
    from w2vscale.inference.pretrained import Pretrained
    from w2vscale.training.callbacks import Metrics
    from w2vscale.training.display import Verbosity


class Run:
    """The folder of a run. Reads what is there at each call, so it may be used while the run goes on.

    Raises UserError if `exp` is not the folder of a run.
    """

    def __init__(self, exp: str | os.PathLike[str]) -> None:
        self.exp = Path(exp)
        if not (self.exp / "config.yaml").is_file():
            raise UserError(f"{exp}: not the folder of a run: it has no config.yaml{nearest_path(self.exp)}")

    def __repr__(self) -> str:
        return f"Run({str(self.exp)!r})"

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return load_config(self.exp.absolute())  # not a preset of that name

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, oldest first."""
        return committed(self.exp / "checkpoints")

    @property
    def complete(self) -> bool:
        """Whether no update is left: the newest checkpoint is at `trainer.updates`, or early stopping ended the run."""
        from w2vscale.training.finished import reached_end

        return reached_end(self.config, self.exp) is not None

    def metrics(self, split: str = "train") -> dict[str, list[float | None]]:
        """Return the metrics in columns of equal length, for example for `pandas.DataFrame(run.metrics())`.

        `split`: train, validation, or validation_NAME for the validation set NAME. The column `update` is an integer. A
        value is None where it was not finite or not measured. Empty if there is no such line yet. Raises UserError if
        metrics.jsonl cannot be read, or there is no such split.
        """
        path = self.exp / "metrics.jsonl"
        records = read_metrics(path, split) if path.exists() else []
        if not records:
            known = ("train", "validation", *(f"validation_{name}" for name in self.config.data.validation_sets))
            if split not in known:
                raise UserError(f"{split}: no such split of {self.exp}: choose one of {', '.join(known)}")
        names = dict.fromkeys(name for record in records for name in record if name != "split")
        return {name: [record.get(name) for record in records] for name in names}

    def load(self, *, device: Any = None) -> Pretrained:
        """Load the model of the newest intact checkpoint; see `w2vscale.load`."""
        from w2vscale.inference.pretrained import load

        return load(self.exp, device=device)


def train(
    config: str | os.PathLike[str] | Config,
    *overrides: str,
    exp: str | os.PathLike[str],
    resume: str = "auto",
    verbosity: Verbosity = "normal",
    on_update: Callable[[int, Metrics], object] | None = None,
    on_validation: Callable[[int, Metrics], object] | None = None,
    on_checkpoint: Callable[[int, Path], object] | None = None,
) -> Run:
    """Train in this process, up to `trainer.updates`, or continue the run in the folder `exp`. Return the run.

    `config`: a preset, a YAML file, the folder of a run, or settings; `overrides`: such as "optim.lr=1e-4". `resume`:
    auto, never, or the path of a checkpoint. `verbosity`: quiet, normal or verbose. The functions `on_…` get (update,
    metrics) at each log line and after each validation, and (update, path) after each checkpoint; see
    `training.callbacks.Callbacks`. With several processes, start the script with torchrun.

    Leaves the process as it was: signal handlers, random state and settings of PyTorch. Ctrl-C, or interrupting a
    notebook's cell, saves a checkpoint and returns, and so does `trainer.max_hours`. Then `complete` of the run is
    False, and the same call continues. Raises UserError if a setting, a file or the environment is wrong.
    """
    with _random_state_kept():
        from w2vscale import objectives
        from w2vscale.runtime import StopRequest
        from w2vscale.training.callbacks import Callbacks
        from w2vscale.training.display import Verbosity
        from w2vscale.training.train import train as train_run

        if verbosity not in get_args(Verbosity):
            raise UserError(f"verbosity={verbosity!r}: choose one of {', '.join(get_args(Verbosity))}")
        if not os.fspath(exp):
            raise UserError("exp is empty: name the folder of the run")
        for function in (on_update, on_validation, on_checkpoint):
            if function is not None and not callable(function):
                raise UserError(f"{function!r}: not a function to call")
        if isinstance(config, Config):
            if overrides:
                raise UserError(f"{overrides[0]}: overrides are for a preset or a file; change the settings instead")
        else:
            config, _ = objectives.load(os.fspath(config), overrides)
        callbacks = Callbacks(on_update, on_validation, on_checkpoint)
        with StopRequest() as stop:
            train_run(config, Path(exp), resume=resume, stop=stop, verbosity=verbosity, callbacks=callbacks)
    return Run(exp)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the default generators after the block: dropout seeds PyTorch's, and imports draw from Python's."""
    state = random.getstate()
    import torch

    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
