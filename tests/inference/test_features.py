"""Features of a trained model: as Transformers', in chunks and batches as at once, from every kind of audio."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse.augmentation.resample import resample
from safetensors.numpy import load_file
from torch import Tensor
from typer.testing import CliRunner

import w2vscale
from tests.helpers.audio import SmallCorpus, cut_of, noise, tone, write_audio, write_manifest, write_text
from tests.helpers.micro import MICRO_MODEL, MICRO_RUN
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.data.audio import AudioError, standardize
from w2vscale.errors import UserError
from w2vscale.inference import resampling
from w2vscale.inference.features import write_features
from w2vscale.inference.pretrained import Audio, Pretrained, load, windows_of
from w2vscale.interop.huggingface import huggingface_config, to_huggingface
from w2vscale.models.lengths import input_samples, output_frames
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining
from w2vscale.training.loop import train

PRESETS = ("base", "large_lv60", "base_prenorm")
"""GroupNorm and post-LN; LayerNorm and pre-LN, on normalised waveforms; padded convolutions with GroupNorm."""


def micro(preset: str, *overrides: str) -> Pretrained:
    config = load_config(preset, [*MICRO_MODEL, *overrides])
    torch.manual_seed(7)
    model = Wav2Vec2ForPretraining(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Pretrained(model, config)


def difference(a: dict[int, Tensor], b: dict[int, Tensor]) -> list[float]:
    """Of each layer, the largest difference as a part of b's largest value."""
    assert a.keys() == b.keys()
    assert all(a[layer].shape == b[layer].shape and a[layer].dtype == torch.float32 for layer in a)
    return [float((a[layer] - b[layer]).abs().max() / b[layer].abs().max()) for layer in a]


