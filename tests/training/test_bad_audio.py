"""A corpus with every kind of damage: the run finishes, reports each once, and has the losses of the good audio."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.batches import utterance_of_masked_frames
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import Config, load_config
from w2vscale.data.indexed import MicroBatches
from w2vscale.data.inputs import AudioBatch
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.files import read_metrics
from w2vscale.objectives.contrastive import ContrastiveInputs
from w2vscale.training import run as run_module
from w2vscale.training.bad_audio import BadAudioLog
from w2vscale.training.train import train

UTTERANCES = 180
RATE = 16_000


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def _three_hours(path: Path) -> None:
    with soundfile.SoundFile(path, "w", RATE, 1, format="FLAC") as file:
        for _ in range(3 * 60):
            file.write(np.zeros(60 * RATE, np.int16))


def _zeros(path: Path) -> None:
    write_audio(path, np.zeros(soundfile.info(path).frames, np.float32))


def _with_nan(path: Path) -> None:
    audio, _ = soundfile.read(path)
    audio[7000] = np.nan
    soundfile.write(path, audio, RATE, format="WAV", subtype="FLOAT")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (_truncate, "undecodable", "cannot be decoded"),
    "empty": (lambda path: path.write_bytes(b""), "empty", "not readable as audio"),
    "zeros": (_zeros, "silent", "all samples are equal"),
    "not finite": (_with_nan, "not finite", "not finite"),
    "another rate": (lambda path: write_audio(path, noise(2.0, rate=8_000), rate=8_000), "mismatched", "8000 Hz"),
    "stereo": (
        lambda path: write_audio(path, np.stack([noise(2.0)] * 2, axis=1)),
        "mismatched",
        "number of channels is 2",
    ),
    "text": (write_text, "undecodable", "not readable as audio"),
    "0.01 s": (lambda path: write_audio(path, noise(0.01)), "mismatched", "duration is 0.010 s"),
    "3 hours": (_three_hours, "mismatched", "duration is 10800.000 s"),
}
"""What happens to a file after its manifest was made; the kind, and a part of the reason, of its report."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A good corpus, the same with 5 % damaged files, and the kind of damage by utterance."""
    manifests = []
    for name in ("good", "damaged"):
        folder = tmp_path_factory.mktemp(name)
        paths = [
            write_audio(folder / f"u{n:03d}.flac", noise(0.6 + 0.005 * (n % 50), seed=n)) for n in range(UTTERANCES)
        ]
        manifests.append(write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths]))
    harmed = {f"u{20 * number + 3:03d}": kind for number, kind in enumerate(DAMAGE)}
    assert len(harmed) == 0.05 * UTTERANCES
    for name, kind in harmed.items():
        DAMAGE[kind][0](manifests[1].parent / f"{name}.flac")
    return manifests[0], manifests[1], harmed


def settings(manifest: Path, *overrides: str) -> Config:
    # 24 micro-batches per epoch, four per update.
    return load_config("base", [*MICRO_RUN, f"data.train={manifest}", "batch.max_seconds=6", *overrides])


def without(batch: MicroBatch, rows: list[int]) -> MicroBatch:
    """A micro-batch without some of its utterances."""
    inputs, audio = batch.inputs, batch.inputs.audio
    kept = torch.tensor([row for row in range(batch.utterances) if row not in rows])
    of_kept = torch.isin(utterance_of_masked_frames(inputs), kept)
    # No wider than the longest that is left: the noise of dropout depends on the shape.
    samples, frames = int(audio.lengths_B[kept].max()), int(audio.frames_B[kept].max())
    return replace(
        batch,
        inputs=ContrastiveInputs(
            audio=AudioBatch(
                waveforms_BS=audio.waveforms_BS[kept, :samples],
                lengths_B=audio.lengths_B[kept],
                frames_B=audio.frames_B[kept],
                mask_BT=audio.mask_BT[kept, :frames],
                samples=tuple(audio.lengths_B[kept].tolist()),
                frames=tuple(audio.frames_B[kept].tolist()),
                utterances_K=torch.tensor([kept.numel()]),
                utterances=(kept.numel(),),
            ),
            masked_B=inputs.masked_B[kept],
            frame_M=inputs.frame_M[of_kept],
            slot_M=inputs.slot_M[of_kept],
            negatives_MK=inputs.negatives_MK[of_kept],
            masked=tuple(inputs.masked_B[kept].tolist()),
        ),
    )


