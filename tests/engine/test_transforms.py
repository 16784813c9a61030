"""What every engine does to a model before it lays it out: compile, recompute, shard."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.batches import inputs_of
from tests.helpers.engines import set_up
from tests.helpers.micro import MICRO_MODEL, THREE_CONVOLUTIONS
from tests.helpers.tiers import long
from w2vscale.config import EngineConfig, load_config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine import transforms
from w2vscale.engine.transforms import compiled_graphs, compiles, missing_for_compilation, transform
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.objectives.base import empty_model
from w2vscale.runtime import COMPILED_VARIANTS, prepare_process


def model_and_engine(*overrides: str) -> tuple[Any, EngineConfig]:
    config = load_config("base", [*MICRO_MODEL, *overrides])
    return empty_model(build_objective(config)), config.engine


@pytest.mark.parametrize(
    ("kind", "every", "recomputed"),
    [("none", 2, []), ("features", 2, []), ("selective", 2, [0, 2]), ("full", 2, [0, 1, 2])],
)
def test_activation_checkpointing_takes_the_chosen_blocks(kind: str, every: int, recomputed: list[int]) -> None:
    model, engine = model_and_engine(
        f"engine.activation_checkpointing={kind}", f"engine.activation_checkpointing_every={every}"
    )
    transform(model, engine, compiled=False)
    changed = [index for index, block in enumerate(model.encoder.transformer.blocks) if "forward" in vars(block)]
    assert changed == recomputed
    assert ("forward" in vars(model.encoder.feature_encoder)) is (kind != "none")


def test_sharding_comes_last() -> None:
    """The feature encoder and every block are compiled by then."""
    model, engine = model_and_engine()
    seen: list[bool] = []

    def shard(model: Any) -> None:
        compiled = (model.encoder.feature_encoder, *model.encoder.transformer.blocks)
        seen.extend("forward" in vars(module) for module in compiled)

    transform(model, engine, compiled=True, shard=shard)
    assert seen == [True] * 4


@pytest.fixture
def gpu_that_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU with all that torch.compile needs; returns the folder of Python's headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(transforms, "has_triton", lambda: True)
    monkeypatch.setattr(transforms.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("true", "cpu", True), ("false", "cuda", False)],
)
@pytest.mark.usefixtures("gpu_that_compiles")
def test_gpus_compile_unless_told_otherwise(setting: str, device: str, expected: bool) -> None:
    _, engine = model_and_engine(f"engine.compile={setting}")
    assert compiles(engine, torch.device(device)) is expected


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/g++")
    _, engine = model_and_engine("engine.compile=true")
    with pytest.raises(UserError, match=r"engine\.compile=true: .* /no/such/g\+\+ \(CXX\) was not found"):
        compiles(engine, torch.device("cpu"))


def test_what_a_gpu_lacks_is_named(gpu_that_compiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert missing_for_compilation(gpu) is None
    (gpu_that_compiles / "Python.h").unlink()
    assert missing_for_compilation(gpu) == "the headers of Python (Python.h, in the package python3-dev)"
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert str(missing_for_compilation(gpu)).startswith("a C compiler")
    monkeypatch.setattr(transforms, "has_triton", lambda: False)
    assert missing_for_compilation(gpu) == "Triton and a GPU that it supports"
    _, engine = model_and_engine("engine.compile=auto")
    assert not compiles(engine, gpu)
    _, engine = model_and_engine("engine.compile=true")
    with pytest.raises(UserError, match=r"engine\.compile=true: torch\.compile needs Triton"):
        compiles(engine, gpu)


SHAPES = [
    (20_000, 19_000), (15_000,) * 3, (11_000, 10_999, 9000, 8000), (40_000,), (9000,) * 4 + (8000,), (31_000,) * 2,
    (8000, 7000, 6000, 5000, 4000, 3000), (17_000, 16_001), (22_000,) * 3, (25_000,), (7000,) * 6 + (5000,),
    (19_999, 5000),
]  # fmt: skip
"""Samples of the utterances of twelve forwards: padded, not padded, and single."""


@pytest.mark.parametrize(
    ("backend", "preset", "precision", "tolerance"),
    [
        long("aot_eager", "base", "bf16", 2e-2),
        long("inductor", "base", "fp32", 1e-5),
    ],
)
def test_few_graphs_compute_forwards_of_any_shape(
    backend: str, preset: str, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    off = [f"regularization.{name}=0" for name in ("dropout", "attention_dropout", "input_dropout")]
    settings = [*MICRO_MODEL, *off, "objective.feature_dropout=0", f"precision.compute={precision}"]
    compiled, eager = (
        set_up(load_config(preset, [*settings, f"engine.compile={choice}"])) for choice in ("true", "false")
    )
    with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):
        torch._dynamo.reset()
        before = compiled_graphs()
        for number, lengths in enumerate(SHAPES):
            draws = np.random.default_rng(number)
            inputs = inputs_of(eager.objective, [draws.standard_normal(n, dtype=np.float32) for n in lengths])
            batch = MicroBatch(number, inputs, sum(lengths))
            losses = [float(setup.window([batch], 1000.0).total) for setup in (compiled, eager)]
            assert losses[0] == pytest.approx(losses[1], rel=tolerance)
            norms = [float(setup.step(1e-3)) for setup in (compiled, eager)]
            assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)
        assert 0 < compiled_graphs() - before <= 6
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_compiled_code_is_recomputed_with_the_same_dropout() -> None:
    """Two forwards of other sizes, with inductor, whose dropout is not that of the other back-ends."""
    norms = {}
    for recomputed in ("none", "full"):
        micro = [*MICRO_MODEL, THREE_CONVOLUTIONS, "model.layers=1", "engine.compile=true"]
        setup = set_up(load_config("base", [*micro, f"engine.activation_checkpointing={recomputed}"]))
        norms[recomputed] = []
        for number, lengths in enumerate([(16_000, 12_000), (20_000, 18_000, 15_000)]):
            draws = np.random.default_rng(number)
            waveforms = [draws.standard_normal(n, dtype=np.float32) for n in lengths]
            batch = MicroBatch(number, inputs_of(setup.objective, waveforms, number=number), sum(lengths))
            setup.window([batch], 1000.0, update=number)
            norms[recomputed].append(float(setup.step(1e-3)))
        torch._dynamo.reset()
    assert norms["full"] == pytest.approx(norms["none"], rel=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("recomputed", ["none", "features", "selective", "full"])
def test_compiled_dropout_is_a_function_of_the_seed(recomputed: str) -> None:
    """Also where a block is recomputed in the backward, and whatever was computed before."""
    prepare_process(compile=True)
    settings = [*MICRO_MODEL, "precision.compute=bf16", f"engine.activation_checkpointing={recomputed}"]
    setup = set_up(load_config("base", settings), torch.device("cuda", torch.cuda.current_device()))
    draws = np.random.default_rng(0)
    batches = []
    for number in range(2):
        waveforms = [draws.standard_normal(n, dtype=np.float32) for n in (16_000, 12_000)]
        batches.append(MicroBatch(number, inputs_of(setup.objective, waveforms, number=number), 28_000).pin_memory())

    def norm_of(batch: MicroBatch) -> float:
        setup.window([batch], 1000.0)
        return float(setup.step(0.0))

    first = norm_of(batches[0])
    assert norm_of(batches[1]) != first
    assert norm_of(batches[0]) == pytest.approx(first, rel=1e-3)
