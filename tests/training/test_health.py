"""What counts as trouble in the log lines of a run: recorded runs that are well, and published or made-up ones that are
not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.objectives import Objective, load
from w2vscale.training.health import ENOUGH, RECENT, History, examine, examine_all

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_runs.json").read_text())
"""Metrics of runs: see the field `source` of each. Of those that are well, they are of every single update."""

TROUBLED = {
    "a hundred times the learning rate": [(90, "collapse"), (110, "solved")],
    "ten times the learning rate": [(200, "norm"), (300, "chance")],
    "a hundred times the learning rate from update 300 on": [(320, "spike"), (420, "chance")],
}
"""Runs in trouble, and the warnings of each."""

BASE = {
    "loss": 2.5, "grad_norm": 0.6, "contrastive": 2.3, "accuracy": 0.5,
    "code_perplexity_0": 90.0, "code_perplexity_1": 110.0,
}  # fmt: skip
"""A log line of `base` in the middle of a run that is well."""


class Course:
    """A run's health over its log lines."""

    def __init__(self, source: str, *overrides: str, every: int = 100) -> None:
        self.config, self.objective = load(source, ["schedule.warmup_updates=10", *overrides])
        self.every, self.lines = every, list[dict[str, Any]]()
        self.histories = [History()]

    def add(self, *lines: dict[str, float]) -> Course:
        for line in lines:
            update = self.every * (len(self.lines) + 1)
            self.lines.append({"update": update, **line})
            self.histories.append(after(self.histories[-1], self.lines[-1:], self.config, self.objective))
        return self

    @property
    def now(self) -> History:
        return self.histories[-1]

    @property
    def warned(self) -> list[tuple[int, str]]:
        """Update and kind of every warning."""
        pairs = zip(self.histories, self.histories[1:], self.lines, strict=False)
        return [(line["update"], one.kind) for old, new, line in pairs for one in new.new_since(old)]


def after(history: History, lines: Iterable[dict[str, Any]], config: Config, objective: Objective) -> History:
    for line in lines:
        history = examine(history, line["update"], line, config=config, objective=objective)
    return history


def merged(lines: Sequence[dict[str, float]], every: int) -> list[dict[str, float]]:
    """The means over `every` updates, which is close to what a run logs."""
    parts = [lines[start : start + every] for start in range(0, len(lines), every)]
    return [{key: sum(line[key] for line in part) / len(part) for key in part[0]} for part in parts]


def recorded(name: str, merge: int = 1) -> Course:
    """A recorded run, with one line for `merge` of its lines."""
    run = RECORDED[name]
    columns = run["metrics"]
    lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    course = Course(run["preset"], *run["settings"], every=run["every"] * merge).add(*merged(lines, merge))
    assert len(course.lines) == math.ceil(len(lines) / merge) >= 12
    return course


class TestRecordedRuns:
    @pytest.mark.parametrize("every", [1, 10, 20])
    @pytest.mark.parametrize("name", [name for name in RECORDED if name not in TROUBLED])
    def test_those_that_are_well_warn_of_nothing(self, name: str, every: int) -> None:
        """But for a single update of `best_rq_tiny` at the end of warm-up, in which the loss rises, too."""
        warned = [(33, "norm")] if (name, every) == ("best_rq_tiny", 1) else []
        assert recorded(name, every).warned == warned

    @pytest.mark.parametrize("name", TROUBLED)
    def test_those_in_trouble_say_so(self, name: str) -> None:
        assert recorded(name).warned == TROUBLED[name]

    def test_the_start_is_noisy_high_and_at_chance(self) -> None:
        """Loss and gradient norm fall by large factors, and the accuracy is at chance."""
        start = [
            BASE | {"loss": loss, "grad_norm": norm, "contrastive": 4.7, "accuracy": 0.009}
            for loss, norm in [(30.0, 90.0), (9.0, 4.0), (5.1, 12.0), (4.9, 1.0), (4.8, 0.3), (4.7, 0.4), (4.7, 0.5)]
        ]
        assert Course("base").add(*start).warned == []


