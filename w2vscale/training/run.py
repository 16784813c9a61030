"""Build a run from its settings: data, model, engine, checkpoints and folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from w2vscale.checkpoint.format import TrainState, committed
from w2vscale.checkpoint.lazy import LazyReader, LazyTensor
from w2vscale.checkpoint.mirror import Mirror
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.checkpoint.remote import RemoteCheckpoints, local_model, model_on_all_ranks
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, architecture_of, dump_config, load_yaml
from w2vscale.data.assembly import Assembler
from w2vscale.data.augmentation import Augmentation
from w2vscale.data.indexed import MicroBatches, check_sample, make_plan, validation_set
from w2vscale.data.loading import TrainingData
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.shard_index import BAD_SHARDS
from w2vscale.data.stream import open_stream
from w2vscale.distributed.process_group import Patience, Ranks, errors_on_all_ranks
from w2vscale.engine import Engine, build_engine
from w2vscale.engine.transforms import missing_for_compilation
from w2vscale.errors import UserError, counted
from w2vscale.files import nearest_path
from w2vscale.kernels.precision import CPU_HAS_BF16
from w2vscale.models.lengths import input_samples
from w2vscale.objectives import Objective, effective, resolve
from w2vscale.objectives.base import empty_model, initial_state
from w2vscale.optim.canonical import Specs, expected_tensors, model_shapes
from w2vscale.storage.urls import Url, place
from w2vscale.training.agreement import common_ground, compare_ranks, planned_work
from w2vscale.training.bad_audio import BadAudioLog
from w2vscale.training.warm_start import starting_tensors

TARGETS_READ = 10_000  # utterances whose targets are described before the first update
CHECKED_AFTER = 1000  # check `data.max_bad_fraction` after this many utterances, or all of a smaller corpus


@dataclass
class Run:
    """Everything that the training loop needs."""

    config: Config
    exp: Path
    ranks: Ranks
    device: torch.device
    training_set: TrainingData
    validation_set: MicroBatches | None
    further_sets: Mapping[str, MicroBatches]
    """Those of `data.validation_sets`, by name."""
    objective: Objective
    engine: Engine
    store: CheckpointStore
    bad_audio: BadAudioLog
    state: TrainState
    started: Iterator[list[MicroBatch]] | None = None
    """The windows that have been loading since before the engine was built."""
    named: bool = False
    """Whether the command named the checkpoint to resume from."""

    def windows(self) -> Iterator[list[MicroBatch]]:
        """The windows of this rank from the next update to the last. Loader processes load them ahead."""
        started, self.started = self.started, None
        return started or load_windows(self.config, self.training_set, self.state, self.ranks)

    def validation(self, name: str | None = None) -> Iterator[MicroBatch]:
        """Yield this rank's part of the validation set, or of the further one with this name."""
        batches = self.validation_set if name is None else self.further_sets[name]
        assert batches is not None
        return batches.one_epoch(rank=self.ranks.rank, world_size=self.ranks.world_size)

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, or start writing it in the background. Return its path. Collective."""
        return self.store.save(self.engine.export_state(), state, dump_config(self.config))


def build_run(
    config: Config,
    exp: Path,
    *,
    ranks: Ranks,
    device: torch.device,
    resume: str,
    log: Callable[[str], None],
    mirror: Mirror | None = None,
    patience: Patience | None = None,
) -> Run:
    """Open the data, build model and engine, and load the checkpoint to resume from, if any.

    `resume` is auto (the newest usable checkpoint, or a new run if there is none), never (a new run; the folder must
    hold no checkpoints), or the path or URL of a checkpoint. `mirror`: on rank 0, that of `checkpoint.store`, if it is
    set. `patience` runs downloads. Starts the loader processes: call it in a block of `loader_processes`. Raises
    UserError if data, settings or checkpoint cannot be used.
    """
    config, objective = resolve(config)
    objective.check(config)
    training_set, validation = open_data(config, objective, ranks)
    further_sets = open_further_sets(config, objective)
    model = empty_model(objective)
    # Taken from the plain model, so that it can be used to check what the engine exports.
    expected = expected_tensors(model, average=config.optim.ema_decay > 0)
    patience = patience or Patience()
    store = checkpoint_store(config, exp, ranks, expected, mirror, patience, log)
    checkpoint = _resume_point(resume, store, log)
    with errors_on_all_ranks():
        if mirror is not None and checkpoint is not None:
            mirror.resume(checkpoint.state.update)
    if checkpoint is not None:
        _compare_settings(config, objective, checkpoint, log)
        if checkpoint.state.data not in ("", training_set.describe()):
            log(f"data.train has changed: it was {checkpoint.state.data}; it is {training_set.describe()}")
    state = replace(checkpoint.state if checkpoint is not None else TrainState(), data=training_set.describe())
    # Compared before the engine is built: ranks that build different engines would hang.
    compare_ranks(planned_work(config, state) | common_ground(config, training_set.describe()))
    enough = min(CHECKED_AFTER, training_set.utterances)
    bad_audio = BadAudioLog(exp, ranks, limit=config.data.max_bad_fraction, enough=enough)
    if not state.update:
        log_targets(training_set, objective, ranks, log)
    # Before the engine is built: a forked process keeps the old version of all memory that this one changes.
    windows = None
    if state.update < config.trainer.updates:
        windows = load_windows(config, training_set, state, ranks)
    engine = build_engine(model, config, objective, device)
    try:
        if checkpoint is None:
            _start(engine, config, objective, expected, patience, log)
        else:
            engine.import_state(checkpoint)
            log(f"resumed from {_from_here(checkpoint.path)} at update {checkpoint.state.update}")
            _compare_averages(config, checkpoint, log)
        log_advice(config, objective, training_set, engine, device, log)
    except BaseException:
        engine.close()
        raise
    return Run(
        config=config,
        exp=exp,
        ranks=ranks,
        device=device,
        training_set=training_set,
        validation_set=validation,
        further_sets=further_sets,
        objective=objective,
        engine=engine,
        store=store,
        bad_audio=bad_audio,
        state=state,
        started=windows,
        named=resume not in ("auto", "never"),
    )


def _start(
    engine: Engine,
    config: Config,
    objective: Objective,
    expected: Specs,
    patience: Patience,
    log: Callable[[str], None],
) -> None:
    """Give a new run its first weights: random ones, and those of `trainer.init_from` where it has them."""
    loaded: dict[str, LazyTensor] = {}
    if (start := config.trainer.init_from) is not None:
        source = model_on_all_ranks(start, log, patience)
        loaded = starting_tensors(config, objective, model_shapes(expected), source, log)
    engine.import_values(initial_state(objective, config.trainer.seed, without=loaded))
    engine.import_model(LazyReader(loaded), loaded)


def _from_here(path: Path) -> Path:
    """The path from the current folder, if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def load_windows(
    config: Config, training_set: TrainingData, state: TrainState, ranks: Ranks
) -> Iterator[list[MicroBatch]]:
    """Start the loader processes, and yield the windows of this rank from the next update to the last."""
    updates = range(state.window, config.trainer.updates + state.skipped_windows)
    count = config.batch.micro_batches
    return training_set.windows(updates, micro_batches=count, rank=ranks.rank, world_size=ranks.world_size)


