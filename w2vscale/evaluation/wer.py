"""Word and character error rates of a fine-tuned checkpoint, by jiwer, with what a person wants to know of them."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import Transcripts, transcript
from w2vscale.distributed.process_group import ALONE, Ranks, gather_as_found
from w2vscale.errors import UserError
from w2vscale.evaluation.bootstrap import interval
from w2vscale.inference.decoding import BeamSearch
from w2vscale.inference.pretrained import Pretrained
from w2vscale.inference.sources import sources_by_name
from w2vscale.inference.transcription import transcribe


@dataclass(frozen=True)
class Errors:
    """Edits that make the hypothesis of the reference, in words or characters."""

    reference: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def total(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per word or character of the reference."""
        return self.total / self.reference if self.reference else float(self.total > 0)


@dataclass(frozen=True)
class Scored:
    """One utterance: what was said, what was written."""

    utterance: str
    speaker: str
    reference: str
    hypothesis: str
    words: Errors
    characters: Errors
    alignment: str


@dataclass(frozen=True)
class Score:
    """Of a test set; intervals are of 95 %, by bootstrap over utterances."""

    utterances: list[Scored]
    words: Errors
    characters: Errors
    word_interval: tuple[float, float]
    character_interval: tuple[float, float]
    speakers: dict[str, Errors]
    """In words."""
    bad: list[BadAudio]

    def worst(self, count: int) -> list[Scored]:
        """The utterances with most words wrong, relative to their length."""
        wrong = [one for one in self.utterances if one.words.total]
        return sorted(wrong, key=lambda one: (-one.words.rate, -one.words.total, one.utterance))[:count]


def score_checkpoint(
    pretrained: Pretrained,
    cuts: Sequence[Path],
    *,
    search: BeamSearch | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Score:
    """Transcribe the utterances of manifests, greedily or by a beam search, and compare with their transcripts.

    Both sides are in the vocabulary's case. Utterances without transcript or usable audio are left out and named.
    Several `ranks` share the work, and each returns the whole score. Collective.

    Raises:
        UserError: the checkpoint is only pretrained, jiwer is not installed, a manifest cannot be used, or nothing
            could be compared.
    """
    spelling = Transcripts(pretrained.config.ctc.vocabulary)
    said, bad = {}, []
    for name, source in sources_by_name(cuts).items():
        if transcript(source.cut).strip():
            said[name] = source
        else:
            bad.append(BadAudio(name, source.file, "no transcript", "has no transcript"))
    scored = []
    written = transcribe(pretrained, [*said.values()], search=search, ranks=ranks, progress=progress, log=log)
    for found in gather_as_found(written):
        if isinstance(found, BadAudio):
            bad.append(found)
        else:
            cut = said[found.utterance].cut
            speaker = next((str(part.speaker) for part in cut.supervisions if part.speaker), "unknown")
            scored.append(score(cut.id, spelling.normalised(transcript(cut)), found.text, speaker=speaker))
    if not scored:
        raise UserError(f"{cuts[0]}: no utterance has both a transcript and usable audio")
    return summarise(sorted(scored, key=lambda one: one.utterance), bad)


def score(utterance: str, reference: str, hypothesis: str, *, speaker: str = "unknown") -> Scored:
    """Compare two texts."""
    jiwer = _jiwer()
    words = jiwer.process_words([reference], [hypothesis])
    characters = jiwer.process_characters([reference], [hypothesis])
    alignment = jiwer.visualize_alignment(words, show_measures=False, skip_correct=False)
    rows = [line for line in alignment.splitlines() if line.strip() and not line.startswith("===")]
    return Scored(utterance, speaker, reference, hypothesis, _errors(words), _errors(characters), "\n".join(rows))


def summarise(utterances: list[Scored], bad: list[BadAudio]) -> Score:
    """Add up; intervals from 1000 draws of as many utterances with replacement."""
    words, characters = ([getattr(one, unit) for one in utterances] for unit in ("words", "characters"))
    by_speaker: dict[str, list[Errors]] = {}
    for one in utterances:
        by_speaker.setdefault(one.speaker, []).append(one.words)
    return Score(
        utterances=utterances,
        words=_sum(words),
        characters=_sum(characters),
        word_interval=_interval_of(words),
        character_interval=_interval_of(characters),
        speakers={speaker: _sum(errors) for speaker, errors in sorted(by_speaker.items())},
        bad=bad,
    )


def page(found: Score, title: str, *, worst: int = 100) -> str:
    """The score as one page of HTML: rates, speakers, and the worst utterances with their alignments."""
    rows = "".join(
        f"<tr><td>{html.escape(speaker)}<td>{errors.reference}<td>{errors.rate:.2%}"
        for speaker, errors in found.speakers.items()
    )
    utterances = "".join(
        f"<h3>{html.escape(one.utterance)} ({html.escape(one.speaker)}): {one.words.rate:.1%}</h3>"
        f"<pre>{html.escape(one.alignment)}</pre>"
        for one in found.worst(worst)
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto}pre{overflow-x:auto}"
        "td,th{padding:0 1em 0 0;text-align:left}</style>"
        f"<h1>{html.escape(title)}</h1><p>{told(found.words, found.word_interval, 'words')}"
        f"<p>{told(found.characters, found.character_interval, 'characters')}"
        f"<h2>Speakers</h2><table><tr><th>speaker<th>words<th>WER{rows}</table>"
        f"<h2>The worst utterances</h2>{utterances or '<p>None is wrong.'}"
    )


def told(errors: Errors, interval: tuple[float, float], unit: str) -> str:
    """A rate in words."""
    return (
        f"{errors.rate:.2%} (95 %: {interval[0]:.2%} to {interval[1]:.2%}) of {errors.reference:,} {unit}: "
        f"{errors.substitutions:,} substitutions, {errors.deletions:,} deletions, {errors.insertions:,} insertions"
    )


def _errors(output: Any) -> Errors:
    reference = output.hits + output.substitutions + output.deletions
    return Errors(reference, output.substitutions, output.deletions, output.insertions)


def _sum(errors: Sequence[Errors]) -> Errors:
    fields = zip(*((e.reference, e.substitutions, e.deletions, e.insertions) for e in errors), strict=True)
    return Errors(*map(sum, fields))


def _interval_of(errors: Sequence[Errors]) -> tuple[float, float]:
    return interval([one.total for one in errors], [one.reference for one in errors])


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError:
        raise UserError("jiwer is not installed: pip install 'w2vscale[decode]'") from None
    return jiwer
