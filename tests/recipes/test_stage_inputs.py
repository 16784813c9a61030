"""Marks of recipe stages: a repeat with the same inputs is skipped, one with other inputs is refused or done again."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

UTILS = Path(__file__).resolve().parents[2] / "recipes" / "utils"

RECIPE = f"""#!/usr/bin/env bash
set -euo pipefail
stage=1
stop_stage=9
corpus=one
minutes=5
jobs=1
data=data
exp=exp
lm=
. {UTILS}/parse_options.sh
. {UTILS}/log.sh
data=$(absolute "$data") exp=$(absolute "$exp")
cuts=("$data/cuts_a.jsonl" "$data/cuts_b.jsonl")
labels=$data/cuts_$minutes.jsonl
tuned=${{exp}}_$minutes

prepare() {{ mkdir -p "$data" && echo "$corpus" | tee "${{cuts[@]}}" >/dev/null; fail_in prepare; }}
choose() {{ echo "$minutes of $(cat "${{cuts[0]}}")" >"$labels"; }}
fail_in() {{ [[ ! -e fail_in_$1 ]]; }}
# Like the trainer, it continues the run in its folder, with whatever it is given.
train() {{
  local run=$1 update
  fail_in start
  update=u$(find "$run" -path '*/checkpoints/u*' -name train_state.json | wc -l)
  mkdir -p "$run/checkpoints/$update"
  echo "$@" >"$run/checkpoints/$update/train_state.json"
  ln -sfn "$update" "$run/checkpoints/latest"
  fail_in train
}}
decode() {{ echo "decode $*" >>"$tuned/decoded"; }}
decode_with_lm() {{ decode "$lm"; }}
run_stage 1 "prepare" "$data" --options "corpus" prepare
train_stage 4 "pretrain" "$exp" --reads "cuts" train "$exp" "$@"
run_stage 6 "choose" "$labels" --options "minutes" --reads "cuts" choose
train_stage 7 "fine-tune" "$tuned" --reads "exp labels" train "$tuned"
run_stage 8 "decode" "$tuned" --reads "tuned" decode
if [[ -n $lm ]]; then run_stage 8 "decode with $lm" "$tuned" --options "lm" --reads "tuned" decode_with_lm; fi
"""

Recipe = Callable[..., str]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Runs the recipe; returns what it prints to stderr, without times and places."""
    (tmp_path / "run.sh").write_text(RECIPE)

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(["bash", "run.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return re.sub(r"^\S+ \S+ \(run\.sh:\d+\) ", "", done.stderr, flags=re.MULTILINE)

    return run


def stages(printed: str) -> list[int]:
    """The stages that were run to the end."""
    return [int(number) for number in re.findall(r"^stage (\d): done in", printed, flags=re.MULTILINE)]


def skipped(printed: str) -> list[int]:
    return [int(number) for number in re.findall(r"^stage (\d): done already", printed, flags=re.MULTILINE)]


def last(printed: str) -> str:
    return printed.splitlines()[-1]


def test_the_same_inputs_are_skipped_whatever_the_jobs(recipe: Recipe) -> None:
    assert stages(recipe("--", "optim.lr=1", "a.b=2")) == [1, 4, 6, 7, 8]
    again = recipe("--jobs", "7", "--corpus=one", "--", "a.b=3", "a.b=2", "optim.lr=1")
    assert (stages(again), skipped(again)) == ([], [1, 4, 6, 7, 8])


def test_another_option_is_refused_with_both_values(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    mark = tmp_path / "data" / ".prepare.done"
    before = mark.read_text()
    refused = (
        f"run.sh: stage 1 was done with corpus=one, now corpus=a b: choose another --data, or rm {mark} to redo it\n"
    )
    assert recipe("--corpus", "a b", code=2) == refused
    assert mark.read_text() == before
    assert stages(recipe("--corpus", "a b", "--data", "other", "--exp", "exp2")) == [1, 4, 6, 7, 8]


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ([], ["a.b=1"], "without a.b, now a.b=1"),
        (["a.b=1"], [], "with a.b=1, now without"),
        (["a.b=1", "c.d=x y"], ["a.b=1", "c.d=z"], "with c.d=x y, now c.d=z"),
        (["a.b=1", "a.b=2"], ["a.b=2", "a.b=1"], "with a.b=2, now a.b=1"),
        (["two\nlines"], ["one"], "with arguments={exp} two lines, now arguments={exp} one"),
    ],
)
def test_other_settings_of_a_training_are_refused(
    recipe: Recipe, tmp_path: Path, before: list[str], after: list[str], difference: str
) -> None:
    exp = tmp_path / "exp"
    recipe("--stop-stage", "4", *before)
    assert last(recipe("--stage", "4", *after, code=2)) == (
        f"run.sh: stage 4 was done {difference.format(exp=exp)}: choose another --exp, "
        f"or rm {exp}/.train.* to continue this training with the change"
    )
    for mark in exp.glob(".train.*"):
        mark.unlink()
    assert stages(recipe("--stage", "4", "--stop-stage", "4", *after)) == [4]


def test_an_argument_that_is_a_file_is_compared_by_its_content(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("a: 1")
    recipe("--stop-stage", "4", "conf.yaml")
    assert skipped(recipe("--stop-stage", "4", str(tmp_path / "conf.yaml"))) == [1, 4]
    (tmp_path / "conf.yaml").write_text("a: 2")
    assert f"now arguments={tmp_path}/exp {tmp_path}/conf.yaml (checksum" in recipe("conf.yaml", code=2)


def test_a_stage_that_was_redone_with_the_same_result_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    (tmp_path / "data" / ".prepare.done").unlink()
    again = recipe()
    assert (stages(again), skipped(again)) == ([1], [4, 6, 7, 8])


def test_a_corpus_that_was_redone_with_another_result_is_not_trained_on_silently(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe()
    (tmp_path / "data" / ".prepare.done").unlink()
    printed = recipe("--corpus", "two", code=2)
    assert stages(printed) == [1]
    checksum = r"cuts_a\.jsonl \(checksum \d+, 4 bytes\) cuts_b\.jsonl \(checksum \d+, 4 bytes\)"
    assert re.fullmatch(
        rf"run\.sh: stage 4 was done with cuts={checksum}, now cuts={checksum}: choose another --exp, "
        rf"or rm -r {tmp_path}/exp to train again",
        last(printed),
    )
    # Not even if only the mark is deleted: the trainer would continue the old run.
    (tmp_path / "exp" / ".train.done").unlink()
    assert last(recipe("--corpus", "two", code=2)).startswith("run.sh: stage 4 was begun with cuts=")
    # Stages that do not train are done again.
    printed = recipe("--corpus", "two", "--stage", "6", "--stop-stage", "6")
    assert stages(printed) == [6] and "stage 6: was done with cuts=cuts_a.jsonl" in printed
    # A single stage also notices.
    assert "stage 7 was done with labels=cuts_5.jsonl" in recipe("--stage", "7", "--stop-stage", "7", code=2)


def test_a_deleted_run_is_trained_again_and_what_builds_on_it_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe("--", "a.b=1")
    subprocess.run(["rm", "-r", tmp_path / "exp"], check=True)
    printed = recipe("--", "a.b=2", code=2)
    assert stages(printed) == [4] and skipped(printed) == [1, 6]
    assert "run.sh: stage 7 was done with exp=exp at u0 (checksum" in last(printed)
    subprocess.run(["rm", "-r", tmp_path / "exp_5"], check=True)
    assert stages(recipe("--", "a.b=2")) == [7, 8]


def test_decoding_is_redone_after_the_fine_tuning_was(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    recipe("--stage", "8", "--lm", "toy")
    for mark in (tmp_path / "exp_5").glob(".train.*"):
        mark.unlink()
    printed = recipe("--stage", "7", "--stop-stage", "7")
    assert stages(printed) == [7]
    printed = recipe("--stage", "8", "--stop-stage", "8", "--lm", "toy")
    assert stages(printed) == [8, 8] and "stage 8: was done with tuned=exp_5 at u0 (checksum" in printed
    assert skipped(recipe("--lm", "toy")) == [1, 4, 6, 7, 8, 8]
    assert skipped(recipe()) == [1, 4, 6, 7, 8]
    assert "stage 8 was done with lm=toy, now lm=other" in recipe("--lm", "other", code=2)


def test_two_experiments_share_the_data(recipe: Recipe) -> None:
    recipe("--exp", "a")
    assert stages(recipe("--exp", "b", "--minutes", "7")) == [4, 6, 7, 8]
    for options in (["--exp", "a"], ["--exp", "b", "--minutes", "7"]):
        assert skipped(recipe(*options)) == [1, 4, 6, 7, 8]


def test_an_interrupted_stage_may_be_repeated_with_other_inputs(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "fail_in_prepare").touch()
    recipe("--corpus", "typo", code=1)
    (tmp_path / "fail_in_prepare").unlink()
    assert stages(recipe("--corpus", "one", "--stop-stage", "1")) == [1]
    # A training that failed at its start, before its first checkpoint, too.
    (tmp_path / "fail_in_start").touch()
    recipe("--", "a.b=typo", code=1)
    (tmp_path / "fail_in_start").unlink()
    assert stages(recipe("--stop-stage", "4", "a.b=1")) == [4]


def test_an_interrupted_training_continues_with_the_same_inputs_only(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "fail_in_train").touch()
    recipe("--", "a.b=1", code=1)
    (tmp_path / "fail_in_train").unlink()
    assert last(recipe(code=2)) == (
        f"run.sh: stage 4 was begun with a.b=1, now without: choose another --exp, "
        f"or rm {tmp_path}/exp/.train.* to continue this training with the change"
    )
    assert stages(recipe("--", "a.b=1")) == [4, 6, 7, 8]


def test_an_interrupted_repetition_leaves_no_mark(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    labels = tmp_path / "data" / ".cuts_5.jsonl.done"
    (tmp_path / "data" / "cuts_a.jsonl").write_text("other\n")
    (tmp_path / "data" / "cuts_5.jsonl").unlink()
    (tmp_path / "data" / "cuts_5.jsonl").mkdir()  # so that stage 6 fails
    recipe("--stage", "6", "--stop-stage", "6", code=1)
    assert not labels.exists()


def test_a_deleted_output_file_is_made_again(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    (tmp_path / "data" / "cuts_5.jsonl").unlink()
    assert stages(recipe()) == [6]


def test_deleted_data_do_not_count_as_other_data(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    subprocess.run(["rm", "-r", tmp_path / "data"], check=True)
    assert skipped(recipe("--stage", "7")) == [7, 8]
    assert stages(recipe()) == [1, 6]


def test_a_folder_can_be_moved(recipe: Recipe, tmp_path: Path) -> None:
    recipe("--stage", "1", "--stop-stage", "1")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert skipped(recipe("--data", "elsewhere", "--stop-stage", "1")) == [1]


def test_an_option_given_for_an_earlier_stage_must_agree_with_it(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    assert skipped(recipe("--stage", "8")) == [8]
    assert skipped(recipe("--stage", "8", "--corpus", "one")) == [8]
    assert last(recipe("--stage", "8", "--corpus", "two", code=2)) == (
        f"run.sh: stage 1 was done with corpus=one, now corpus=two: choose another --data, "
        f"or rm {tmp_path}/data/.prepare.done and begin with --stage 1 to redo it"
    )


def test_the_mark_of_an_older_version_counts_and_its_line_says_so(recipe: Recipe, tmp_path: Path) -> None:
    recipe()
    mark = tmp_path / "data" / ".prepare.done"
    mark.write_text("2026-11-28 09:00:00\n")
    printed = recipe("--corpus", "two", "--stop-stage", "1")
    assert printed == (
        f"stage 1: done already, by an older version that did not record its inputs (rm {mark} to redo)\n"
    )


def test_stage_marks_are_text_that_people_read(recipe: Recipe, tmp_path: Path) -> None:
    recipe("--", "a.b=1")
    lines = (tmp_path / "exp" / ".train.done").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lines[0])
    assert lines[1:3] == ["a.b=1", f"arguments={tmp_path}/exp"]
    assert lines[3].startswith("reads cuts=cuts_a.jsonl (checksum ")


def test_a_file_that_a_setting_names_is_compared_by_its_content(recipe: Recipe, tmp_path: Path) -> None:
    letters = tmp_path / "letters.txt"
    letters.write_text("a\nb\n")
    recipe("--", "objective.vocabulary=letters.txt")
    assert skipped(recipe("--", "objective.vocabulary=letters.txt")) == [1, 4, 6, 7, 8]
    letters.write_text("a\nc\n")
    printed = recipe("--", "objective.vocabulary=letters.txt", code=2)
    assert re.search(rf"with objective.vocabulary={letters} \(checksum \d+, 4 bytes\), now objective.vocab", printed)


def test_what_the_recipe_writes_into_the_corpus_is_not_the_corpus(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "corpus [1]").mkdir()
    (tmp_path / "corpus").symlink_to("corpus [1]")
    (tmp_path / "corpus" / "a.wav").write_bytes(bytes(100))
    options = ("--corpus", "corpus", "--data", "corpus/data", "--exp", "corpus/exp")
    recipe(*options)
    assert skipped(recipe(*options)) == [1, 4, 6, 7, 8]
    (tmp_path / "corpus" / "b.wav").write_bytes(bytes(20))
    assert "(2 files, 120 bytes)" in recipe(*options, code=2)


def test_a_folder_is_compared_by_what_is_in_it(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "deep" / "a.wav").write_bytes(bytes(100))
    (tmp_path / "corpus" / "loop").symlink_to("../corpus")
    (tmp_path / "current").symlink_to("corpus")
    recipe("--corpus", "corpus", "--stop-stage", "1")
    assert skipped(recipe("--corpus", "current/", "--stop-stage", "1")) == [1]
    (tmp_path / "corpus" / "b.wav").write_bytes(bytes(20))
    real = tmp_path / "corpus"
    assert (
        f"run.sh: stage 1 was done with corpus={real} (1 files, 100 bytes), now corpus={real} (2 files, 120 bytes): "
    ) in recipe("--corpus", "corpus", "--stop-stage", "1", code=2)
