"""No operator of DeepSpeed is compiled, so a machine needs no compiler for it: `w2vscale doctor` says so."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import FORKS
from tests.helpers.tiers import long_except
from w2vscale.engine.deepspeed.config import FOLDERS

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

NAMES = sorted(path.stem for path in FOLDERS[0].glob("*.json"))


def _refuse(builder: object, *arguments: object, **options: object) -> NoReturn:
    raise AssertionError(f"{builder} is loaded")


def _train(corpus: str, exp: str, name: str) -> None:
    from deepspeed.ops.op_builder.builder import OpBuilder

    from w2vscale.cli.app import app

    OpBuilder.load = OpBuilder.jit_load = _refuse
    settings = ["batch.micro_batches=2", "engine.name=deepspeed", f"engine.deepspeed_config={name}"]
    settings += ["trainer.updates=4"]  # MICRO_RUN warms up for four
    app(args=["train", "base", *MICRO_RUN, f"data.train={corpus}", *settings, "--exp", exp], standalone_mode=False)


@pytest.mark.parametrize("name", long_except(["zero3_offload"], NAMES))
def test_a_run_loads_no_operator(name: str, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    process = FORKS.Process(target=_train, args=(str(small_corpus.train), str(tmp_path / "exp"), name))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert list((tmp_path / "exp" / "checkpoints").glob("update_*"))