def test_the_run_finishes_reports_each_once_and_has_the_losses_of_the_rest(
    corpora: tuple[Path, Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, damaged, harmed = corpora
    config = settings(damaged, "data.max_bad_fraction=0.1", "trainer.updates=12")
    assert train(config, tmp_path / "damaged") == 0
    entries = [json.loads(line) for line in (tmp_path / "damaged/logs/bad_audio.jsonl").read_text().splitlines()]
    assert sorted(entry["utterance"] for entry in entries) == sorted(harmed)
    for entry in entries:
        _, kind, reason = DAMAGE[harmed[entry["utterance"]]]
        assert entry["kind"] == kind and reason in entry["reason"], entry
        assert entry["file"] == str(damaged.parent / f"{entry['utterance']}.flac")

    class Weighed(MicroBatches):
        """Reads good audio, then takes out what the other run cannot read."""

        def __getitem__(self, number: int) -> MicroBatch:
            batch = super().__getitem__(number)
            names = [self.corpus.cut(int(u)).id for u in self.plan.micro_batch(number).utterances]
            return without(batch, [row for row, name in enumerate(names) if name in harmed])

    monkeypatch.setattr(run_module, "MicroBatches", Weighed)
    assert train(settings(good, "trainer.updates=12"), tmp_path / "good") == 0
    curves = [
        [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl", "train")]
        for name in ("damaged", "good")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_above_the_limit_the_run_stops(corpora: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    _, damaged, _ = corpora
    with pytest.raises(UserError) as caught:
        train(settings(damaged, "data.max_bad_fraction=0.03", "trainer.updates=40"), tmp_path)
    message = str(caught.value)
    assert "\n" not in message and f"all are listed in {tmp_path / 'logs' / 'bad_audio.jsonl'}" in message
    assert "utterances are unusable, above data.max_bad_fraction=0.03; the last: u" in message


class TestLog:
    def log(self, exp: Path, *, limit: float = 0.05, enough: int = 20) -> BadAudioLog:
        (exp / "logs").mkdir(exist_ok=True)
        return BadAudioLog(exp, Ranks(), limit=limit, enough=enough)

    def lines(self, exp: Path) -> list[str]:
        return [json.loads(line)["utterance"] for line in (exp / "logs/bad_audio.jsonl").read_text().splitlines()]

    def test_an_utterance_is_reported_once_also_in_a_resumed_run(self, tmp_path: Path) -> None:
        first = BadAudio("u1", "/a/b.flac", "missing", "no such file")
        log = self.log(tmp_path)
        log.report([first, first])
        log.report([first])
        self.log(tmp_path).report([first, BadAudio("u2", "/a/c.flac", "silent", "is silent")])
        assert self.lines(tmp_path) == ["u1", "u2"]

    def test_an_incomplete_line_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        self.log(tmp_path).report([BadAudio("u1", "a", "missing", "no such file")])
        path = tmp_path / "logs" / "bad_audio.jsonl"
        path.write_text(path.read_text() + '{"utterance": "u2", "fi')
        self.log(tmp_path).report([BadAudio("u3", "a", "missing", "no such file")])
        assert [line[:17] for line in path.read_text().splitlines()] == [
            '{"utterance": "u1', '{"utterance": "u2', '{"utterance": "u3',
        ]  # fmt: skip

    def test_the_summary_counts_by_kind(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        assert log.summary() is None
        log.report([BadAudio(f"u{n}", "a", kind, "") for n, kind in enumerate(["silent", "missing", "silent"])])
        assert log.summary() == (
            f"3 utterances were left out at least once (2 silent, 1 missing): {tmp_path / 'logs' / 'bad_audio.jsonl'}"
        )

    def test_the_summary_counts_utterances_that_were_used_apart(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        log.report([BadAudio("u1", "a", "unknown symbols", "", left_out=False), BadAudio("u2", "a", "silent", "")])
        expected = "1 utterance was left out at least once (1 silent); 1 utterance was used, but noted (1 unknown symb"
        for each in (log, self.log(tmp_path)):
            assert (each.summary() or "").startswith(expected)

    def test_an_utterance_left_out_in_one_epoch_and_used_in_another_counts_as_both(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        left_out = BadAudio("u1", "a", "missing", "no such file")
        used = BadAudio("u1", "a", "unknown symbols", "has '?'", left_out=False)
        log.report([left_out])
        log.report([used, left_out])
        log.report([replace(used, utterance="u2")])
        assert self.lines(tmp_path) == ["u1", "u1", "u2"]
        expected = "1 utterance was left out at least once (1 missing); 2 utterances were used, but noted (2 unknown s"
        for each in (log, self.log(tmp_path)):
            each.report([used, left_out])
            assert (each.summary() or "").startswith(expected)
        assert self.lines(tmp_path) == ["u1", "u1", "u2"]

    def test_the_limit_is_checked_once_enough_utterances_were_seen(self, tmp_path: Path) -> None:
        log = self.log(tmp_path)
        log.count(seen=10, unusable=5)
        log.report([BadAudio("u1", "/a/b.flac", "missing", "no such file")])
        with pytest.raises(UserError) as caught:
            log.count(seen=10, unusable=0)
        assert str(caught.value) == (
            "5 of 20 utterances are unusable, above data.max_bad_fraction=0.05; "
            "the last: u1 (/a/b.flac): no such file; "
            f"all are listed in {tmp_path / 'logs' / 'bad_audio.jsonl'}"
        )
