"""A run's folder and its parts: data, model, engine, checkpoints, built from the resolved settings."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from w2vscale.checkpoint.reading import Checkpoint, IncompleteState, TrainState, committed, open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, dump_config
from w2vscale.data.augmentation import Augmentation
from w2vscale.data.loading import (
    VALIDATION_SEED,
    MicroBatches,
    TrainingData,
    check_sample,
    make_plan,
    validation_batches,
)
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.randomness import Stream, derived_seed
from w2vscale.distributed.process_group import Ranks, broadcast_from_main
from w2vscale.engine import Engine, build_engine
from w2vscale.errors import UserError
from w2vscale.kernels.precision import CPU_HAS_BF16
from w2vscale.models.build import Wav2Vec2, build_model
from w2vscale.models.initialisation import initial_parameters
from w2vscale.models.layers import compute_dtype
from w2vscale.objectives.objective import Objective, build_objective
from w2vscale.optim.canonical import canonical_shapes
from w2vscale.training.agreement import common_ground, compare_ranks, planned_work
from w2vscale.training.bad_audio import BadAudioLog
from w2vscale.training.initialisation import starting_values


@dataclass
class Run:
    """Everything that the loop works with."""

    config: Config
    exp: Path
    ranks: Ranks
    device: torch.device
    training_set: TrainingData
    validation_set: MicroBatches | None
    objective: Objective
    engine: Engine
    store: CheckpointStore
    bad_audio: BadAudioLog
    state: TrainState

    def windows(self) -> Iterator[list[MicroBatch]]:
        """The windows of this rank from the run's next update to its last."""
        updates = range(self.state.update, self.config.trainer.updates)
        return self.training_set.windows(updates, rank=self.ranks.rank, world_size=self.ranks.world_size)

    def validation(self) -> Iterator[MicroBatch]:
        """The validation set, dealt to the ranks."""
        assert self.validation_set is not None
        return validation_batches(
            self.validation_set, self.config, rank=self.ranks.rank, world_size=self.ranks.world_size
        )

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, or start to. Collective."""
        return self.store.save(self.engine.export_state(), state, dump_config(self.config))


def build_run(
    config: Config, exp: Path, *, ranks: Ranks, device: torch.device, resume: str, log: Callable[[str], None]
) -> Run:
    """Open the data, build model and engine, and take up the newest checkpoint if there is one.

    `resume`: auto (the newest usable checkpoint, or a new run), never (a new run in a folder without
    checkpoints), or the path of a checkpoint.
    """
    training_set, validation_set = open_data(config, ranks)
    model = empty_model(config)
    # Of the model, not of the engine, which may be wrong.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    store = CheckpointStore(
        exp / "checkpoints",
        ranks,
        expected=canonical_shapes(shapes),
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        asynchronous=config.checkpoint.asynchronous,
        log=log,
    )
    checkpoint = _resume_point(resume, store, log)
    if checkpoint is not None:
        _compare_settings(config, checkpoint, log)
        if checkpoint.state.data not in ("", training_set.describe()):
            log(f"data.train has changed: it was {checkpoint.state.data}; it is {training_set.describe()}")
    state = replace(checkpoint.state if checkpoint is not None else TrainState(), data=training_set.describe())
    # Before the engine is built: ranks that build different ones would wait for each other.
    compare_ranks(planned_work(config, state.update) | common_ground(config, training_set.describe()))
    objective = build_objective(config)
    engine = build_engine(model, objective.criterion, config, device)
    if checkpoint is None:
        engine.import_parameters(starting_values(config, shapes, initial_values(config), log))
    else:
        engine.import_state(checkpoint)
        log(f"resumed from {checkpoint.path} at update {checkpoint.state.update}")
    if config.precision.compute == "bf16" and device.type == "cpu" and not CPU_HAS_BF16:
        log("warning: this CPU has no bf16; precision.compute=fp32 is faster here")
    if isinstance(training_set, MicroBatches) and (left_out := training_set.plan.left_out):
        longer = " or longer than data.max_seconds" * bool(config.ctc.vocabulary)
        log(f"{left_out} of {len(training_set.corpus)} utterances are shorter than data.min_seconds{longer}: left out")
    return Run(
        config=config,
        exp=exp,
        ranks=ranks,
        device=device,
        training_set=training_set,
        validation_set=validation_set,
        objective=objective,
        engine=engine,
        store=store,
        bad_audio=BadAudioLog(
            exp,
            ranks,
            limit=config.data.max_bad_fraction,
            enough=min(1000, training_set.utterances or 1000),
        ),
        state=state,
    )


def empty_model(config: Config) -> Wav2Vec2:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return build_model(config.model, config.ctc, compute_dtype(config.precision))


def initial_values(config: Config) -> Iterator[tuple[str, Tensor]]:
    """What a new run's parameters start from, on any engine and number of processes."""
    return initial_parameters(
        empty_model(config), lambda index: derived_seed(config.trainer.seed, Stream.INITIALISATION, index)
    )


