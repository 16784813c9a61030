"""Count the labels that transcripts give, and what of them is not in the vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from w2vscale.data.decoding import AudioError
from w2vscale.data.transcripts import Transcripts, refuse_overhang, transcript
from w2vscale.data.vocabulary import show_symbol
from w2vscale.errors import counted

if TYPE_CHECKING:
    from lhotse.cut import Cut

LISTED = 10  # symbols that a line names; the others are counted


@dataclass
class LabelCounts:
    """Labels of the transcripts of utterances. An unknown symbol counts as a label."""

    labels: int = 0
    unknown_labels: int = 0
    unknown: Counter[str] = field(default_factory=Counter)  # what they stand for
    transcripts: int = 0
    with_unknown: int = 0  # transcripts with unknown symbols
    untranscribed: int = 0  # utterances without a transcript
    overhanging: int = 0  # utterances with text that is not in their audio

    @property
    def unknown_share(self) -> float:
        """Fraction of the labels that are unknown symbols; 0 without labels."""
        return self.unknown_labels / max(self.labels, 1)

    def describe(self, symbol: str | None) -> str:
        """Say all of this in one line. `symbol` is that of unknown labels; without one, their utterances are left out.

        The most frequent unknown symbols come first.
        """
        unknown = "none of them unknown"
        if self.unknown:
            listed = [f"{show_symbol(one)} {count:,}" for one, count in self.unknown.most_common(LISTED)]
            others = [counted(len(self.unknown) - LISTED, "other")] if len(self.unknown) > LISTED else []
            what = symbol or "not in objective.vocabulary"
            unknown = f"{self.unknown_share:.2%} of them {what}: {', '.join(listed + others)}"
        line = f"{counted(self.labels, 'label')} in {counted(self.transcripts, 'transcript')}, {unknown}"
        left_out = {
            "without a transcript": self.untranscribed,
            "with text that is not in their audio": self.overhanging,
            "with symbols that are unknown, and no <unk> in the vocabulary": self.with_unknown if symbol is None else 0,
        }
        reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count)
        return f"{line}; utterances left out: {reasons}" if reasons else line


def count_labels(spelling: Transcripts, cuts: Iterable[Cut]) -> LabelCounts:
    """Count the labels of the transcripts of utterances."""
    found = LabelCounts()
    for cut in cuts:
        try:
            refuse_overhang(cut)
        except AudioError:
            found.overhanging += 1
            continue
        labels, unknown = spelling.encode(transcript(cut))
        if not labels:
            found.untranscribed += 1
            continue
        found.transcripts += 1
        found.labels += len(labels)
        found.unknown_labels += labels.count(spelling.unknown_label)
        found.unknown.update(unknown)
        found.with_unknown += bool(unknown)
    return found
