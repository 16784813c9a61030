"""What the ranks of a pool run."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lhotse.cut import Cut
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from tests.helpers.calibrating import per_forward_on_a_gpu
from tests.helpers.checkpoints import expected_of_parameters, rewrite
from tests.helpers.engines import exported, set_up
from tests.helpers.micro import MICRO_ENCODER, MICRO_MODEL, MICRO_RUN, MICRO_TRAINING
from tools.bench.sent_bytes import Collectives, sent_by_kind
from w2vscale.checkpoint import format as format_module
from w2vscale.checkpoint import sharded_writer, slices
from w2vscale.checkpoint import store as store_module
from w2vscale.checkpoint.format import FileFacts, TrainState, file_facts, read_document
from w2vscale.checkpoint.lazy import LazyReader, counted_reads
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, load_config
from w2vscale.data import assembly
from w2vscale.data.audio import AudioError, read_audio
from w2vscale.data.loading import loader_processes
from w2vscale.distributed.process_group import Ranks, broadcast_from_main, gather_as_found, gather_from_ranks
from w2vscale.engine import ExportedState
from w2vscale.engine.rows import Rows
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.evaluation.wer import score_checkpoint
from w2vscale.inference.pretrained import load
from w2vscale.inference.transcription import transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.interop.importing import read_model
from w2vscale.objectives import StepContext
from w2vscale.objectives.contrastive import Contrastive
from w2vscale.runtime import StopRequest
from w2vscale.training.calibration import micro_batches_per_forward
from w2vscale.training.callbacks import Callbacks
from w2vscale.training.display import Display
from w2vscale.training.folder import make_folder
from w2vscale.training.loop import Trainer
from w2vscale.training.run import Run, build_run
from w2vscale.training.time_limit import TimeLimit
from w2vscale.training.warm_start import open_source, source_config
from w2vscale.training.watchdog import Watchdog


def train_and_save_first(corpus: str, exp: str, overrides: tuple[str, ...]) -> list[float]:
    """`train_micro` with a checkpoint before the first update."""
    return train_micro(corpus, exp, overrides, save_first=True)


def train_with_loader_processes(corpus: str, exp: str, overrides: tuple[str, ...]) -> list[float]:
    """`train_micro` in a process that may have children, as those of a pool may not."""
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    settings["daemon"] = False
    try:
        return train_micro(corpus, exp, overrides)
    finally:
        settings["daemon"] = True


def train_calibrated(corpus: str, exp: str, overrides: tuple[str, ...]) -> list[float]:
    """`train_micro` with `batch.concat=auto` as on a GPU that holds a whole window."""
    return train_micro(corpus, exp, (*overrides, "batch.concat=auto"), per_forward=per_forward_on_a_gpu)


def train_micro(
    corpus: str,
    exp: str,
    overrides: tuple[str, ...] = (),
    *,
    save_first: bool = False,
    per_forward: Callable[[Run], int] | None = None,
) -> list[float]:
    """Train the micro model on this process group, or alone; the loss of every update, and of validation.

    With `save_first`, there is a checkpoint before the first update, too. `per_forward` replaces `batch.concat`.
    """
    another = any(override.startswith("objective.name=") for override in overrides)
    model = MICRO_ENCODER if another else MICRO_MODEL
    config = load_config("base", [*model, *MICRO_TRAINING, f"data.train={corpus}", *overrides])
    return [record["loss"] for record in _train(config, Path(exp), save_first=save_first, per_forward=per_forward)]


def train_tiny(corpus: str, exp: str, overrides: tuple[str, ...]) -> list[tuple[float, float]]:
    """Train the preset `tiny`; loss and gradient norm of every update."""
    config = load_config("tiny", [f"data.train={corpus}", "logging.every=1", "logging.tensorboard=false", *overrides])
    return [(record["loss"], record["grad_norm"]) for record in _train(config, Path(exp))]


def train_until_time_is_over(corpus: str, exp: str, overrides: tuple[str, ...], looks: int) -> int:
    """`train_micro` where on the last rank alone the time is over, after some looks at the clock; the exit code."""
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus}", "trainer.max_hours=3", *overrides])
    counted = 0

    def reached(limit: TimeLimit, **seconds: Any) -> bool:
        nonlocal counted
        counted += 1
        return dist.get_rank() == dist.get_world_size() - 1 and counted > looks

    with patch.object(TimeLimit, "reached", reached):
        return _run(config, Path(exp))


def train_with_a_callback_on_rank_0(corpus: str, exp: str) -> list[int]:
    """The updates of the complete checkpoints that the function of rank 0 has got. The other ranks have none."""
    seen: list[int] = []

    def on_checkpoint(update: int, path: Path) -> None:
        seen.append(read_document(path).state.update)

    config = load_config("base", [*MICRO_RUN, "model.layers=1", "checkpoint.every=4", f"data.train={corpus}"])
    _run(config, Path(exp), callbacks=Callbacks(on_checkpoint=None if dist.get_rank() else on_checkpoint))
    return seen


def _train(
    config: Config, folder: Path, *, save_first: bool = False, per_forward: Callable[[Run], int] | None = None
) -> list[dict[str, float]]:
    """What is logged, on rank 0."""
    _run(config, folder, save_first=save_first, per_forward=per_forward)
    if dist.is_initialized() and dist.get_rank():
        return []
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _run(
    config: Config,
    folder: Path,
    *,
    save_first: bool = False,
    per_forward: Callable[[Run], int] | None = None,
    callbacks: Callbacks = Callbacks(),  # noqa: B008 - it cannot change
) -> int:
    """Train; the exit code."""
    ranks = Ranks()
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    with loader_processes():
        run = build_run(config, folder, ranks=ranks, device=torch.device("cpu"), resume="auto", log=lambda text: None)
        make_folder(folder, run.config, ranks, command=None)
        if save_first:
            run.save(run.state)
        chosen = per_forward(run) if per_forward is not None else micro_batches_per_forward(run, lambda text: None)
        display = Display(total=config.trainer.updates, enabled=ranks.is_main)
        watchdog = Watchdog(ranks, folder / "logs", seconds=0, stop=StopRequest(), grace=600)
        code = Trainer(run, StopRequest(), watchdog, chosen, display, callbacks=callbacks).train()
        run.engine.close()
    return code


def train_where_one_rank_cannot_read(utterance: str, corpus: str, exp: str, overrides: tuple[str, ...]) -> int:
    """Micro-batches per forward of this rank in `train_calibrated`, if the last rank has no file of one utterance."""
    found: list[int] = []

    def per_forward(run: Run) -> int:
        found.append(per_forward_on_a_gpu(run))
        return found[0]

    def read(cut: Cut, **settings: Any) -> Any:
        if cut.id == utterance and dist.get_rank() == dist.get_world_size() - 1:
            raise AudioError("missing", "no such file")
        return read_audio(cut, **settings)

    with patch.object(assembly, "read_audio", read):
        train_micro(corpus, exp, (*overrides, "batch.concat=auto"), per_forward=per_forward)
    return found[0]


def step_after_a_gradient_that_is_not_finite(corpus: str, overrides: tuple[str, ...]) -> tuple[bool, bool, list[float]]:
    """Whether such steps are skipped and leave this rank's state as it was, and the norms of the next two steps.

    The gradient is NaN on all ranks, then infinite on the last rank only.
    """
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides])
    setup = set_up(config)
    engine, batch = setup.engine, setup.training_set.largest()

    def state() -> list[torch.Tensor]:
        return [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in exported(engine).values()]

    setup.window([batch, batch], 100.0)
    engine.step(lr=1e-3, max_norm=1.0)  # moments and step counts are no longer zero
    before = state()
    skipped = unchanged = True
    last = dist.get_rank() == dist.get_world_size() - 1
    for denominator in (math.nan, 0.0 if last else 100.0):
        setup.window([batch, batch], denominator)
        skipped = skipped and not engine.step(lr=1e-3, max_norm=1.0).isfinite()
        unchanged = unchanged and all(map(torch.equal, before, state()))
    norms = []
    for _ in range(2):
        setup.window([batch, batch], 100.0)
        norms.append(float(engine.step(lr=0.0, max_norm=1.0)))
    engine.close()
    return skipped, unchanged, norms


def gradients_of_windows(corpus: str, overrides: tuple[str, ...], windows: tuple[int, ...]) -> list[torch.Tensor]:
    """The whole gradient of windows with so many forwards each, as one vector; on rank 0.

    Adam's first moment is the gradient where it decays at once. All micro-batches of a rank are the same one.
    """
    settings = (f"data.train={corpus}", "optim.betas=[0.0, 0.0]", *overrides)
    setup = set_up(load_config("base", [*MICRO_RUN, *settings]))
    (batches,) = setup.training_set.windows(
        range(1), micro_batches=dist.get_world_size(), rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    found = []
    for forwards in windows:
        setup.window([*batches] * forwards, 100.0 * forwards)
        setup.step(0.0, None)
        moments = [
            (x.full_tensor() if isinstance(x, DTensor) else x).flatten()
            for name, x in sorted(exported(setup.engine).items())
            if name.endswith("exp_avg")
        ]
        found.append(torch.cat(moments).clone())
    setup.engine.close()
    return found if dist.get_rank() == 0 else []


def order_of_reduction(corpus: str, overrides: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """The trained parameters of a DDP engine, and the order in which each of two updates reduces their gradients."""
    setup = set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
    engine: Any = setup.engine
    names = {parameter: name for name, parameter in engine.trained.items()}
    found: list[list[str]] = []

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found[-1] += [names[parameter] for parameter in bucket.parameters()]
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda reduced: reduced.value()[0] / dist.get_world_size())

    reduce.__annotations__.clear()  # DDP refuses annotations that are strings
    engine.parallel.register_comm_hook(None, reduce)
    for update in range(2):
        found.append([])
        setup.window([setup.training_set.largest()] * 2, 100.0, update=update)
        assert setup.step(1e-3).isfinite()
    engine.close()
    return list(names.values()), found


def all_reduces_over_replicas(corpus: str, overrides: tuple[str, ...]) -> tuple[int, list[int]]:
    """The FSDP units of an engine with hybrid sharding, and how often each of two windows reduces over replicas.

    A window has three forwards.
    """
    setup = set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
    engine: Any = setup.engine
    found: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, group: Any = None, **named: Any) -> Any:
        assert group is not None and dist.get_world_size(group) < dist.get_world_size()
        found[-1] += 1
        return all_reduce(tensor, *arguments, group=group, **named)

    for update in range(2):
        found.append(0)
        with patch.object(dist, "all_reduce", counted):
            setup.window([setup.training_set.largest()] * 3, 100.0, update=update)
        assert setup.step(1e-3).isfinite()
    engine.close()
    return sum(isinstance(module, FSDPModule) for module in engine.model.modules()), found


def sent_in_a_window(corpus: str, overrides: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of gradients and of parameters that this rank sends in an update."""
    setup = set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
    batch = setup.training_set.largest()
    setup.window([batch] * 2, 100.0)
    setup.step(1e-3)
    collectives = Collectives()
    with collectives:
        setup.window([batch] * 2, 100.0, update=1)
        setup.step(1e-3)
    setup.engine.close()
    sent = sent_by_kind(collectives.found)
    return sent["gradients"], sent["parameters"]


