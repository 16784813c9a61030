"""The log of utterances that could not be used: each is named once, whichever rank, epoch or restart met it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import Ranks, gather_from_ranks
from w2vscale.errors import UserError


class BadAudioLog:
    """`logs/bad_audio.jsonl`, written by rank 0; and whether what was met is too much.

    Args:
        exp: the run's folder.
        limit: share of the utterances seen that may be unusable (`data.max_bad_fraction`).
        enough: utterances after which the share is taken seriously.
    """

    def __init__(self, exp: Path, ranks: Ranks, *, limit: float, enough: int) -> None:
        self.path = exp / "logs" / "bad_audio.jsonl"
        self.ranks = ranks
        self.limit = limit
        self.enough = enough
        self.seen = self.unusable = 0
        self._last: BadAudio | None = None
        self._reasons = self._read() if ranks.is_main else {}

    def report(self, bad: Sequence[BadAudio]) -> None:
        """Log what all ranks met. Collective."""
        everything = [audio for of_rank in gather_from_ranks(list(bad)) for audio in of_rank]
        new = {(audio.utterance, audio.file): audio for audio in everything}
        new = {key: audio for key, audio in new.items() if key not in self._reasons}
        if new and self.ranks.is_main:
            with self.path.open("a", encoding="utf-8") as lines:
                for audio in new.values():
                    lines.write(json.dumps(asdict(audio)) + "\n")
        self._reasons |= {key: audio.kind for key, audio in new.items()}
        self._last = everything[-1] if everything else self._last

    def count(self, *, seen: int, unusable: int) -> None:
        """Add up what an update has met on all ranks.

        Raises:
            UserError: too much is unusable.
        """
        self.seen += seen
        self.unusable += unusable
        if self.seen >= self.enough and self.unusable > self.limit * self.seen:
            last = self._last
            example = f"; the last: {last.utterance} ({last.file}): {last.reason}" if last else ""
            raise UserError(
                f"{self.unusable} of {self.seen} utterances are unusable, above data.max_bad_fraction={self.limit:g}"
                f"{example}; all are listed in {self.path}"
            )

    def summary(self) -> str | None:
        """How many utterances could not be used so far, by kind of reason; None if all could."""
        if not self._reasons:
            return None
        kinds = Counter(self._reasons.values()).most_common()
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        return f"{len(self._reasons)} utterances could not be used ({listed}): {self.path}"

    def _read(self) -> dict[tuple[str, str], str]:
        """Utterances that an earlier part of the run has named."""
        if not self.path.is_file():
            return {}
        reasons = {}
        text = self.path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            self.path.write_text(text + "\n", encoding="utf-8")
        for line in text.splitlines():
            try:
                found = json.loads(line)
                reasons[str(found["utterance"]), str(found["file"])] = str(found["kind"])
            except (ValueError, KeyError, TypeError):  # a line that a kill cut short
                continue
        return reasons