def checkpoint_store(
    config: Config, exp: Path, ranks: Ranks, expected: Specs, mirror: Mirror | None, patience: Patience,
    log: Callable[[str], None],
) -> CheckpointStore:  # fmt: skip
    """The checkpoints of a run in `exp`, each of which holds the tensors `expected`."""
    return CheckpointStore(
        exp / "checkpoints",
        ranks,
        expected=expected,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        best_metric=config.trainer.best_metric,
        asynchronous=config.checkpoint.asynchronous,
        mirror=mirror,
        patience=patience,
        log=log,
    )


def log_advice(
    config: Config, objective: Objective, training_set: TrainingData, engine: Engine, device: torch.device,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    """Log which utterances are left out, and what makes the first updates or the whole run slow on this machine."""
    if config.precision.compute == "bf16" and device.type == "cpu" and not CPU_HAS_BF16:
        log("warning: this CPU has no bf16 instructions; precision.compute=fp32 is much faster here")
    if engine.compiled:
        log(f"engine.compile={str(config.engine.compile).lower()}: the first updates also compile the model")
    if config.engine.compile == "auto" and device.type == "cuda" and (missing := missing_for_compilation(device)):
        log(f"engine.compile=auto: nothing is compiled, because torch.compile needs {missing}")
    if config.checkpoint.keep_best and config.trainer.validate_every % config.checkpoint.every:
        log(
            f"warning: checkpoint.keep_best: some validations have no checkpoint, because "
            f"checkpoint.every={config.checkpoint.every} does not divide "
            f"trainer.validate_every={config.trainer.validate_every}"
        )
    if config.data.mode == "stream":
        blocks = config.batch.micro_batches // training_set.series_length
        log(
            f"stream: the loader processes of all ranks hold {counted(blocks, 'block')} of up to "
            f"{config.data.stream_buffer} utterances (data.stream_buffer)"
        )
    if left_out := training_set.left_out:
        longer = "" if objective.crops else " or longer than data.max_seconds"
        total = training_set.utterances_in_all
        log(f"left out {left_out} of {total} utterances: shorter than data.min_seconds{longer}")
    if training_set.not_found:
        log(f"left out {counted(training_set.not_found, 'utterance')} of damaged shards: see {BAD_SHARDS} beside them")


def log_targets(training_set: TrainingData, objective: Objective, ranks: Ranks, log: Callable[[str], None]) -> None:
    """Log what the objective says of its targets in the training set, or in a sample of it. Collective.

    Rank 0 reads them. Raises UserError on every rank if the objective refuses them.
    """
    total = training_set.utterances_in_all
    what = "data.train" if total <= TARGETS_READ else f"data.train, {TARGETS_READ:,} of {total:,} utterances"
    with errors_on_all_ranks():
        if ranks.is_main:
            try:
                lines = objective.describe_targets(training_set.sample(min(total, TARGETS_READ)))
            except UserError as error:
                raise UserError(f"{what}: {error}") from None
            for line in lines:
                log(f"{what}: {line}")


def open_data(config: Config, objective: Objective, ranks: Ranks) -> tuple[TrainingData, MicroBatches | None]:
    """Open the training set, and the validation set if the settings name one.

    Raises UserError if a manifest is missing or invalid, or the world size does not divide `batch.micro_batches`.
    """
    if config.batch.micro_batches % ranks.world_size:
        raise UserError(
            f"batch.micro_batches={config.batch.micro_batches} is not a multiple of {ranks.world_size} processes: "
            "choose a multiple, or another number of processes"
        )
    training_set = open_training_set(config, objective)
    if not config.data.validation:
        return training_set, None
    corpus = _open_corpus(config.data.validation, config, setting="data.validation")
    return training_set, validation_set(corpus, objective, model=config.model, data=config.data, batch=config.batch)


def open_further_sets(config: Config, objective: Objective) -> dict[str, MicroBatches]:
    """Open `data.validation_sets`, by name. Raises UserError if a manifest is missing or invalid."""
    found = {}
    for name, places in config.data.validation_sets.items():
        corpus = _open_corpus(places, config, setting=f"data.validation_sets.{name}")
        found[name] = validation_set(corpus, objective, model=config.model, data=config.data, batch=config.batch)
    return found


def open_training_set(config: Config, objective: Objective) -> TrainingData:
    """Open the training set `data.train`. Raises UserError if a manifest, a shard or `augment.speed` cannot be used."""
    augment, seed = config.augment, config.trainer.seed
    augmentation = None
    if augment.speed or augment.reverb or augment.noise:
        if not objective.crops and min(augment.speed, default=1.0) < 1.0:
            raise UserError(
                f"augment.speed={augment.speed}: slowed utterances are cropped, which objective.name="
                f"{config.objective.name} cannot use; set factors of at least 1"
            )
        augmentation = Augmentation(
            augment,
            sampling_rate=config.model.sampling_rate,
            shortest=input_samples(objective.shortest_frames, config.model),
            seed=seed,
            schemes=config.data.url_schemes,
        )
    assemble = Assembler(objective, config.model, seed=seed, augmentation=augmentation)
    if config.data.mode == "stream":
        return open_stream(assemble, model=config.model, data=config.data, batch=config.batch)
    corpus = _open_corpus(config.data.train, config, setting="data.train")
    plan = make_plan(
        corpus, objective, model=config.model, data=config.data, batch=config.batch, seed=seed, mix=config.mix
    )
    return MicroBatches(corpus, plan, assemble, config.data)


def _open_corpus(paths: Sequence[Path | Url], config: Config, *, setting: str) -> Corpus:
    corpus = Corpus(paths, setting=setting, schemes=config.data.url_schemes)
    check_sample(corpus, sampling_rate=config.model.sampling_rate)
    return corpus


def _resume_point(resume: str, store: CheckpointStore, log: Callable[[str], None]) -> CheckpointReader | None:
    if resume == "never":
        with errors_on_all_ranks():
            places: list[Path | Url] = [store.folder] if committed(store.folder) else []
            if store.mirror is not None and store.mirror.updates:
                places.append(store.mirror.remote.url)
            if places:
                raise UserError(
                    f"{places[0]}: holds checkpoints of an earlier run; continue it with --resume auto, or choose "
                    f"another {'--exp' if places[0] == store.folder else 'checkpoint.store'}"
                )
        return None
    named = None if resume == "auto" else place(resume)
    checkpoint = store.find(log, named)
    if checkpoint is None and named is not None:
        raise UserError(f"{named}: no such checkpoint{nearest_path(named) if isinstance(named, Path) else ''}")
    return checkpoint


def stored_settings(exp: Path, resume: str, store: Path | Url | None = None) -> Path | None:
    """Return the config file of the run that would be resumed, here or in the store; None for a new run."""
    if resume == "never":
        return None
    if resume == "auto" and not committed(exp / "checkpoints"):
        return RemoteCheckpoints(store).settings() if isinstance(store, Url) else None
    path = exp if resume == "auto" else local_model(place(resume))
    return open_checkpoint(path, resuming=True, hashed=False).path / "config.yaml"


def _compare_averages(config: Config, checkpoint: CheckpointReader, log: Callable[[str], None]) -> None:
    """Log if only the run or only the checkpoint has a moving average of the weights."""
    decay = config.optim.ema_decay
    if decay and not checkpoint.has_average:
        log(f"optim.ema_decay={decay:g}: the checkpoint has no averaged weights; the average starts from its weights")
    if checkpoint.has_average and not decay:
        log("optim.ema_decay=0: the averaged weights of the checkpoint are dropped")


def _compare_settings(
    config: Config, objective: Objective, checkpoint: CheckpointReader, log: Callable[[str], None]
) -> None:
    """Raise if the architecture differs from the checkpoint's; log other differences, which may change the curve."""
    stored = load_yaml((checkpoint.path / "config.yaml").read_text(encoding="utf-8")) or {}
    before, after = effective(checkpoint.config), effective(config)
    if before["objective"] != after["objective"]:  # an earlier version may have written the same in another form
        before = effective(resolve(checkpoint.config)[0])
    fixed = {("model", key) for key in architecture_of(config.model)}
    fixed |= {("objective", key) for key in architecture_of(objective.settings)}
    for section, now in after.items():
        for key, value in now.items():
            then = before[section].get(key)
            if key not in (stored.get(section) or {}):
                log(f"{section}.{key}={value} is a setting that the checkpoint does not have")
            elif then != value:
                if (section, key) in fixed:
                    raise UserError(f"{section}.{key}={value}: the checkpoint {checkpoint.path} was made with {then}")
                log(f"{section}.{key} was {then} in the checkpoint, is now {value}")
