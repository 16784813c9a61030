"""Training metrics: accumulated between log lines, then written to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from w2vscale.checkpoint.format import TrainState
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import gather_from_ranks, largest_over_ranks, sum_over_ranks
from w2vscale.errors import counted
from w2vscale.evaluation.validation import reduce_sums
from w2vscale.files import read_log, read_metrics, regular, write_text, writing
from w2vscale.hardware import memory_used
from w2vscale.objectives import Sums, add_sums

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Meter:
    """Accumulates sums, counts and times of this rank since the last `read`."""

    def __init__(self, sampling_rate: int, device: torch.device) -> None:
        self.sampling_rate = sampling_rate
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.sums: Any = None
        self.audio = self.padded = self.frames = self.masked = self.updates = 0
        self.norms: list[float] = []
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, window: Sequence[MicroBatch], sums: Sums, norm: float, *, data_seconds: float) -> None:
        """Add one update with this gradient norm, which waited `data_seconds` for its window."""
        if skipped := not math.isfinite(norm):  # its non-finite values would spoil the sums of the other updates
            zero: Any = type(sums)
            sums = zero(*(torch.zeros_like(field) for field in sums))
        self.sums = sums if self.sums is None else add_sums(self.sums, sums)
        self.audio += sum(batch.audio_samples for batch in window)
        self.padded += sum(batch.padded_samples for batch in window)
        self.updates += 1
        if not skipped:
            self.frames += sum(batch.frames for batch in window)
            self.masked += sum(batch.masked_frames for batch in window)
            self.norms.append(norm)
        self.data_seconds += data_seconds

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` that were not spent on updates from the rates."""
        self.started += seconds

    def read(self, metrics: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """Return the metrics over all ranks since the last `read`, and reset. Collective."""
        assert self.sums is not None
        elapsed = time.perf_counter() - self.started
        values = metrics(reduce_sums(self.sums))
        audio, padded, frames, masked = sum_over_ranks([self.audio, self.padded, self.frames, self.masked])
        values |= {
            "masked_fraction": masked / max(frames, 1.0),
            "padding": 1.0 - audio / max(padded, 1.0),
            "grad_norm": sum(self.norms) / len(self.norms) if self.norms else math.nan,
            "grad_norm_max": max(self.norms, default=math.nan),
            "audio_seconds_per_second": audio / self.sampling_rate / elapsed,
            "updates_per_second": self.updates / elapsed,
            # The slowest rank counts, because all others wait for it.
            "data_wait_fraction": max(gather_from_ranks(self.data_seconds)) / elapsed,
        }
        values["peak_memory_gib"] = largest_over_ranks([memory_used(self.device)])[0] / 2**30
        self._reset()
        return values


class MetricsWriter:
    """Writes `metrics.jsonl` and TensorBoard files on rank 0.

    A run that continues from a checkpoint first deletes the metrics that were written after it. TensorBoard shows all
    metrics by updates, and those in `by_audio` also by seconds of audio seen.
    """

    def __init__(
        self,
        exp: Path,
        *,
        resumed_at: TrainState,
        tensorboard: bool,
        by_audio: Collection[str],
        enabled: bool,
        log: Callable[[str], None],
    ) -> None:
        self.path, self._folder = exp / "metrics.jsonl", exp / "tb"
        self._by_audio = frozenset(by_audio)
        self._enabled, self._tensorboard, self._log = enabled, tensorboard, log
        self._lines: TextIO | None = None
        self._curves: tuple[SummaryWriter, SummaryWriter] | None = None  # by updates, and by seconds of audio seen
        self.continue_from(resumed_at)

    def continue_from(self, state: TrainState) -> None:
        """Delete the metrics that were written after `state`. Raises UserError if a file cannot be written."""
        self.close()
        if not self._enabled:
            return
        with writing(self.path):
            if self.path.is_file():
                records, unreadable = read_log(self.path)
                if unreadable > (1 if records else 0):  # a killed process may leave its last line incomplete
                    self._log(f"warning: {self.path}: dropping {counted(unreadable, 'line')} that cannot be read")
                kept = [line for line in records if _update_of(line) <= state.update]
                write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self._lines = open(self.path, "a", encoding="utf-8", opener=regular)  # noqa: SIM115
        if self._tensorboard:
            # Imported here because the import takes seconds and most commands do not need it.
            from torch.utils.tensorboard import SummaryWriter

            with writing(self._folder):
                self._curves = (
                    SummaryWriter(str(self._folder), purge_step=state.update + 1),
                    SummaryWriter(str(self._folder / "by_seconds_seen"), purge_step=int(state.audio_seconds) + 1),
                )

    def read(self, split: str) -> list[dict[str, Any]]:
        """Return the lines of one split in metrics.jsonl; none on a rank that does not write it."""
        return read_metrics(self.path, split) if self._enabled else []

    def close(self) -> None:
        """Close the files."""
        for file in (self._lines, *(self._curves or ())):
            with suppress(OSError):  # `write` has reported it
                if file is not None:
                    file.close()

    def write(self, split: str, update: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and one point to each curve. Non-finite values become null in the file.

        Raises UserError if a file cannot be written.
        """
        if self._lines is None:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with writing(self.path):
            self._lines.write(json.dumps({"split": split, "update": update, **finite}) + "\n")
            self._lines.flush()
        if self._curves is not None:
            by_updates, by_seconds = self._curves
            with writing(self._folder):
                for key, value in values.items():
                    by_updates.add_scalar(f"{split}/{key}", value, update)
                for key in self._by_audio & values.keys():
                    by_seconds.add_scalar(f"{split}/{key}", values[key], round(values["hours_seen"] * 3600))
                by_updates.flush()
                by_seconds.flush()


def _update_of(line: Mapping[str, Any]) -> float:
    """The update of a line of metrics.jsonl; infinite if the line is damaged."""
    update = line.get("update")
    return update if isinstance(update, int) else math.inf