class TestCollapse:
    @pytest.mark.parametrize(("entries", "fewest"), [(2, 1.18), (16, 2.0), (64, 2.82), (320, 4.22)])  # entries ** 0.25
    def test_the_threshold_follows_the_size_of_the_codebook(self, entries: int, fewest: float) -> None:
        course = Course("base", f"objective.codebook_entries={entries}")
        course.add(BASE | {"code_perplexity_1": fewest + 0.01}, BASE | {"code_perplexity_1": fewest - 0.01})
        assert course.warned == [(200, "collapse")]
        assert f"codebook 1 has collapsed: {fewest - 0.01:.2f} of {entries} entries in use" in str(
            course.now.lasting(1)
        )

    @pytest.mark.parametrize("perplexity", [25.8, 17.8])
    def test_published_runs_that_learn_have_not_collapsed(self, perplexity: float) -> None:
        """Sums over two codebooks with an accuracy of 0.49: fairseq issues 3391 (update 22,200) and 2981 (1,064)."""
        half = perplexity / 2
        line = BASE | {"accuracy": 0.49, "code_perplexity_0": half, "code_perplexity_1": half}
        assert Course("base").add(line).warned == []

    def test_a_published_collapse(self) -> None:
        """Transformers issue 14387: contrast_loss 0, perplexity 2.000 over both codebooks, grad_norm 8e-19."""
        line = BASE | {"loss": 0.0997, "contrastive": 0.0, "accuracy": 1.0, "grad_norm": 8e-19}
        line |= {"code_perplexity_0": 1.0, "code_perplexity_1": 1.0}
        course = Course("base").add(*[BASE] * 9, *[line] * 3)
        assert course.warned == [(1000, "collapse"), (1000, "solved")]
        trouble = course.now.troubles["collapse"]
        assert (trouble.since, trouble.lines) == (900, 3)
        assert "codebooks 0, 1 have collapsed: 1.00, 1.00 of 320" in trouble.finding.text

    def test_zero_switches_it_off(self) -> None:
        line = BASE | {"code_perplexity_0": 0.9999999}  # what rounding makes of a single entry
        assert Course("base", "health.min_codes=0").add(line).warned == []


class TestChance:
    CHANCE = BASE | {"accuracy": 0.019, "contrastive": 4.61}
    """The accuracy is twice 1/101, because negatives with the codes of the positive are left out."""

    def test_it_counts_after_a_share_of_the_updates(self) -> None:
        course = Course("base", "trainer.updates=100000", every=1000).add(*[self.CHANCE] * 12)
        assert course.warned == [(10_000, "chance")]
        trouble = course.now.troubles["chance"]
        assert (trouble.since, trouble.lines) == (0, 3), "no checkpoint is from before it"

    def test_short_runs_have_some_updates_more(self) -> None:
        assert Course("tiny", every=10).add(*[self.CHANCE] * 40).warned == [(300, "chance")]

    def test_a_run_that_falls_back_to_it(self) -> None:
        course = Course("base", "trainer.updates=10000", every=1000).add(*[BASE] * 3, self.CHANCE, self.CHANCE)
        assert course.warned == [(4000, "chance")]
        assert course.now.troubles["chance"].since == 3000

    def test_equal_similarities_have_full_accuracy_and_the_loss_of_chance(self) -> None:
        """Loss of 6.658 bits with a gradient norm of 0: fairseq issue 3109."""
        line = BASE | {"accuracy": 1.0, "contrastive": math.log(101), "grad_norm": 0.0}
        assert Course("base", "trainer.updates=1000", every=300).add(line).warned == [(300, "chance")]

    def test_best_rq_has_to_be_better_than_the_most_frequent_code(self) -> None:
        books = {f"code_perplexity_{book}": 250.0 for book in range(4)}
        line = {"loss": 6.0, "grad_norm": 1.0, "accuracy": 0.1, "most_frequent": 0.1, **books}
        settings = ("trainer.updates=1000",)
        assert Course("best_rq_base", *settings, every=300).add(line).warned == [(300, "chance")]
        assert Course("best_rq_base", *settings, every=300).add(line | {"accuracy": 0.101}).warned == []
        silent = Course("best_rq_base", *settings).add(line | books | {"code_perplexity_2": 1.3})
        assert silent.warned == [(100, "collapse")]
        assert "listen to data.train" in str(silent.now.lasting(1))

    def test_ctc_has_to_output_more_than_blanks_once_the_encoder_learns(self) -> None:
        line = {"loss": 2.9, "grad_norm": 1.0, "blank_fraction": 1.0, "encoder_frozen": 1.0}
        course = Course("ctc_10min", "objective.vocabulary=letters", every=1000).add(*[line] * 10)
        assert course.warned == []
        course.add(line | {"encoder_frozen": 0.0})
        assert course.warned == [(11_000, "chance")]
        assert course.add(line | {"encoder_frozen": 0.0, "blank_fraction": 0.998}).now.troubles == {}

    def test_lines_of_earlier_versions_are_read(self) -> None:
        """CTC had no `blank_fraction`. What a line lacks says nothing."""
        line = {"update": 2000, "loss": 2.9, "grad_norm": 1.0, "encoder_frozen": 0.0}
        config, objective = load("ctc_10min", ["objective.vocabulary=letters"])
        assert examine_all([line, {"update": 3000}], config=config, objective=objective).update == 2000
        assert examine_all([line], config=config, objective=objective).troubles == {}


