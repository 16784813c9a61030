"""What `w2vscale data prepare` found in a corpus, and what became of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from w2vscale.corpora.finding import TRANSCRIPT, Unusable
from w2vscale.corpora.manifests import PreparedManifest
from w2vscale.errors import UserError, counted
from w2vscale.files import write_text

ALWAYS_ALLOWED = 10  # unusable files or utterances that never stop a command, however small the corpus is
SHOWN = 15  # rows of the table for files that are not audio


@dataclass
class Report:
    """The files of a corpus by what became of them, and what was done with their text and speech."""

    manifests: list[PreparedManifest] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)  # audio files by suffix
    unit: str = "file"  # what is counted for the limit on what is unusable: files, or utterances of a list
    units: int = 0  # used ones
    unusable: list[Unusable] = field(default_factory=list)  # audio files, transcripts and folders
    others: Counter[tuple[str, str]] = field(default_factory=Counter)  # other files by suffix and reason
    left_out: list[tuple[str, str]] = field(default_factory=list)  # audio files among them by path, and the reason
    notes: Counter[str] = field(default_factory=Counter)  # what a user should know, and how often it happened
    headers_read: int = 0
    headers_unchanged: int = 0  # known from an earlier call
    seconds: float = 0.0  # of the audio files that are used, if they were searched for speech
    seconds_of_speech: float = 0.0

    def check(self, where: Path, used: int, *, strict: bool, limit: float) -> None:
        """Raise UserError if too much is unusable: anything with `strict`, or more than the fraction `limit`.

        `used` is the number of files or utterances (`unit`) that can be used.
        """
        unit, bad = self.unit, sum(one.units for one in self.unusable)
        total = used + bad
        if not bad and not used:
            raise UserError(f"{where}: no speech was found in any of the files")
        if not bad:
            return
        first = f"{where / self.unusable[0].path}: {self.unusable[0].reason}"
        others = f" (and {bad - 1:,} more of {counted(total, unit)})" if bad > 1 else ""
        if strict:
            raise UserError(f"{first}{others}; without --strict, such {unit}s are left out")
        if not used:
            raise UserError(f"{first}{others}; no usable {unit} is left")
        if bad > max(ALWAYS_ALLOWED, limit * total):
            raise UserError(f"{first}{others}: that is {bad / total:.1%}, above --max-bad-fraction {limit:g}")

    @property
    def incomplete(self) -> bool:
        """Whether there are files that were not used."""
        return bool(self.unusable) or any(reason != TRANSCRIPT for _, reason in self.others)

    def rows(self) -> list[tuple[str, int, str]]:
        """Suffix, number of files and what became of them: used ones, unusable ones, then others."""
        rows = [(suffix, count, "used") for suffix, count in sorted(self.used.items())]
        examples: dict[tuple[str, str], list[Unusable]] = defaultdict(list)
        for one in self.unusable:
            examples[Path(one.path).suffix.lower(), one.kind].append(one)
        for (suffix, _), found in sorted(examples.items()):
            files, lost = len({one.path for one in found}), sum(one.units for one in found)
            utterances = f"{counted(lost, 'utterance')} " if self.unit == "utterance" else ""
            example = ", for example" if len({one.reason for one in found}) > 1 else ""
            rows.append((suffix, files, f"{utterances}left out{example}: {found[0].path}: {found[0].reason}"))
        others = self.others.most_common()
        rows += [(suffix, count, reason) for (suffix, reason), count in others[:SHOWN]]
        rest: Counter[str] = Counter()
        for (_, reason), count in others[SHOWN:]:
            rest[reason] += count
        return rows + [("other suffixes", count, reason) for reason, count in rest.most_common()]

    def write(self, path: Path) -> None:
        """Write the report as JSON. Raises UserError if it cannot be written."""
        document = {
            "manifests": [
                {"path": str(one.path), "utterances": one.utterances, "hours": one.hours} for one in self.manifests
            ],
            "used": dict(sorted(self.used.items())),
            "unusable": [self._lost(one) for one in self.unusable],
            "other_files": [
                {"suffix": suffix, "reason": reason, "files": count}
                for (suffix, reason), count in self.others.most_common()
            ],
            "left_out": [{"path": path, "reason": reason} for path, reason in self.left_out],
            "notes": dict(+self.notes),
        }
        if self.seconds:
            document["speech"] = {
                "hours": self.seconds / 3600,
                "hours_of_speech": self.seconds_of_speech / 3600,
                "share": self.seconds_of_speech / self.seconds,
            }
        write_text(path, json.dumps(document, indent=1) + "\n")

    def _lost(self, one: Unusable) -> dict[str, str | int]:
        entry: dict[str, str | int] = {"path": one.path, "kind": one.kind, "reason": one.reason}
        return entry if self.unit == "file" else {**entry, "utterances": one.units}