@pytest.fixture(scope="module")
def run(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("run")
    config = load_config("base", [*MICRO_RUN, f"data.train={small_corpus.train}", "trainer.updates=4"])
    train(config, exp)
    return exp


class TestModel:
    def test_load_opens_runs_and_checkpoints(self, run: Path) -> None:
        loaded = w2vscale.load(run)
        assert isinstance(loaded, w2vscale.Pretrained)
        assert not loaded.model.training
        assert loaded.config.model.layers == 3
        waveform = noise(1.0)
        first = loaded.features(waveform, 16_000)
        (checkpoint,) = (run / "checkpoints").glob("update_*")
        assert difference(first, load(str(checkpoint), device="cpu").features(waveform, 16_000)) == [0.0] * 4
        with pytest.raises(UserError, match="no such checkpoint"):
            load(run / "absent")
        write_text(run / "other" / "config.json")
        model = write_text(run / "model.pt")
        for path, form in ((run / "other", "huggingface"), (model, "fairseq")):
            with pytest.raises(UserError, match=f"; .*: w2vscale import {path} DIR --format {form}$"):
                load(path)
        with pytest.raises(UserError, match=r"no such checkpoint$"):
            load(write_text(run / "notes.txt"))
        with pytest.raises(UserError, match="device cudda: "):
            load(run, device="cudda")
        with pytest.raises(AttributeError, match="laod"):
            w2vscale.laod  # noqa: B018

    @pytest.mark.parametrize("preset", ["base", "large_lv60"])
    def test_layers_are_transformers_hidden_states(self, preset: str) -> None:
        transformers = pytest.importorskip("transformers")
        ours = micro(preset)
        config = ours.config.model
        theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config))).eval()
        theirs.load_state_dict(to_huggingface(ours.model.state_dict(), config))
        waveform = noise(2.0)
        given = standardize(waveform) if config.normalize_waveform else waveform
        with torch.no_grad():
            output: Any = theirs(torch.from_numpy(given).unsqueeze(0), output_hidden_states=True)
            encoded: Any = theirs.wav2vec2(torch.from_numpy(given).unsqueeze(0))
        found = ours.features(waveform, 16_000)
        assert max(difference(found, {n: h[0] for n, h in enumerate(output.hidden_states)})) <= 1e-5
        norm = ours.model.encoder.transformer.final_norm
        last = found[config.layers] if norm is None else norm(found[config.layers])
        assert difference({0: last}, {0: encoded.last_hidden_state[0]})[0] <= 1e-5

    def test_a_choice_of_layers(self) -> None:
        model = micro("base")
        waveform = noise(1.0)
        every = model.features(waveform, 16_000)
        some = model.features(waveform, 16_000, layers=[2, 0, 2])
        assert list(some) == [0, 2]
        assert difference(some, {layer: every[layer] for layer in some}) == [0.0, 0.0]
        several: tuple[Any, ...] = (2, np.int64(2))
        for one in several:
            assert difference(model.features(waveform, 16_000, layers=one), {2: every[2]}) == [0.0]

    def test_any_array_of_samples(self) -> None:
        model = micro("base")
        waveform = noise(1.0)
        expected = model.features(waveform, 16_000)
        stereo = np.stack([0.5 * waveform, 1.5 * waveform])
        tensor = torch.from_numpy(waveform)
        fixed = waveform.copy()
        fixed.flags.writeable = False
        same: tuple[Any, ...] = (
            tensor, tensor.clone().requires_grad_(), waveform.astype(np.float64), waveform[None], stereo,
            waveform[::-1].copy()[::-1], waveform.astype(">f4"), waveform.repeat(2)[::2], fixed, waveform.tolist(),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for other in same:
                assert max(difference(expected, model.features(other, 16_000))) <= 1e-5
            assert max(difference(expected, model.features(waveform, np.int16(16_000)))) <= 1e-5  # type: ignore[arg-type]
            model.features(tensor.bfloat16(), 16_000)

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_resampling_in_blocks_is_resampling_at_once(self, rate: int) -> None:
        waveform = noise(3.0, rate=rate)
        expected = resampling.get_or_create_resampler(rate, 16_000)(torch.from_numpy(waveform)).numpy()
        for size in (7, 1000, 1_000_000):
            if size == 7:
                blocks = iter([waveform[:7], waveform[7:14], waveform[14:]])
            else:
                blocks = (waveform[start : start + size] for start in range(0, waveform.size, size))
            found = np.concatenate(list(resampling.resampled(blocks, rate, 16_000)))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_odd_rates_have_the_filter_of_others(self, rate: int) -> None:
        waveform = noise(3.0, rate=rate)
        divisor = math.gcd(rate, 16_000)
        steps, wanted_steps = rate // divisor, 16_000 // divisor
        found = resampling._interpolated(waveform, resampling._filters(steps, wanted_steps), steps)
        # In double precision; in single, Lhotse's filters for 11,025 and its multiples are wrong by up to 1e-5.
        expected = resample(torch.from_numpy(waveform).double(), rate, 16_000).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)

    @pytest.mark.parametrize("rate", [11_127, 16_001, 22_254, 192_001])
    def test_odd_rates_take_little_memory(self, rate: int) -> None:
        waveform = tone(3.0, 1000.0, rate=rate)
        expected = tone(3.0, 1000.0)
        for size in (7777, 1_000_000):
            blocks = (waveform[start : start + size] for start in range(0, waveform.size, size))
            found = np.concatenate(list(resampling.resampled(blocks, rate, 16_000)))
            assert found.size == expected.size
            np.testing.assert_allclose(found[100:-100], expected[100:-100], rtol=0, atol=1e-3)
        assert resampling._filters(rate // math.gcd(rate, 16_000), 16_000 // math.gcd(rate, 16_000)).nbytes < 10e6

    @pytest.mark.parametrize("rate", [0, -16_000, 999, 500_001])
    def test_no_audio_has_such_a_rate(self, rate: int) -> None:
        with pytest.raises(UserError, match=f"waveform: sampling rate is {rate} Hz, not a whole number from 1,000"):
            micro("base").features(noise(1.0), rate)

    @pytest.mark.parametrize("rate", [16_000.0, "16000", None])
    def test_a_rate_is_a_whole_number(self, rate: Any) -> None:
        with pytest.raises(UserError, match=f"sampling_rate={rate!r}: wanted a whole number"):
            micro("base").features(noise(1.0), rate)

    @pytest.mark.parametrize(
        ("waveform", "options", "message"),
        [
            (np.zeros(16_000, np.int16), {}, "int16: wanted floating point, from -1 to 1: divide int16 by 32768"),
            (torch.zeros(16_000, dtype=torch.int16), {}, "divide int16 by 32768"),
            (np.zeros(16_000, bool), {}, "bool: wanted floating point"),
            (np.zeros(16_000, np.complex64), {}, "complex64: wanted floating point"),
            (np.full(16_000, "0.5"), {}, "<U3: wanted floating point"),
            (None, {}, "object: wanted floating point"),
            ([[0.0, 0.5], [0.5]], {}, "its parts differ in length"),
            (0.5, {}, r"shape \[\]: wanted"),
            (np.zeros((0, 16_000), np.float32), {}, r"shape \[0, 16000\]: wanted"),
            (np.zeros((16_000, 2), np.float32), {}, r"shape \[16000, 2\]: wanted"),
            (np.full(16_000, np.nan, np.float32), {}, "not finite"),
            (np.zeros(399, np.float32), {}, "lasts 399 samples, the model needs 400"),
            (np.zeros(0, np.float32), {}, "lasts 0 samples"),
            (np.zeros(16_000, np.float32), {"layers": [4]}, "layer 4: the model has layers 0 to 3"),
            (np.zeros(16_000, np.float32), {"layers": -1}, "layer -1: the model has layers 0 to 3"),
            (np.zeros(16_000, np.float32), {"layers": []}, "none chosen"),
            (np.zeros(16_000, np.float32), {"layers": "12"}, "layers='12': wanted whole numbers from 0 to 3"),
            (np.zeros(16_000, np.float32), {"layers": 1.0}, "layers=1.0: wanted whole numbers"),
            (np.zeros(16_000, np.float32), {"chunk_seconds": 0}, "chunk_seconds=0: must be above 0"),
            (np.zeros(16_000, np.float32), {"overlap_seconds": -1.0}, "overlap_seconds=-1.0: must be at least 0"),
        ],
    )
    def test_mistakes(self, waveform: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            micro("base").features(waveform, 16_000, **options)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("preset", ["base", "base_prenorm"])
    def test_more_frames_than_the_model_takes(self, preset: str) -> None:
        model = micro(preset, "model.max_frames=100")
        found = model.features(noise(3.0), 16_000, overlap_seconds=0.5)
        assert (
            difference(found, model.features(noise(3.0), 16_000, chunk_seconds=1.0, overlap_seconds=0.5)) == [0.0] * 4
        )
        assert found[0].shape == (output_frames(48_000, model.config.model), 32)
        with pytest.raises(UserError, match="50 frames on either side leave nothing of the 100 frames"):
            model.features(noise(3.0), 16_000, overlap_seconds=1.0)


class TestChunks:
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("seconds", [2.0, 2.01, 7.3])
    def test_windows_add_up_and_have_their_frames_in_place(self, preset: str, seconds: float) -> None:
        config = load_config(preset, MICRO_MODEL).model
        samples = round(seconds * 16_000)
        frames = output_frames(samples, config)
        found = windows_of(frames, chunk=50, overlap=20)
        assert [window.first for window in found] == [0, *(window.last for window in found[:-1])]
        assert found[-1].last == frames
        assert all(window.last - window.first <= 50 for window in found)
        last = found[-1]
        assert output_frames(samples - 320 * last.begin, config) == frames - last.begin
        for wanted in (1, 2, 90):
            shortest = input_samples(wanted, config)
            assert output_frames(shortest, config) == wanted
            assert output_frames(shortest - 1, config) == wanted - 1

    @pytest.mark.parametrize("preset", PRESETS)
    def test_chunks_equal_the_whole_away_from_borders(self, preset: str) -> None:
        """Layer 0 is equal; above it attention sees a chunk in place of the whole, which no overlap can mend."""
        model = micro(preset, "model.max_frames=null")
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
        borders = torch.tensor([window.first for window in windows_of(len(alone), chunk=500, overlap=0)[1:]])
        far = (frames.unsqueeze(1) - borders).abs().min(dim=1).values > 64 + 4
        assert far.sum() > 1500
        assert float((alone - whole[0])[far].abs().max() / whole[0].abs().max()) <= 1e-5

    @pytest.mark.parametrize("preset", PRESETS)
    def test_batches_do_not_change_results(self, preset: str) -> None:
        model = micro(preset)
        audios = [_audio(noise(seconds, seed=n)) for n, seconds in enumerate((0.7, 1.0, 1.0, 1.3, 5.0, 6.1))]
        alone = _collect(model, audios, batch_seconds=0.1)
        for batch_seconds in (2.5, 4.0, 100.0):
            together = _collect(model, audios, batch_seconds=batch_seconds)
            assert together.keys() == alone.keys()
            for place, expected in alone.items():
                for ours, theirs in zip(together[place], expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    def test_forwards_are_as_large_as_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = micro("base")
        shapes: list[tuple[int, int]] = []
        forward = Pretrained._encode

        def spy(self: Pretrained, parts: Sequence[Any], layers: Sequence[int]) -> Any:
            shapes.append((len(parts), max(part.samples.size for part in parts)))
            return forward(self, parts, layers)

        monkeypatch.setattr(Pretrained, "_encode", spy)
        _collect(model, [_audio(noise(1.0, seed=n)) for n in range(5)], batch_seconds=2.0)
        assert shapes == [(2, 16_000), (2, 16_000), (1, 16_000)]

    @pytest.mark.slow
    def test_memory_does_not_depend_on_the_length(self, tmp_path: Path) -> None:
        """A process that has done 2 minutes needs no more for 20, whose samples alone are 73 MiB."""
        done = subprocess.run(
            [sys.executable, "-c", PEAKS, str(tmp_path)],
            capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        short, long = map(int, done.stdout.split())
        print(f"peak MiB after 2 minutes {short}, after 20 {long}")
        assert long - short <= 25
        assert np.load(tmp_path / "20.npy", mmap_mode="r").shape == (2, 60_000, 8)


PEAKS = """
import sys
from pathlib import Path
import soundfile, torch
from tests.helpers.audio import noise
from tests.inference.test_features import micro
from w2vscale.inference.features import write_features
torch.set_num_threads(1)
folder = Path(sys.argv[1])
convolutions = ["model.conv_layers=[[8,40,40],[8,8,8]]", "model.conv_norm_groups=8"]
model = micro("base", *convolutions, "model.layers=1", "model.dim=8", "model.ffn_dim=8")
minute = noise(60.0)
for minutes in (2, 20):
    path = folder / f"{minutes}.wav"
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
        for _ in range(minutes):
            file.write(minute)
    found = write_features(model, [path], folder, chunk_seconds=8, overlap_seconds=1.5, batch_seconds=11)
    assert found.files == 1, found
    # Of this process alone: ru_maxrss begins with the parent's.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) >> 10)
"""


def _audio(samples: np.ndarray) -> Audio:
    return Audio(16_000, samples.size, lambda: iter([samples]))


def _collect(model: Pretrained, audios: list[Audio], *, batch_seconds: float) -> dict[tuple[int, int], list[Tensor]]:
    stream = model.stream(audios, layers=[0, 3], chunk_seconds=2.0, overlap_seconds=0.5, batch_seconds=batch_seconds)
    found = {}
    for number, piece in stream:
        assert not isinstance(piece, AudioError)
        found[number, piece.first] = piece.hidden
    return found


class TestFiles:
    def test_a_folder_of_every_format(self, mixed_audio: Path, tmp_path: Path) -> None:
        model = micro("large_lv60")
        seen: list[tuple[int, int]] = []
        found = write_features(
            model, [mixed_audio], tmp_path, chunk_seconds=2.0, overlap_seconds=1.5,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
        assert (found.files, found.bad, found.layers) == (6, [], [0, 1, 2, 3])
        assert seen == sorted(seen) and seen[-1] == (21, 21)
        names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert names == {
            "alice/one.npy", "alice/two.npy", "alice/three.npy", "bob/four.npy", "bob/session/five.npy", "six.npy"
        }  # fmt: skip
        total = 0
        for path in mixed_audio.rglob("*"):
            if path.suffix in (".txt", ".md") or path.is_dir():
                continue
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            expected = model.features(samples.T.copy(), rate, chunk_seconds=2.0, overlap_seconds=1.5)
            written = np.load(tmp_path / path.relative_to(mixed_audio).with_suffix(".npy"))
            np.testing.assert_allclose(written, torch.stack(list(expected.values())).numpy(), rtol=0, atol=1e-4)
            total += written.shape[1]
        assert found.frames == total

    def test_the_command_and_both_formats(self, run: Path, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "one.two.wav", noise(2.5))
        out = tmp_path / "out"
        expected = load(run).features(soundfile.read(path, dtype="float32")[0], 16_000)
        for _ in range(2):  # what exists is replaced
            printed = _command(run, path, "-o", out, "--layer", 2)
        assert printed == f"{out}: 1 files, 124 frames of 1 layer\n"
        np.testing.assert_allclose(np.load(out / "one.two.npy"), expected[2].numpy(), rtol=0, atol=1e-6)
        _command(run, path, "-o", out, "--format", "safetensors", "--layer", 3, "--layer", 1)
        tensors = load_file(out / "one.two.safetensors")
        assert sorted(tensors) == ["layer_1", "layer_3"]
        for layer in (1, 3):
            np.testing.assert_allclose(tensors[f"layer_{layer}"], expected[layer].numpy(), rtol=0, atol=1e-6)
        assert sorted(file.name for file in out.iterdir()) == ["one.two.npy", "one.two.safetensors"]

    def test_defaults_are_the_librarys(self) -> None:
        from w2vscale.cli.features import features

        command, library = inspect.signature(features).parameters, inspect.signature(write_features).parameters
        for name in ("chunk_seconds", "overlap_seconds", "batch_seconds", "form"):
            assert command[name].default == library[name].default

    def test_cuts_are_named_by_their_ids(self, tmp_path: Path) -> None:
        audio = noise(9.0, rate=22_050)
        cut = cut_of(write_audio(tmp_path / "a.flac", audio, rate=22_050))
        cuts = [cut.truncate(duration=2.0).with_id("x"), cut.truncate(offset=3.0, duration=4.5).with_id("folder/y.1")]
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts, index=False)
        model = micro("base")
        found = write_features(model, [manifest], tmp_path / "out", layers=[1], chunk_seconds=2.0, overlap_seconds=1.0)
        assert (found.files, found.bad) == (2, [])
        samples = soundfile.read(tmp_path / "a.flac", dtype="float32")[0]
        for name, start, seconds in (("x", 0, 2.0), ("folder/y.1", 3, 4.5)):
            part = samples[start * 22_050 :][: round(seconds * 22_050)]
            expected = model.features(part, 22_050, layers=[1], chunk_seconds=2.0, overlap_seconds=1.0)[1]
            np.testing.assert_allclose(np.load(tmp_path / "out" / f"{name}.npy"), expected.numpy(), rtol=0, atol=1e-5)
        for identifier in ("../x", "/x", "", ".", "x/", "x/.", "x\0", 7):
            write_manifest(manifest, [cut.with_id(identifier)], index=False)
            with pytest.raises(UserError, match=r"the id .* is no name for a file") as error:
                write_features(model, [manifest], tmp_path / "out")
            assert str(error.value).isprintable()

    @pytest.mark.parametrize("ids", [("u", "./u"), ("d/u", "d//u"), ("d/u", "d/./u")])
    def test_two_ids_of_one_file(self, ids: tuple[str, str], tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", noise(1.0)))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut.with_id(name) for name in ids], index=False)
        with pytest.raises(UserError, match=f"its features would be {tmp_path / 'out' / ids[0]}, as those of"):
            write_features(micro("base"), [manifest], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_odd_and_absurd_rates(self, tmp_path: Path) -> None:
        good = write_audio(tmp_path / "good.wav", noise(1.0))
        odd = write_audio(tmp_path / "odd.wav", noise(1.0, rate=22_254), rate=22_254)
        absurd = write_audio(tmp_path / "absurd.wav", noise(1.0), rate=999_983)
        found = write_features(micro("base"), [absurd, odd, good], tmp_path / "out", layers=[1])
        assert [(bad.file, bad.reason) for bad in found.bad] == [
            (str(absurd), "sampling rate is 999983 Hz, not a whole number from 1,000 to 500,000")
        ]
        assert np.load(tmp_path / "out" / "odd.npy").shape == np.load(tmp_path / "out" / "good.npy").shape == (49, 32)

    def test_an_mp3_that_goes_on_after_its_supposed_end(self, tmp_path: Path) -> None:
        """Without its header frame, libsndfile guesses a length from the first frames, which are quiet here."""
        audio = noise(20.0, rate=44_100)
        audio[: 5 * 44_100] *= 1e-3
        whole, headless = tmp_path / "whole.mp3", tmp_path / "headless.mp3"
        soundfile.write(whole, audio, 44_100, bitrate_mode="VARIABLE")
        data = whole.read_bytes()
        whole.write_bytes(data + b"TAG".ljust(128))
        headless.write_bytes(data[data.index(data[:2], 4) :])
        assert soundfile.info(headless).duration < 15
        found = write_features(micro("base"), [headless, whole], tmp_path / "out", layers=[1])
        assert np.load(tmp_path / "out" / "whole.npy").shape == (999, 32)
        (bad,) = found.bad
        assert bad.file == str(headless) and bad.reason.startswith("goes on after the ")

    def test_bad_audio_is_named_and_the_rest_is_written(self, run: Path, tmp_path: Path) -> None:
        good = write_audio(tmp_path / "good.wav", noise(1.0))
        text = write_text(tmp_path / "text.flac")
        short = write_audio(tmp_path / "short.wav", noise(0.01))
        cut_off = write_audio(tmp_path / "cut.flac", noise(30.0))
        cut_off.write_bytes(cut_off.read_bytes()[: cut_off.stat().st_size * 2 // 3])
        infinite = tmp_path / "infinite.wav"
        soundfile.write(infinite, np.concatenate([noise(29.0), np.full(16_000, np.inf)]), 16_000, subtype="FLOAT")
        out = tmp_path / "out"
        options = ["-o", out, "--chunk-seconds", 5, "--overlap-seconds", 1]
        arguments = ["features", run, good, text, short, cut_off, infinite, tmp_path / "absent.wav", *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)
        assert isinstance(result.exception, UserError)  # main() makes it one line and exit code 2
        assert str(result.exception) == (
            f"{text}: not readable as audio: Format not recognised; 5 of 6 utterances could not be used"
        )
        for path, reason in (
            (tmp_path / "absent.wav", "no such file"),
            (short, "lasts 160 samples, the model needs 400 for a frame"),
            (cut_off, "cannot be decoded: "),
            (infinite, "holds samples that are not finite"),
        ):
            assert sum(line.startswith(f"{path}: {reason}") for line in result.output.splitlines()) == 1, path
        assert [path.name for path in out.iterdir()] == ["good.npy"]

    def test_mistakes(self, tmp_path: Path) -> None:
        model = micro("base")
        one = write_audio(tmp_path / "a" / "one.wav", noise(1.0))
        two = write_audio(tmp_path / "b" / "one.flac", noise(1.0))
        (tmp_path / "empty").mkdir()
        for audio, options, message in (
            ([one, two], {}, f"{two}: its features would be {tmp_path / 'out' / 'one'}, as those of {one}"),
            ([tmp_path / "empty"], {}, "no audio in it"),
            ([tmp_path / "absent.jsonl"], {}, "no such manifest"),
            ([one], {"form": "csv"}, "--format csv: choose one of npy, safetensors"),
            ([one], {"layers": [9]}, "layer 9: the model has layers 0 to 3"),
            ([one], {"batch_seconds": 0.0}, "batch_seconds=0.0: must be above 0"),
        ):
            with pytest.raises(UserError) as error:
                write_features(model, audio, tmp_path / "out", **options)  # type: ignore[arg-type]
            assert message in str(error.value)
            assert not (tmp_path / "out").exists()
        with pytest.raises(UserError, match="cannot be written: "):
            write_features(model, [one], write_text(tmp_path / "file"))


def _command(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["features", *map(str, arguments)], standalone_mode=False)
    assert result.exception is None, result.exception
    return result.output