class TestSpike:
    def test_it_lasts_until_the_loss_comes_down(self) -> None:
        course = Course("base").add(*[BASE] * 8, *[BASE | {"loss": 3.8}] * 30)
        assert course.warned == [(900, "spike")]
        assert "it is 3.8, and its running median 2.5 (health.loss_ratio=1.2)" in str(course.now.lasting(1))
        assert course.now.troubles["spike"].lines == 30, "the spike does not become usual"
        course.add(BASE, BASE | {"loss": 3.8})
        assert course.warned == [(900, "spike"), (4000, "spike")]
        assert course.now.troubles["spike"].since == 3900

    def test_it_lasts_until_it_is_half_way_down(self) -> None:
        """So a loss that stays near the limit is one spike."""
        near = [
            BASE | {"loss": loss, "grad_norm": norm} for loss, norm in [(3.1, 7.0), (2.9, 4.0), (3.01, 5.9), (2.8, 3.1)]
        ]
        course = Course("base").add(*[BASE] * 8, *near)
        assert course.warned == [(900, "spike"), (900, "norm")]
        assert [trouble.lines for trouble in course.now.troubles.values()] == [4, 4]
        assert course.add(BASE | {"loss": 2.74, "grad_norm": 2.9}).now.troubles == {}

    def test_there_is_none_before_the_median_of_enough_lines(self) -> None:
        high = BASE | {"loss": 9.0}
        assert Course("base").add(*[BASE] * (ENOUGH - 1), high).warned == []
        assert Course("base").add(*[BASE] * ENOUGH, high).warned == [(100 * ENOUGH + 100, "spike")]

    def test_the_median_is_of_recent_lines(self) -> None:
        """A loss that falls slowly from 6 to 2 spikes at 4.6, which was usual long ago."""
        falling = [BASE | {"loss": 6.0 - 0.05 * step} for step in range(80)]
        course = Course("base").add(*falling, BASE | {"loss": 4.6})
        assert course.warned == [(8100, "spike")]
        assert len(course.now.losses) == RECENT

    def test_a_noisy_loss_has_none(self) -> None:
        """Fine-tuning on small updates, logged one by one."""
        noisy = [BASE | {"loss": loss} for loss in (0.3, 0.5, 0.2, 0.35, 0.6, 0.25, 0.4, 0.62, 0.28, 0.58)]
        assert Course("base").add(*noisy).warned == []
        assert Course("base").add(*noisy, BASE | {"loss": 2.0}).warned == [(1100, "spike")]

    def test_losses_are_compared_within_a_phase(self) -> None:
        """The encoder learns from update 1,000 on: the gradient has more parts, and the loss may jump."""
        line = {"loss": 1.0, "grad_norm": 1.0, "blank_fraction": 0.8, "encoder_frozen": 1.0}
        settings = ("objective.vocabulary=letters", "objective.freeze_encoder_updates=1000")
        after_it = line | {"loss": 2.0, "grad_norm": 30.0, "encoder_frozen": 0.0}
        course = Course("ctc_10min", *settings).add(*[line] * 10, *[after_it] * 9)
        assert course.warned == []
        assert Course("ctc_10min", *settings).add(*[line] * 9, after_it).warned == [(1000, "spike"), (1000, "norm")]


