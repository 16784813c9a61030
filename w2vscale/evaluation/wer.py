"""Word and character error rates of a fine-tuned model, computed with jiwer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import Transcripts
from w2vscale.distributed.process_group import ALONE, Ranks, gather_as_found
from w2vscale.errors import UserError
from w2vscale.evaluation.bootstrap import confidence_interval
from w2vscale.inference.decoding import BeamSearch
from w2vscale.inference.pretrained import Pretrained
from w2vscale.inference.transcription import transcribe
from w2vscale.inference.utterances import collect, utterances_by_name


@dataclass(frozen=True)
class EditCounts:
    """The edits that turn the reference into the hypothesis, in words or characters."""

    reference: int  # length of the reference
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """The number of edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per word or character of the reference; 0 or 1 if the reference is empty."""
        return self.errors / self.reference if self.reference else float(self.errors > 0)


@dataclass(frozen=True)
class UtteranceScore:
    """The score of one utterance."""

    utterance: str
    speaker: str
    reference: str
    hypothesis: str
    words: EditCounts
    characters: EditCounts


@dataclass(frozen=True)
class Score:
    """The score of a test set. The intervals are 95 % confidence intervals by bootstrap over utterances."""

    utterances: list[UtteranceScore]
    words: EditCounts
    characters: EditCounts
    word_interval: tuple[float, float]
    character_interval: tuple[float, float]
    speakers: dict[str, EditCounts]  # word errors of each speaker
    bad: list[BadAudio]

    def worst(self, count: int) -> list[UtteranceScore]:
        """The utterances with the highest word error rates; none without errors."""
        wrong = [one for one in self.utterances if one.words.errors]
        return sorted(wrong, key=lambda one: (-one.words.rate, -one.words.errors, one.utterance))[:count]


def score_checkpoint(
    pretrained: Pretrained,
    cuts: Sequence[Path],
    *,
    search: BeamSearch | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Score:
    """Transcribe the utterances of manifests and compare with their transcripts. Collective.

    Both sides are in NFC and in the letter case of the vocabulary. If its text is spaced (phones), each symbol counts
    as a word. Utterances without usable audio, or whose transcript is missing or overhangs the audio, are skipped and
    listed in the score. The ranks share the work, and each returns the whole score. For `search`, `progress` and `log`
    see `transcribe`. Raises UserError if the model has no output layer, jiwer is not installed, a manifest is unusable,
    or no utterance could be scored.
    """
    spelling = Transcripts(pretrained.objective.vocabulary, spaced=pretrained.objective.spaced)
    utterances = utterances_by_name(cuts)
    unscored = {name: one.overhang for name, one in utterances.items() if one.overhang is not None}
    for name, one in utterances.items():
        if not one.transcript.strip():
            unscored[name] = AudioError("no transcript", "has no transcript")
    transcribed = [one for name, one in utterances.items() if name not in unscored]
    bad = [utterances[name].bad(error) for name, error in unscored.items()]
    hypotheses = transcribe(pretrained, transcribed, search=search, ranks=ranks, progress=progress, log=log)
    found, unusable = collect(gather_as_found(hypotheses))
    if not found:
        raise UserError(f"{cuts[0]}: no utterance has both a transcript and usable audio")
    scored = []
    for name, text in sorted((one.utterance, one.text) for one in found):
        reference = spelling.normalised(utterances[name].transcript)
        scored.append(score(name, reference, text, speaker=utterances[name].speaker))
    return summarise(scored, bad + unusable)


def score(utterance: str, reference: str, hypothesis: str, *, speaker: str = "unknown") -> UtteranceScore:
    """Compare a hypothesis with its reference. Raises UserError if jiwer is not installed."""
    try:
        import jiwer
    except ImportError:
        raise UserError("jiwer is not installed: pip install 'w2vscale[decode]'") from None
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return UtteranceScore(utterance, speaker, reference, hypothesis, _counts(words), _counts(characters))


def summarise(utterances: list[UtteranceScore], bad: list[BadAudio]) -> Score:
    """Add up the scores of utterances."""
    words, characters = [one.words for one in utterances], [one.characters for one in utterances]
    word_errors, character_errors = ([(one.errors, one.reference) for one in unit] for unit in (words, characters))
    by_speaker: dict[str, list[EditCounts]] = {}
    for one in utterances:
        by_speaker.setdefault(one.speaker, []).append(one.words)
    return Score(
        utterances=utterances,
        words=_sum(words),
        characters=_sum(characters),
        word_interval=confidence_interval(word_errors),
        character_interval=confidence_interval(character_errors),
        speakers={speaker: _sum(counts) for speaker, counts in sorted(by_speaker.items())},
        bad=bad,
    )


def describe_rate(counts: EditCounts, interval: tuple[float, float], unit: str) -> str:
    """Format an error rate with its confidence interval and edit counts."""
    return (
        f"{counts.rate:.2%} (95 %: {interval[0]:.2%} to {interval[1]:.2%}) of {counts.reference:,} {unit}: "
        f"{counts.substitutions:,} substitutions, {counts.deletions:,} deletions, {counts.insertions:,} insertions"
    )


def _counts(output: Any) -> EditCounts:
    reference = output.hits + output.substitutions + output.deletions
    return EditCounts(reference, output.substitutions, output.deletions, output.insertions)


def _sum(counts: Sequence[EditCounts]) -> EditCounts:
    return EditCounts(*map(sum, zip(*map(astuple, counts), strict=True)))
