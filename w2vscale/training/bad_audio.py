"""The log of utterances that could not be used, or were used and have something to note.

Each is listed once, whichever rank, epoch or restart met it; twice if it was left out in one and used in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import Ranks, errors_on_all_ranks, gather_from_ranks
from w2vscale.errors import UserError, counted
from w2vscale.files import append_records, read_records


class BadAudioLog:
    """`logs/bad_audio.jsonl` in the run folder `exp`, written by rank 0, and the limit on what it may hold.

    `limit` is the largest fraction of utterances that may be unusable (`data.max_bad_fraction`). It is checked after
    `enough` utterances.
    """

    def __init__(self, exp: Path, ranks: Ranks, *, limit: float, enough: int) -> None:
        self.path = exp / "logs" / "bad_audio.jsonl"
        self.ranks = ranks
        self.limit = limit
        self.enough = enough
        self.seen = self.unusable = 0
        self._last: BadAudio | None = None
        with errors_on_all_ranks():
            self._kinds = self._read() if ranks.is_main else {}

    def report(self, bad: Sequence[BadAudio]) -> list[BadAudio]:
        """Log what all ranks met. Return what is listed for the first time. Collective."""
        everything = [audio for of_rank in gather_from_ranks(list(bad)) for audio in of_rank]
        new = {(audio.utterance, audio.file, audio.left_out): audio for audio in everything}
        new = {key: audio for key, audio in new.items() if key not in self._kinds}
        with errors_on_all_ranks():
            if new and self.ranks.is_main:
                append_records(self.path, [asdict(audio) for audio in new.values()])
        self._kinds |= {key: audio.kind for key, audio in new.items()}
        self._last = everything[-1] if everything else self._last
        return list(new.values())

    def count(self, *, seen: int, unusable: int) -> None:
        """Add what an update has met on all ranks. Raises UserError if too many utterances are unusable."""
        self.seen += seen
        self.unusable += unusable
        if self.seen >= self.enough and self.unusable > self.limit * self.seen:
            example = f"; the last: {self._last}" if self._last else ""
            raise UserError(
                f"{self.unusable} of {self.seen} utterances are unusable, above data.max_bad_fraction={self.limit:g}"
                f"{example}; all are listed in {self.path}"
            )

    def summary(self) -> str | None:
        """Say how many utterances were left out and how many only noted, by kind of reason; None if there are none.

        An utterance that was left out may have been used in another epoch: nothing here says that it was not.
        """
        parts = []
        for what, left_out in (("left out at least once", True), ("used, but noted", False)):
            kinds = Counter(kind for (_, _, omitted), kind in self._kinds.items() if omitted == left_out)
            if kinds:
                listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
                were = "was" if kinds.total() == 1 else "were"
                parts.append(f"{counted(kinds.total(), 'utterance')} {were} {what} ({listed})")
        return f"{'; '.join(parts)}: {self.path}" if parts else None

    def _read(self) -> dict[tuple[str, str, bool], str]:
        """What an earlier part of the run has logged: the kind by utterance, file, and whether it was left out."""
        try:
            records = read_records(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        kinds = {}
        for record in records:
            with suppress(KeyError):
                kinds[str(record["utterance"]), str(record["file"]), bool(record["left_out"])] = str(record["kind"])
        return kinds
