"""A table of results from the figures that `w2vscale evaluate --output` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vscale.errors import UserError
from w2vscale.evaluation.bootstrap import relative_reduction

BASELINE = "_scratch"
"""A run NAME is compared with the run NAME_scratch."""

EDITS = ("substitutions", "deletions", "insertions")
OF_PRETRAINING = {"accuracy", "update", "utterances", "contrastive_bits"}
OF_WRITING = {"wer", "cer", "word_interval", "character_interval", "cuts", "decoding", "utterances"}


@dataclass(frozen=True)
class Result:
    """One file of figures; `run` is the name of its folder."""

    run: str
    file: Path
    figures: dict[str, Any]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """The files' figures.

    Raises:
        UserError: a file cannot be read, or holds no figures of an evaluation.
    """
    found = []
    for path in paths:
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(figures, dict) or not (figures.keys() >= OF_PRETRAINING or figures.keys() >= OF_WRITING):
            raise UserError(f"{path}: no figures of pretraining or --wer, as w2vscale evaluate --output writes them")
        found.append(Result(path.resolve().parent.name, path, figures))
    return found


def results_page(results: Sequence[Result], title: str) -> str:
    """Markdown: pretraining's figures, error rates with their intervals, and each run against its baseline.

    Runs are compared where both wrote the same utterances by the same decoding.
    """
    lines = [f"# {title}", ""]
    if pretraining := [one for one in results if "accuracy" in one.figures]:
        lines += ["| pretraining | update | utterances | contrastive loss | accuracy |", "|---|---|---|---|---|"]
        lines += [
            f"| {one.run} | {one.figures['update']:,} | {one.figures['utterances']:,.0f} "
            f"| {one.figures['contrastive_bits']:.3f} bits | {one.figures['accuracy']:.3f} |"
            for one in pretraining
        ]
        lines.append("")
    if scores := [one for one in results if "wer" in one.figures]:
        lines += ["| fine-tuned | test set | decoding | WER (95 %) | CER (95 %) |", "|---|---|---|---|---|"]
        lines += [
            f"| {one.run} | {', '.join(one.figures['cuts'])} | {one.figures['decoding']} "
            f"| {_rate(one, 'wer', 'word_interval')} | {_rate(one, 'cer', 'character_interval')} |"
            for one in scores
        ]
        lines.append("")
    for one in scores:
        for other in scores:
            same = all(one.figures[key] == other.figures[key] for key in ("cuts", "decoding"))
            if same and other.run == one.run + BASELINE:
                lines.append(_compared(one, other))
    return "\n".join(lines).rstrip() + "\n"


def _rate(result: Result, rate: str, interval: str) -> str:
    low, high = result.figures[interval]
    return f"{result.figures[rate]:.1%} ({low:.1%} to {high:.1%})"


def _compared(one: Result, baseline: Result) -> str:
    told = []
    for unit, name in (("words", "WER"), ("characters", "CER")):
        ours, theirs = (
            {
                said["utterance"]: (sum(said[unit][kind] for kind in EDITS), said[unit]["reference"])
                for said in result.figures["utterances"]
            }
            for result in (one, baseline)
        )
        if not any(errors for errors, _ in theirs.values()):
            told.append(f"{name} not comparable (the baseline makes no errors)")
            continue
        value, low, high = relative_reduction(ours, theirs)
        if value >= 0.0:
            told.append(f"{name} lower by {value:.1%} (95 %: {_bound(low)} to {_bound(high)})")
        else:
            told.append(f"{name} higher by {-value:.1%} (95 %: {_bound(0.0 - high)} to {_bound(0.0 - low)})")
    return (
        f"- `{one.run}` against `{baseline.run}` on {', '.join(one.figures['cuts'])}, {one.figures['decoding']}: "
        f"{', '.join(told)}, relative."
    )


def _bound(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "no bound"
