"""Error rates and other evaluations of runs, from the JSON files that `w2vscale evaluate --output` has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from w2vscale.analysis.report.html import Html, element, join, section, table
from w2vscale.analysis.report.reading import Run
from w2vscale.analysis.report.scales import MISSING
from w2vscale.evaluation.edits import aligned_words
from w2vscale.evaluation.results import EDITS, find_results

WORST = 20  # utterances of a test set
MOST_SPEAKERS = 200


class Found(NamedTuple):
    """One evaluation of a run."""

    run: str
    file: str  # in the folder of the run
    metrics: Mapping[str, Any]


def evaluations(runs: Sequence[Run]) -> Html:
    """The sections on error rates and on other metrics; nothing if no run was evaluated."""
    found: list[Found] = []
    damaged: list[str] = []
    for run in runs:
        paths, results, lines = find_results(run.exp)
        found += [
            Found(run.name, str(path.relative_to(run.exp)), result.metrics)
            for path, result in zip(paths, results, strict=True)
        ]
        damaged += lines
    scores = [one for one in found if "wer" in one.metrics]
    others = [one for one in found if "wer" not in one.metrics]
    notes = [element("p", line, class_="note") for line in damaged]
    return join([_scores(scores) if scores else "", _metrics(others) if others else "", *notes])


def _metrics(found: Sequence[Found]) -> Html:
    names = list(dict.fromkeys(name for one in found for name in one.metrics["table"]))
    rows = [
        ("file", *(one.file for one in found)),
        ("update", *(f"{one.metrics['update']:,}" for one in found)),
        ("utterances", *(f"{one.metrics['utterances']:,.0f}" for one in found)),
        *((name, *(one.metrics["table"].get(name, MISSING) for one in found)) for name in names),
    ]
    shown = table(("metric", *(one.run for one in found)), rows, label="evaluations")
    return section("Evaluations", shown, name="evaluations")


def _scores(found: Sequence[Found]) -> Html:
    rows = []
    for run, _, metrics in found:
        words = metrics.get("words")
        rows.append(
            (
                run,
                ", ".join(metrics["cuts"]),
                metrics["decoding"],
                _rate(metrics["wer"], *metrics["word_interval"]),
                _rate(metrics["cer"], *metrics["character_interval"]),
                " / ".join(f"{words[kind]:,}" for kind in EDITS) if words else MISSING,
                f"{len(metrics['utterances']):,}" + (f", {len(bad)} skipped" if (bad := metrics.get("bad")) else ""),
            )
        )
    columns = (
        "run", "test set", "decoding", "WER (95 %)", "CER (95 %)", "words subst. / del. / ins.", "utterances",
    )  # fmt: skip
    return section(
        "Error rates",
        table(columns, rows, label="error rates", numbers=True),
        *(_details(one) for one in found),
        name="errors",
    )


def _details(one: Found) -> Html:
    """The speakers of a test set, and its worst utterances."""
    metrics = one.metrics
    title = f"{one.run} on {', '.join(metrics['cuts'])}, {metrics['decoding']}: speakers and worst utterances"
    wrong = [utterance for utterance in metrics["utterances"] if _errors(utterance["words"]) > 0]
    wrong.sort(key=lambda each: (-_word_rate(each["words"]), -_errors(each["words"]), each["utterance"]))
    texts = [element("li", *_utterance(each)) for each in wrong[:WORST]]
    legend = element(
        "p",
        "Below each word of the reference is what was recognised instead: ",
        _pair("word", "other"),
        " substitution (S), ",
        _pair("word", ""),
        " deletion (D), ",
        _pair("", "word"),
        " insertion (I).",
        class_="note alignment",
    )
    heading = element("h3", f"The {len(texts)} utterances with the highest WER" if texts else "No errors")
    return element(
        "details",
        element("summary", title),
        _speakers(metrics.get("speakers", {}), title),
        heading,
        *([legend, element("ol", *texts, class_="utterances")] if texts else []),
    )


def _speakers(speakers: Mapping[str, Mapping[str, int]], title: str) -> Html:
    if not speakers:
        return Html("")
    ordered = sorted(speakers.items(), key=lambda each: (-_word_rate(each[1]), each[0]))
    rows = [
        (name, f"{counts['reference']:,}", f"{_word_rate(counts):.1%}", *(f"{counts[kind]:,}" for kind in EDITS))
        for name, counts in ordered[:MOST_SPEAKERS]
    ]
    columns = ("speaker", "words", "WER", *EDITS)
    return table(columns, rows, label=f"speakers, {title}", numbers=True)


def _utterance(one: Mapping[str, Any]) -> list[Html]:
    speaker = f", speaker {one['speaker']}" if "speaker" in one else ""
    heading = element("p", f"{one['utterance']}{speaker}: {_word_rate(one['words']):.0%}", class_="name")
    if "reference" not in one or "hypothesis" not in one:
        return [heading]
    pairs = aligned_words(one["reference"], one["hypothesis"])
    return [heading, element("p", *(_pair(*pair) for pair in pairs), class_="alignment", dir="auto")]


def _pair(reference: str, hypothesis: str) -> Html:
    """A word above what was recognised; the spaces between pairs let the line wrap there."""
    kind = "" if reference == hypothesis else "D" if not hypothesis else "S" if reference else "I"
    parts = [element("span", reference or "∗", class_="reference"), " "]
    if kind:
        parts += [element("span", hypothesis or "∗", class_="hypothesis"), " ", element("b", kind)]
    return join([element("span", *parts, class_=f"pair {kind}".rstrip()), " "])


def _errors(counts: Mapping[str, int]) -> int:
    return sum(counts[kind] for kind in EDITS)


def _word_rate(counts: Mapping[str, int]) -> float:
    """Errors per word, as `EditCounts.rate`."""
    errors = _errors(counts)
    return errors / counts["reference"] if counts["reference"] else float(errors > 0)


def _rate(rate: float, low: float, high: float) -> str:
    return f"{rate:.1%} ({low:.1%} to {high:.1%})"