def groups_of_gathers(corpus: str, overrides: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The sizes of the groups in which the third update gathers parameters: in its forward, and in its backward."""
    setup = set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
    batch = setup.training_set.largest()
    for update in range(2):
        setup.window([batch], 100.0, update=update)
        setup.step(1e-3)
    forward, collectives = Contrastive.forward, Collectives()
    ends: list[int] = []

    def noted(self: Contrastive, *arguments: Any, **named: Any) -> Any:
        sums = forward(self, *arguments, **named)
        ends.append(len(collectives.found))
        return sums

    with patch.object(Contrastive, "forward", noted), collectives:
        setup.window([batch], 100.0, update=2)
    setup.engine.close()
    found = enumerate(collectives.found)
    gathers = [(index < ends[0], one.ranks) for index, one in found if one.kind == "allgather"]
    return [ranks for before, ranks in gathers if before], [ranks for before, ranks in gathers if not before]


def refusal_of_an_engine(corpus: str, overrides: tuple[str, ...]) -> str:
    """The error of building an engine."""
    try:
        set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
    except UserError as error:
        return str(error)
    return ""


def on_nodes_of_two(distribution: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` as if a launcher had started two processes on each machine, in blocks or in turn."""
    rank, nodes = dist.get_rank(), dist.get_world_size() // 2
    local_rank, node = (rank % 2, rank // 2) if distribution == "block" else (rank // nodes, rank % nodes)
    with (
        patch.dict(os.environ, LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE="2"),
        patch.object(socket, "gethostname", lambda: f"node{node}"),
    ):
        return function(*arguments)


def update_without_a_launcher(corpus: str, overrides: tuple[str, ...]) -> bool:
    """Whether an engine takes steps and evaluates where nothing has set LOCAL_RANK, and leaves the environment as it
    was."""
    given = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    before = dict(os.environ)
    try:
        setup = set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
        batch = setup.training_set.largest()
        for _ in range(2):
            setup.window([batch, batch], 100.0)
            assert setup.step(1e-3).isfinite()
            setup.evaluate(batch)
        exported(setup.engine)
        setup.start_over()
        setup.engine.close()
        return dict(os.environ) == before
    finally:
        os.environ.update(given)


def gather_unevenly(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each rank finds so many items, the more the slower."""
    rank = dist.get_rank()

    def found() -> Iterator[tuple[int, int]]:
        for number in range(counts[rank]):
            time.sleep(0.02 * counts[rank])
            yield rank, number

    return list(gather_as_found(found(), every_seconds=0.1))


def word_errors(exp: str, cuts: str) -> tuple[int, list[tuple[str, str]]]:
    """How many utterances this rank transcribed, and what the score says of all."""
    pretrained = load(exp)
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    mine = sum(1 for _ in transcribe(pretrained, find_utterances([Path(cuts)]), ranks=ranks))
    found = score_checkpoint(pretrained, [Path(cuts)], ranks=ranks)
    return mine, [(one.utterance, one.hypothesis) for one in found.utterances]


def train_until_killed(corpus: str, exp: str, overrides: tuple[str, ...], update: int) -> None:
    """`train_micro` in a process that is killed (SIGKILL) as soon as it has begun to save after `update`."""
    working = Trainer._update

    def killed(trainer: Trainer, *arguments: Any) -> bool:
        if trainer.state.update == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return working(trainer, *arguments)

    with patch.object(Trainer, "_update", killed):
        train_micro(corpus, exp, overrides)


def train_with_an_engine_that_drops(tensor: str, update: int, corpus: str, exp: str, overrides: tuple[str, ...]) -> str:
    """The error of `train_micro` whose engine, from `update` on, does not export a tensor on the last rank."""
    saving = Run.save

    def save(run: Run, state: TrainState) -> Path:
        exporting = run.engine.export_state

        def export() -> ExportedState:
            tensors = exporting()
            if state.update >= update and dist.get_rank() == dist.get_world_size() - 1:
                del tensors[tensor]
            return tensors

        with patch.object(run.engine, "export_state", export):
            return saving(run, state)

    with patch.object(Run, "save", save):
        try:
            train_micro(corpus, exp, overrides)
        except UserError as error:
            return str(error)
    return ""


def losses_after_an_import(
    corpus: str, overrides: tuple[str, ...], evaluate_first: bool, frozen: Sequence[str] = ()
) -> tuple[float, float]:
    """The engine's loss in evaluation and in training, once it was given other parameters after an evaluation.

    Parameters whose names have one of `frozen` in them are not trained.
    """
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides])

    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))

    setup = set_up(config, prepare=freeze)
    batch = setup.training_set.largest()
    setup.engine.import_values((name, torch.zeros_like(whole)) for name, whole in setup.initial_values())
    if evaluate_first:
        setup.evaluate(batch)
    setup.start_over()
    trained = float(setup.window([batch], 100.0).total)
    setup.step(0.0, None)
    if evaluate_first:
        setup.evaluate(batch)
    evaluated = float(setup.evaluate(batch).total)
    setup.engine.close()
    return trained, evaluated


def save_what_one_rank_spoils(folder: str, spoilt: str, asynchronous: bool) -> str:
    """The error of a second checkpoint of which the first rank's file is not what torch has written."""
    expected = expected_of_parameters({"weight": (5, 3), "bias": (2,)})
    rows = Rows(torch.device("cpu"))
    tensors = {name: rows.own(torch.ones(spec.shape)) for name, spec in expected.items()}
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    store = CheckpointStore(Path(folder), ranks, expected=expected, keep_last=9, asynchronous=asynchronous)
    store.save(tensors, TrainState(update=1), "")
    store.wait()

    def change(found: dict[str, torch.Tensor], offsets: dict[str, list[int]]) -> None:
        if spoilt == "missing":
            del found["model.weight"]
        elif spoilt == "doubled":
            offsets["model.weight"] = [1, 0]
        else:
            found["model.weight"] = found["model.weight"].bfloat16()

    writing = store_module.write_tensors

    def write(tensors: Any, folder: Path, group: Any) -> str | None:
        error = writing(tensors, folder, group)
        if ranks.is_main:
            rewrite(next(folder.glob("shard-00001-*")), change)
        return error

    with patch.object(store_module, "write_tensors", write):
        try:
            store.save(tensors, TrainState(update=2), "")
            store.wait()
        except UserError as error:
            return str(error)
    return ""


def save_where_one_rank_fails(folder: str, failure: str) -> str:
    """The error of saving tensors that are gathered one at a time, where the last rank fails at one of the first.

    `failure` is a full disk, or a value that is not finite, or none.
    """
    rows = Rows(torch.device("cpu"))
    expected = expected_of_parameters({f"layer{number}": (2 * number + 1, 3) for number in range(4)})
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    fails = ranks.rank == ranks.world_size - 1

    def gather(name: str) -> torch.Tensor:
        whole = torch.full(expected[name].shape, 1.0 / ranks.world_size)
        dist.all_reduce(whole)
        if failure == "not finite" and fails and name == "model.layer1":
            whole[-1, -1] = math.nan
        return whole

    def write(file: Any, specs: Any, values: Iterator[torch.Tensor], metadata: Any) -> None:
        next(values)
        raise OSError(28, "No space left on device")

    state = {name: rows.gathered(spec, partial(gather, name)) for name, spec in expected.items()}
    full = failure == "full disk" and fails
    with patch.object(sharded_writer, "write_safetensors", write if full else sharded_writer.write_safetensors):
        try:
            CheckpointStore(Path(folder), ranks, expected=expected).save(state, TrainState(update=1), "")
        except UserError as error:
            return str(error)
    checkpoint = broadcast_from_main(open_checkpoint(Path(folder), hashed=False) if ranks.is_main else None)
    right = all(torch.equal(checkpoint.tensor(name), torch.ones(spec.shape)) for name, spec in expected.items())
    return "" if right else "other values were written"


def hashed_to_start_from(path: str) -> tuple[list[str], str]:
    """The files with tensors that this rank hashes to open the model in `trainer.init_from`; its checkpoint or error.

    Nobody has to hash any for its settings.
    """
    found: list[str] = []

    def noted(file: Path) -> FileFacts:
        found.append(file.name)
        return file_facts(file)

    with patch.object(format_module, "file_facts", noted):
        with suppress(UserError):
            source_config(Path(path))
        assert set(found) <= {"config.yaml"}
        lines: list[str] = []
        try:
            open_source(Path(path), lines.append)
            (opened,) = gather_from_ranks([line for line in lines if line.startswith("starting from ")])[0]
        except UserError as error:
            opened = str(error)
    return [name for name in found if name.endswith(".safetensors")], opened


def evaluations(exp: str, cuts: str, ports: dict[tuple[str, ...], int]) -> list[tuple[bool, dict[str, float]]]:
    """Whether this rank's model is sharded, and the metrics on rank 0, with each of some overrides.

    Leaves the group of a pool for groups that meet at these ports.
    """
    dist.destroy_process_group()
    sharded: list[bool] = []
    forward = Contrastive.forward

    def noted(self: Contrastive, module: Any, *arguments: Any, **named: Any) -> Any:
        sharded[-1] = all(isinstance(parameter, DTensor) for parameter in module.parameters())
        return forward(self, module, *arguments, **named)

    found = []
    with patch.object(Contrastive, "forward", noted):
        for overrides, port in ports.items():
            sharded.append(False)
            with patch.dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(port)):
                evaluation = evaluate_checkpoint(Path(exp), [Path(cuts)], overrides)
            found.append((sharded[-1], evaluation.metrics if evaluation is not None else {}))
    return found


def read_where_one_rank_cannot(folder: str) -> str:
    """The error of reading a sharded state where the last rank cannot open a file, after it was written."""
    rows = Rows(torch.device("cpu"))
    expected = expected_of_parameters({"weight": (5, 3), "bias": (2,)})
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    state = {name: rows.own(torch.ones(spec.shape)) for name, spec in expected.items()}
    CheckpointStore(Path(folder), ranks, expected=expected).save(state, TrainState(update=1), "")
    checkpoint = broadcast_from_main(open_checkpoint(Path(folder)) if ranks.is_main else None)

    def fail(file: Path, **settings: Any) -> Any:
        raise OSError(5, "Input/output error")

    with patch.object(slices, "safe_open", fail if ranks.rank == ranks.world_size - 1 else slices.safe_open):
        try:
            checkpoint.read_into(state)
        except UserError as error:
            return str(error)
    return ""


def replaced_parameters(corpus: str, overrides: tuple[str, ...]) -> list[str]:
    """After each thing that an engine does: which of its parameters are not what its model has under their names."""
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides])
    setup = set_up(config)
    engine: Any = setup.engine
    batch = setup.training_set.largest()
    found: list[str] = []

    def look(after: str) -> None:
        others = dict(engine.model.named_parameters())
        found.extend(f"{name} {after}" for name, own in engine.parameters.items() if others[name] is not own)

    look("at first")
    setup.start_over()
    look("after an import")
    for _ in range(2):
        setup.evaluate(batch)
        look("after an evaluation")
        setup.window([batch, batch], 100.0)
        look("after a window")
        engine.step(lr=1e-3, max_norm=1.0)
        look("after a step")
    engine.close()
    return found