def open_data(config: Config, ranks: Ranks) -> tuple[TrainingData, MicroBatches | None]:
    """The training set, and the validation set if the settings name one.

    Raises:
        UserError: a manifest is missing or wrong, or the updates cannot be dealt to the ranks.
    """
    if config.batch.micro_batches % ranks.world_size:
        raise UserError(
            f"batch.micro_batches={config.batch.micro_batches} cannot be dealt to {ranks.world_size} processes: "
            "choose a multiple"
        )
    training_set = open_training_set(config)
    if not config.data.validation:
        return training_set, None
    corpus = _open_corpus(config.data.validation, config, setting="data.validation")
    plan = make_plan(corpus, config, seed=VALIDATION_SEED)
    return training_set, MicroBatches(corpus, plan, config, seed=VALIDATION_SEED)


def open_training_set(config: Config) -> TrainingData:
    """What `data.train` names, read as `data.mode` says."""
    augment = config.augment
    augmentation = Augmentation(config) if augment.speed or augment.reverb or augment.noise else None
    if config.data.mode == "stream":
        # Imported here: Lhotse's samplers take a second, and most runs need none.
        from w2vscale.data.stream import StreamedMicroBatches

        return StreamedMicroBatches(config.data.train, config, augmentation=augmentation)
    corpus = _open_corpus(config.data.train, config, setting="data.train")
    plan = make_plan(corpus, config, seed=config.trainer.seed, mix=config.mix)
    return MicroBatches(corpus, plan, config, seed=config.trainer.seed, augmentation=augmentation)


def _open_corpus(paths: Sequence[Path], config: Config, *, setting: str) -> Corpus:
    corpus = Corpus(paths, setting=setting)
    check_sample(corpus, sampling_rate=config.model.sampling_rate)
    return corpus


def make_folder(exp: Path, config: Config, ranks: Ranks) -> None:
    """Make `exp/` with config.yaml and run.sh, which repeats the command. Collective.

    Raises:
        UserError: the folder cannot be written.
    """
    error = None
    if ranks.is_main:
        try:
            (exp / "logs").mkdir(parents=True, exist_ok=True)
            (exp / "checkpoints").mkdir(exist_ok=True)
            (exp / "config.yaml").write_text(dump_config(config))
            script = exp / "run.sh"
            script.write_text(_run_script(exp))
            script.chmod(0o755)
        except OSError as failure:
            error = f"{exp}: the run's folder cannot be written: {failure.strerror}"
    error = broadcast_from_main(error)
    if error is not None:
        raise UserError(error)


def _run_script(exp: Path) -> str:
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    count = f" --nproc-per-node {processes}" if int(processes) > 1 else ""
    command = f"{shlex.quote(sys.executable)} -m w2vscale train {shlex.quote(str((exp / 'config.yaml').resolve()))}"
    return (
        "#!/usr/bin/env bash\n# Repeats or continues this run.\nset -euo pipefail\n"
        f'cd {shlex.quote(os.getcwd())}\n{command} --exp {shlex.quote(str(exp.resolve()))}{count} "$@"\n'
    )


def _resume_point(resume: str, store: CheckpointStore, log: Callable[[str], None]) -> Checkpoint | None:
    if resume == "auto":
        return store.find(log)
    if resume == "never":
        if committed(store.folder):
            raise UserError(
                f"{store.folder}: holds checkpoints of an earlier run; continue it with --resume auto, "
                "or choose another --exp"
            )
        return None
    return _open_to_resume(Path(resume), log)


def _open_to_resume(path: Path, log: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """The checkpoint at `path`, or the newest in it, that a run can be continued from."""
    try:
        return open_checkpoint(path, log, resuming=True)
    except IncompleteState as error:
        raise UserError(
            f"{error}; resume from an older checkpoint, or start a run from its weights with trainer.init_from={path}, "
            "in another --exp"
        ) from None


def stored_settings(exp: Path, resume: str) -> Path | None:
    """The settings file of the run that would be continued; None for a new run."""
    if resume == "never" or (resume == "auto" and not committed(exp / "checkpoints")):
        return None
    return _open_to_resume(exp if resume == "auto" else Path(resume)).path / "config.yaml"


def _compare_settings(config: Config, checkpoint: Checkpoint, log: Callable[[str], None]) -> None:
    """Another model is an error; other settings are said, since the curve may change."""
    stored = yaml.safe_load((checkpoint.path / "config.yaml").read_text())
    for section, now in config.model_dump(mode="json").items():
        then: dict[str, Any] = stored.get(section, {})
        for key, value in now.items():
            if key in then and then[key] != value:
                if (section == "model" and key in _SHAPES) or (section == "ctc" and key == "vocabulary"):
                    raise UserError(
                        f"{section}.{key}={value}: the checkpoint {checkpoint.path} was made with {then[key]}"
                    )
                log(f"{section}.{key} was {then[key]} in the checkpoint, is now {value}")


_SHAPES = {
    "conv_layers", "conv_norm", "conv_bias", "layers", "dim", "ffn_dim", "norm_first", "embedding_norm",
    "positional_kernel", "positional_groups", "codebooks", "codebook_entries", "codevector_dim", "quantizer_input",
    "target_projection", "projection_dim",
}  # fmt: skip
"""Settings of the model without which its tensors cannot be taken up."""