class TestNorm:
    def test_it_is_compared_with_its_median(self) -> None:
        course = Course("base").add(*[BASE] * 8, BASE | {"grad_norm": 5.9}, *[BASE | {"grad_norm": 6.1}] * 2)
        assert course.warned == [(1000, "norm")]
        assert "it is 6.1, and its running median 0.6 (health.norm_ratio=10)" in str(course.now.lasting(2))

    def test_it_may_grow_while_the_loss_falls(self) -> None:
        """A model that leaves the plateau at chance."""
        plateau, leaving = BASE | {"loss": 4.64, "grad_norm": 0.05}, BASE | {"loss": 4.6, "grad_norm": 0.9}
        course = Course("base").add(*[plateau] * 20, *[leaving] * 20, *[BASE] * 20)
        assert course.warned == []
        assert course.add(BASE | {"grad_norm": 6.1}).warned == [(6100, "norm")]

    def test_the_ratios_are_settings(self) -> None:
        line = BASE | {"grad_norm": 6.1, "loss": 3.8}
        settings = ("health.norm_ratio=11", "health.loss_ratio=1.6")
        assert Course("base", *settings).add(*[BASE] * 8, line).warned == []


class TestHistory:
    TROUBLED = (
        *[BASE] * 7, BASE | {"loss": 4.0}, BASE, BASE | {"loss": 4.0, "grad_norm": 9.0}, BASE | {"loss": math.nan},
        BASE | {"loss": 4.0}, *[BASE | {"code_perplexity_0": 1.0, "accuracy": 0.01}] * 4,
    )  # fmt: skip

    def course(self) -> Course:
        return Course("base", "trainer.updates=2000").add(*self.TROUBLED)

    def test_a_resumed_run_finds_what_an_uninterrupted_one_finds(self) -> None:
        """Wherever it is interrupted. The lines have been through JSON, which has no NaN."""
        course = self.course()
        lines = [{key: None if value != value else value for key, value in line.items()} for line in course.lines]
        kept = json.loads(json.dumps(lines))
        for count in range(len(lines) + 1):
            rebuilt = examine_all(kept[:count], config=course.config, objective=course.objective)
            assert rebuilt == course.histories[count]
            assert after(rebuilt, course.lines[count:], course.config, course.objective) == course.now

    def test_an_update_without_a_loss_changes_nothing(self) -> None:
        course = self.course()
        assert course.histories[11] == course.histories[10]
        assert course.warned[:3] == [(800, "spike"), (1000, "spike"), (1000, "norm")]
        assert course.histories[12].troubles["spike"].lines == 2

    def test_what_began_first_decides(self) -> None:
        course = self.course()
        assert course.now.lasting(5) is None
        lasting = course.now.lasting(3)
        assert lasting is not None and (lasting.finding.kind, lasting.since) == ("collapse", 1200)
        assert str(lasting).startswith("trouble since update 1200: codebook 0 has collapsed")


class TestSettings:
    def test_the_checkpoint_to_go_back_to_has_to_be_there_still(self) -> None:
        settings = ["health.action=roll_back", "checkpoint.every=1000", "logging.every=100", "checkpoint.keep_last=2"]
        assert load_config("base", [*settings, "health.patience=10"]).health.patience == 10
        message = (
            r"health\.action=roll_back goes back 1100 updates .* keep checkpoints of only 1000: raise checkpoint\."
        )
        with pytest.raises(UserError, match=message):
            load_config("base", [*settings, "health.patience=11"])
        load_config("base", [*settings, "health.patience=11", "health.action=stop"])

    @pytest.mark.parametrize("setting", ["loss_ratio=1", "norm_ratio=0.5", "patience=0", "min_codes=1.5", "action=no"])
    def test_values_that_make_no_sense_are_refused(self, setting: str) -> None:
        with pytest.raises(UserError, match=rf"health\.{setting.partition('=')[0]}"):
            load_config("base", [f"health.{setting}"])