def train_with_bad_windows(corpus: str, exp: str, overrides: tuple[str, ...], windows: tuple[int, ...]) -> str:
    """`train_micro` where the loss of these windows is four times what it is; the error it ends with."""
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides])
    with bad_windows(windows, micro_batches=config.batch.micro_batches):
        try:
            _train(config, Path(exp))
        except UserError as error:
            return str(error)
    return ""


@contextmanager
def bad_windows(windows: Collection[int], *, micro_batches: int) -> Iterator[None]:
    """Have the loss of wav2vec 2.0 pretraining be four times what it is, wherever these windows are used."""
    working = Contrastive.forward

    def forward(self: Contrastive, module: Any, inputs: Any, *, step: StepContext, training: bool) -> Any:
        sums = working(self, module, inputs, step=step, training=training)
        bad = training and step.numbers[0] // micro_batches in windows
        return sums._replace(total=sums.total * 4.0) if bad else sums

    with patch.object(Contrastive, "forward", forward):
        yield


def rows_read_of(path: str) -> tuple[int, int, bool]:
    """Read a `.pt` file into sharded tensors: the bytes that this rank read, of how many, and whether all are right."""
    _, tensors = read_model(Path(path), "fairseq2")
    read: list[tuple[int, int]] = []
    counted = counted_reads(tensors, lambda done, total: read.append((done, total)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {name: empty_dtensor(*tensor.shape, device_mesh=mesh) for name, tensor in tensors.items()}
    state = {name: tensor.redistribute(placements=[Shard(0)]) for name, tensor in state.items()}
    LazyReader(counted).read_into(state)
    right = all(torch.equal(state[name].full_tensor(), tensor.whole()) for name, tensor in tensors.items())
    return *read[-1], right
