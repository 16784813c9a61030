"""After a kill or a signal, a run continues as if it had never been interrupted. Real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import Command

DEADLINE = 120.0
LEARNED = ("loss", "contrastive", "diversity", "feature_penalty", "accuracy", "grad_norm", "hours_seen", "lr")


def start(corpus: Path, exp: Path, *overrides: str, options: tuple[str, ...] = ()) -> Command:
    settings = [*MICRO_RUN, f"data.train={corpus}", "checkpoint.every=3", *overrides]
    return Command(exp.with_suffix(".log"), "train", "base", *settings, "--exp", str(exp), *options)


def finish(command: Command, *, code: int = 0) -> str:
    return command.finish(code=code, timeout=DEADLINE)


def curve(exp: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("update", *LEARNED)} for line in lines if line["split"] == "train"]


def weights(exp: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in sorted((exp / "checkpoints" / "latest").glob("*.safetensors")):
        found |= {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    return found


def wait_for_update(exp: Path, update: int) -> None:
    deadline = time.monotonic() + DEADLINE
    metrics = exp / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= update:
            return
        time.sleep(0.005)
    raise AssertionError(f"update {update} was not reached")


@pytest.fixture(scope="module")
def corpus(small_corpus: SmallCorpus) -> Path:
    return small_corpus.train


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("uninterrupted")
    finish(start(corpus, exp))
    return exp


def test_a_killed_run_continues_bit_for_bit(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    exp = tmp_path / "killed"
    process = start(corpus, exp, "data.workers=1")
    wait_for_update(exp, 7)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    reached = len(curve(exp))
    assert 7 <= reached < 12, "the run ended before it could be killed"

    printed = finish(start(corpus, exp, options=("--resume", "auto")))

    assert "resumed from" in printed
    assert curve(exp) == curve(uninterrupted)
    assert [point["update"] for point in curve(exp)] == list(range(1, 13))
    assert weights(exp) == weights(uninterrupted)


def test_sigterm_saves_and_the_same_command_continues(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    exp = tmp_path / "stopped"
    process = start(corpus, exp)
    wait_for_update(exp, 4)
    process.terminate()
    printed = finish(process, code=128 + signal.SIGTERM)
    assert "stopped by SIGTERM; the same command continues from here\n" in printed
    stopped_at = len(curve(exp))
    state = json.loads((exp / "checkpoints" / "latest" / "train_state.json").read_text())
    assert state["update"] == stopped_at < 12

    with (exp / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"\xff\xfe\n{\n[")

    printed = finish(start(corpus, exp))

    assert "metrics.jsonl: dropping 3 lines that cannot be read" in printed
    assert curve(exp) == curve(uninterrupted)
    assert weights(exp) == weights(uninterrupted)


@pytest.mark.long
def test_run_sh_repeats_the_command_and_finds_the_run_finished(uninterrupted: Path) -> None:
    before = weights(uninterrupted)
    done = subprocess.run([uninterrupted / "run.sh"], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert "nothing to do" in done.stdout
    assert weights(uninterrupted) == before


def test_a_finished_run_keeps_the_settings_it_was_made_with(corpus: Path, uninterrupted: Path) -> None:
    files = [uninterrupted / "config.yaml", uninterrupted / "run.sh"]
    before = [file.read_text() for file in files]
    printed = finish(start(corpus, uninterrupted, "trainer.seed=7"))
    assert "trainer.seed was 0" in printed and "nothing to do" in printed
    assert [file.read_text() for file in files] == before


def test_never_refuses_a_folder_with_checkpoints(corpus: Path, uninterrupted: Path) -> None:
    printed = finish(start(corpus, uninterrupted, options=("--resume", "never")), code=2)
    assert "holds checkpoints of an earlier run" in printed
    assert printed.count("\n") == 1


def test_another_model_is_refused(corpus: Path, uninterrupted: Path) -> None:
    printed = finish(start(corpus, uninterrupted, "model.layers=2"), code=2)
    assert "model.layers=2" in printed
    assert "was made with 3" in printed


@pytest.mark.long
@pytest.mark.distributed
def test_sigterm_to_the_launcher_stops_all_ranks_with_their_loaders(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    exp = tmp_path / "two"
    process = start(corpus, exp, "data.workers=1", "trainer.updates=400", options=("--nproc-per-node", "2"))
    wait_for_update(exp, 2)
    process.terminate()
    printed = finish(process, code=128 + signal.SIGTERM)
    assert "stopped by" in printed
    assert "Traceback" not in printed
    state = json.loads((exp / "checkpoints" / "latest" / "train_state.json").read_text())
    assert state["update"] == len(curve(exp)) < 400
