"""Features in chunks and batches equal those computed at once, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.audio import noise
from tests.helpers.micro import MICRO_MODEL
from tests.helpers.pretrained import difference, micro_pretrained
from w2vscale.config import load_config
from w2vscale.data.audio import AudioError
from w2vscale.inference.pretrained import Audio, ChunkFeatures, Pretrained, by_audio, split_into_chunks
from w2vscale.models.lengths import input_samples, output_frames

PRESETS = ("base", "large_lv60", "base_prenorm")
"""GroupNorm and post-LN; LayerNorm and pre-LN, on normalised waveforms; padded convolutions with GroupNorm."""

PEAKS = """
import sys
from pathlib import Path
import soundfile, torch
from tests.helpers.audio import noise
from tests.helpers.pretrained import micro_pretrained
from w2vscale.inference.features import write_features
torch.set_num_threads(1)
folder = Path(sys.argv[1])
convolutions = ["model.conv_layers=[[8,40,40],[8,8,8]]", "model.conv_norm_groups=8"]
model = micro_pretrained("base", *convolutions, "model.layers=1", "model.dim=8", "model.ffn_dim=8")
minute = noise(60.0)
for minutes in (2, 20):
    path = folder / f"{minutes}.wav"
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
        for _ in range(minutes):
            file.write(minute)
    found = write_features(model, [path], folder, chunk_seconds=8, overlap_seconds=1.5, batch_seconds=11)
    assert found.files == 1, found
    # ru_maxrss would start with the value of the parent process.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) >> 10)
"""


def _audio(samples: np.ndarray) -> Audio:
    return Audio(16_000, samples.size, lambda: iter([samples]))


def _collect(model: Pretrained, audios: list[Audio], *, batch_seconds: float) -> dict[tuple[int, int], list[Tensor]]:
    stream = model.stream(audios, layers=[0, 3], chunk_seconds=2.0, overlap_seconds=0.5, batch_seconds=batch_seconds)
    found = {}
    for number, chunk in stream:
        assert not isinstance(chunk, AudioError)
        found[number, chunk.first] = chunk.hidden
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seconds", [2.0, 2.01, 7.3])
def test_chunks_add_up_and_have_their_frames_in_place(preset: str, seconds: float) -> None:
    config = load_config(preset, MICRO_MODEL).model
    samples = round(seconds * 16_000)
    frames = output_frames(samples, config)
    found = split_into_chunks(frames, chunk_frames=50, overlap_frames=20)
    assert [chunk.first for chunk in found] == [0, *(chunk.last for chunk in found[:-1])]
    assert found[-1].last == frames
    assert all(chunk.last - chunk.first <= 50 for chunk in found)
    last = found[-1]
    assert output_frames(samples - 320 * last.begin, config) == frames - last.begin
    for wanted in (1, 2, 90):
        shortest = input_samples(wanted, config)
        assert output_frames(shortest, config) == wanted
        assert output_frames(shortest - 1, config) == wanted - 1


@pytest.mark.parametrize("preset", PRESETS)
def test_chunks_equal_the_whole_away_from_borders(preset: str) -> None:
    """Layer 0 is equal; above it attention sees a chunk in place of the whole, which no overlap can compensate."""
    model = micro_pretrained(preset, "model.max_frames=null")
    waveform = noise(45.0) * np.linspace(0.1, 1.0, 45 * 16_000, dtype=np.float32)
    whole = model.features(waveform, 16_000, chunk_seconds=100)
    seen = {}
    for overlap in (0.0, 1.4, 5.0):
        chunks = model.features(waveform, 16_000, chunk_seconds=10, overlap_seconds=overlap)
        seen[overlap] = difference(whole, chunks)
    print(preset, {overlap: [f"{value:.1e}" for value in values] for overlap, values in seen.items()})
    assert seen[0.0][0] > 0.1
    for overlap in (1.4, 5.0):
        assert seen[overlap][0] <= 1e-5
        assert max(seen[overlap][1:]) <= 2e-2
    # Without any context, what is wrong is wrong at the borders.
    alone = model.features(waveform, 16_000, layers=[0], chunk_seconds=10, overlap_seconds=0.0)[0]
    frames = torch.arange(len(alone))
    borders = torch.tensor(
        [chunk.first for chunk in split_into_chunks(len(alone), chunk_frames=500, overlap_frames=0)[1:]]
    )
    far = (frames.unsqueeze(1) - borders).abs().min(dim=1).values > 64 + 4
    assert far.sum() > 1500
    assert float((alone - whole[0])[far].abs().max() / whole[0].abs().max()) <= 1e-5


def test_chunks_are_grouped_by_audio() -> None:
    def chunk(first: int) -> ChunkFeatures:
        return ChunkFeatures(first, [], None)

    stream: list[tuple[int, ChunkFeatures | AudioError]] = [
        (0, chunk(0)), (0, chunk(50)),
        (1, chunk(0)), (1, AudioError("undecodable", "damaged")),
        (2, AudioError("missing", "no such file")),
        (3, chunk(0)),
    ]  # fmt: skip
    found: dict[int, list[int | str]] = {}
    for number, chunks in by_audio(iter(stream)):
        found[number] = []
        try:
            for one in chunks:
                found[number].append(one.first)
        except AudioError as error:
            found[number].append(error.kind)
    assert found == {0: [0, 50], 1: [0, "undecodable"], 2: ["missing"], 3: [0]}


@pytest.mark.parametrize("preset", PRESETS)
def test_batches_do_not_change_results(preset: str) -> None:
    model = micro_pretrained(preset)
    audios = [_audio(noise(seconds, seed=n)) for n, seconds in enumerate((0.7, 1.0, 1.0, 1.3, 5.0, 6.1))]
    alone = _collect(model, audios, batch_seconds=0.1)
    for batch_seconds in (2.5, 4.0, 100.0):
        together = _collect(model, audios, batch_seconds=batch_seconds)
        assert together.keys() == alone.keys()
        for place, expected in alone.items():
            for ours, theirs in zip(together[place], expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_forwards_are_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro_pretrained("base")
    shapes: list[tuple[int, int]] = []
    forward = Pretrained._encode

    def spy(self: Pretrained, parts: Sequence[Any], layers: Sequence[int]) -> Any:
        shapes.append((len(parts), max(part.samples.size for part in parts)))
        return forward(self, parts, layers)

    monkeypatch.setattr(Pretrained, "_encode", spy)
    _collect(model, [_audio(noise(1.0, seed=n)) for n in range(5)], batch_seconds=2.0)
    assert shapes == [(2, 16_000), (2, 16_000), (1, 16_000)]


@pytest.mark.long
def test_memory_does_not_depend_on_the_length(tmp_path: Path) -> None:
    """20 minutes of audio, whose samples alone are 73 MiB, need no more memory than 2 minutes."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    print(f"peak MiB after 2 minutes {short}, after 20 {long}")
    assert long - short <= 25
    assert np.load(tmp_path / "20.npy", mmap_mode="r").shape == (2, 60_000, 8)
