"""The recipe that measures what pretraining learns: its stages, its page of tables and its n-gram model."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lhotse import CutSet

from tests.helpers.micro import MICRO_ENCODER
from tests.helpers.spelled import write_spelled
from tests.recipes.test_print_command import printed_by
from tests.recipes.test_recipes import RECIPES, SMALL_BATCH, TUNING, environment, run, write_librispeech
from w2vscale.config import load_config

__all__ = ["environment"]


@pytest.mark.slow
def test_evidence_is_one_page_of_tables(environment: str, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    write_librispeech(tmp_path / "corpus")
    exp, tuning = tmp_path / "exp", "batch.concat=1 " + TUNING.removeprefix("trainer.updates=2 ")
    options = (
        "--corpus", str(tmp_path / "corpus"), "--audio", str(tmp_path / "corpus" / "train-clean-5"),
        "--data", str(tmp_path / "data"), "--exp", str(exp), "--minutes", "0.2 0.1", "--hours", "0.003",
        "--probe-updates", "4", "--finetune-updates", "2", "--finetune-settings", tuning, "--jobs", "1",
    )  # fmt: skip
    small = (
        *MICRO_ENCODER,
        *SMALL_BATCH,
        "batch.concat=1",
        "schedule.warmup_updates=1",
        "data.workers=0",
        "logging.tensorboard=false",
    )
    printed = run("evidence", *options, *small, environment=environment)
    assert {number: printed.count(f"stage {number}: done in") for number in range(10)} == {
        0: 0, 1: 1, 2: 1, 3: 3, 4: 2, 5: 1, 6: 0, 7: 8, 8: 4, 9: 1,
    }  # fmt: skip
    page = (exp / "RESULTS.md").read_text()
    assert (
        "| linear probe: label errors, CTC loss (nats per label) | layer 0 |" in page
        and "| wav2vec2, random weights |" in page
    )
    assert page.index("## 0.2 minutes with transcripts") < page.index("## 0.1 minutes with transcripts")
    for run_name in ("wav2vec2", "best_rq"):
        for baseline in ("scratch", "scratch_x3"):
            assert page.count(f"`{run_name}` against `{baseline}` on") == 4  # two amounts, each with and without 3-gram
    assert load_config(exp / "0.1min" / "scratch_x3").trainer.updates == 6
    assert load_config(exp / "0.1min" / "best_rq").model == load_config(exp / "0.1min" / "scratch").model
    assert "3-gram.arpa (weight 0.5, word score 1" in page
    assert all((exp / name).is_file() for name in ("pretraining.html", "finetuning.html"))
    assert (exp / "evidence.png").read_bytes().startswith(b"\x89PNG")
    again = run("evidence", *options, *small, environment=environment)
    assert "done in" not in again and again.count("done already") == 21


def test_evidence_prints_the_commands_of_each_objective_and_amount(tmp_path: Path) -> None:
    options = ("--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"), "--nproc", "2")
    done = printed_by("evidence", tmp_path, *options)
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    named = [line[next(n for n, word in enumerate(line) if word.endswith("w2vscale")) + 1] for line in commands]
    one_amount = ["finetune"] * 4 + ["evaluate"] * 8
    assert named == one_amount * 2
    assert [line.count("--scratch") for line in commands] == [0, 0, 1, 1, *[0] * 8] * 2
    assert done.stderr.count("the number of updates depends on the speech: run stages 0 to 2 first") == 2


@pytest.mark.slow
def test_trials_are_compared_on_speakers_held_out(environment: str, tmp_path: Path) -> None:
    write_librispeech(tmp_path / "corpus")
    trials = tmp_path / "trials.txt"
    trials.write_text(
        "# a comment\n\nshort wav2vec2 batch.max_seconds=4\nlong wav2vec2 batch.max_seconds=8 objective.negatives=5"
    )  # no end of the last line
    exp = tmp_path / "exp"
    options = (
        "--corpus", str(tmp_path / "corpus"), "--data", str(tmp_path / "data"), "--exp", str(exp), "--jobs", "1",
        "--list", str(trials), "--hours", "0.005", "--speakers", "1", "--probe-updates", "3",
    )  # fmt: skip
    small = (
        *MICRO_ENCODER,
        "batch.concat=1",
        *(one for one in SMALL_BATCH if not one.startswith("batch.max_seconds=")),
    )
    printed = run("evidence", *options, *small, "data.workers=0", script="trials.sh", environment=environment)
    assert "hold 1 of the speakers out" in printed
    # The utterances of the other speaker have 2.0, 2.3, 2.6 and 2.9 seconds: one in 4 seconds, two or more in 8.
    short, long = (load_config(exp / name).trainer.updates for name in ("short", "long"))
    assert short == round(0.005 * 3600 / 2.45) and 2 <= long < 0.6 * short
    held_out = CutSet.from_file(tmp_path / "data" / "manifests" / "trials" / "cuts_held_out.jsonl")
    trained = CutSet.from_file(tmp_path / "data" / "manifests" / "trials" / "cuts_train.jsonl")
    assert not {cut.supervisions[0].speaker for cut in held_out} & {cut.supervisions[0].speaker for cut in trained}
    page = (exp / "RESULTS.md").read_text()
    assert "| short |" in page and "| long |" in page and "`short`, layer" in page


def test_a_line_of_a_list_of_trials_without_an_objective_is_refused(tmp_path: Path) -> None:
    trials = tmp_path / "trials.txt"
    for line in ("alone", "name hubert objective.negatives=5"):
        trials.write_text(f"first wav2vec2\n{line}\n")
        printed = run("evidence", "--print-command", "--list", str(trials), script="trials.sh", code=2)
        assert f"{line}: the second word is no objective with settings in" in printed


def test_hours_that_are_no_number_above_0_are_refused() -> None:
    for hours in ("many", "0", "nan", "inf"):
        done = subprocess.run(
            [sys.executable, str(RECIPES / "evidence" / "local" / "updates_for.py"), hours, "tiny"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (1, f"error: --hours {hours}: give a number of hours above 0\n")


def test_an_n_gram_model_is_a_distribution(tmp_path: Path) -> None:
    spoken = ["ONE TWO THREE", "ONE TWO FOUR", "TWO THREE ONE", "FIVE"]
    cuts = write_spelled(tmp_path, spoken)
    arpa = tmp_path / "lm" / "3-gram.arpa"
    done = subprocess.run(
        [sys.executable, str(RECIPES / "evidence" / "local" / "ngram.py"), str(arpa), str(cuts)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "3-gram of 4 sentences, 10 words, 5 different ones" in done.stdout
    tables = read_arpa(arpa)

    def probability(context: tuple[str, ...], word: str) -> float:
        """By the rule of ARPA files: a missing n-gram has the backoff weight of its context."""
        if (*context, word) in tables:
            return 10.0 ** tables[(*context, word)][0]
        return float(10.0 ** tables.get(context, (0.0, 0.0))[1] * probability(context[1:], word))

    words = [ngram[0] for ngram in tables if len(ngram) == 1 and ngram[0] != "<s>"]
    assert {"<unk>", "</s>", "ONE", "FIVE"} <= set(words)
    for context in ((), ("ONE",), ("ONE", "TWO"), ("<s>",), ("<s>", "ONE"), ("FOUR", "ONE"), ("<unk>",)):
        assert sum(probability(context, word) for word in words) == pytest.approx(1.0, abs=1e-4), context
    assert probability(("ONE",), "TWO") > probability(("ONE",), "FOUR") > 0.0


def read_arpa(path: Path) -> dict[tuple[str, ...], tuple[float, float]]:
    """The log10 probability and backoff weight of each n-gram."""
    lines = (line.split("\t") for line in path.read_text().splitlines())
    return {tuple(one[1].split()): (float(one[0]), float([*one, "0"][2])) for one in lines if len(one) > 1}
