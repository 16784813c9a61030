"""Features written to files, from every kind of audio."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.pretrained import micro_pretrained
from w2vscale.cli.app import app
from w2vscale.errors import UserError
from w2vscale.inference.features import write_features
from w2vscale.inference.pretrained import load


def features_command(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["features", *map(str, arguments)], standalone_mode=False)
    assert result.exception is None, result.exception
    return result.output


def test_a_folder_of_every_format(mixed_audio: Path, tmp_path: Path) -> None:
    model = micro_pretrained("large_lv60")
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


def test_the_command_and_both_formats(run: Path, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "one.two.wav", noise(2.5))
    out = tmp_path / "out"
    expected = load(run).features(soundfile.read(path, dtype="float32")[0], 16_000)
    for _ in range(2):  # an existing file is replaced
        printed = features_command(run, path, "-o", out, "--layer", 2)
    assert printed == f"{out}: 1 file, 124 frames of 1 layer\n"
    np.testing.assert_allclose(np.load(out / "one.two.npy"), expected[2].numpy(), rtol=0, atol=1e-6)
    features_command(run, path, "-o", out, "--format", "safetensors", "--layer", 3, "--layer", 1)
    tensors = load_file(out / "one.two.safetensors")
    assert sorted(tensors) == ["layer_1", "layer_3"]
    for layer in (1, 3):
        np.testing.assert_allclose(tensors[f"layer_{layer}"], expected[layer].numpy(), rtol=0, atol=1e-6)
    assert sorted(file.name for file in out.iterdir()) == ["one.two.npy", "one.two.safetensors"]


def test_the_command_has_the_defaults_of_the_library() -> None:
    from w2vscale.cli.inference import features

    command, library = inspect.signature(features).parameters, inspect.signature(write_features).parameters
    for name in ("chunk_seconds", "overlap_seconds", "batch_seconds", "file_format"):
        assert command[name].default == library[name].default


def test_cuts_are_named_by_their_ids(tmp_path: Path) -> None:
    audio = noise(9.0, rate=22_050)
    cut = cut_of(write_audio(tmp_path / "a.flac", audio, rate=22_050))
    cuts = [cut.truncate(duration=2.0).with_id("x"), cut.truncate(offset=3.0, duration=4.5).with_id("folder/y.1")]
    manifest = write_manifest(tmp_path / "cuts.jsonl", cuts, index=False)
    model = micro_pretrained("base")
    found = write_features(model, [manifest], tmp_path / "out", layers=[1], chunk_seconds=2.0, overlap_seconds=1.0)
    assert (found.files, found.bad) == (2, [])
    samples = soundfile.read(tmp_path / "a.flac", dtype="float32")[0]
    for name, start, seconds in (("x", 0, 2.0), ("folder/y.1", 3, 4.5)):
        part = samples[start * 22_050 :][: round(seconds * 22_050)]
        expected = model.features(part, 22_050, layers=[1], chunk_seconds=2.0, overlap_seconds=1.0)[1]
        np.testing.assert_allclose(np.load(tmp_path / "out" / f"{name}.npy"), expected.numpy(), rtol=0, atol=1e-5)
    for identifier in ("../x", "/x", "", ".", "x/", "x/.", "x\0"):
        write_manifest(manifest, [cut.with_id(identifier)], index=False)
        with pytest.raises(UserError, match=r"the id .* cannot be a file name") as error:
            write_features(model, [manifest], tmp_path / "out")
        assert str(error.value).isprintable()


@pytest.mark.parametrize("ids", [("u", "./u"), ("d/u", "d//u"), ("d/u", "d/./u")])
def test_ids_of_the_same_file_name_are_refused(ids: tuple[str, str], tmp_path: Path) -> None:
    cut = cut_of(write_audio(tmp_path / "a.wav", noise(1.0)))
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut.with_id(name) for name in ids], index=False)
    with pytest.raises(UserError, match=f"its output {tmp_path / 'out' / ids[0]} is also that of"):
        write_features(micro_pretrained("base"), [manifest], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_odd_and_absurd_rates(tmp_path: Path) -> None:
    good = write_audio(tmp_path / "good.wav", noise(1.0))
    odd = write_audio(tmp_path / "odd.wav", noise(1.0, rate=22_254), rate=22_254)
    absurd = write_audio(tmp_path / "absurd.wav", noise(1.0), rate=999_983)
    found = write_features(micro_pretrained("base"), [absurd, odd, good], tmp_path / "out", layers=[1])
    assert [(bad.file, bad.reason) for bad in found.bad] == [
        (str(absurd), "sampling rate is 999983 Hz, not a whole number from 1,000 to 500,000")
    ]
    assert np.load(tmp_path / "out" / "odd.npy").shape == np.load(tmp_path / "out" / "good.npy").shape == (49, 32)


def test_an_mp3_longer_than_reported(tmp_path: Path) -> None:
    """Without its header frame, libsndfile guesses a length from the first frames, which are quiet here."""
    audio = noise(20.0, rate=44_100)
    audio[: 5 * 44_100] *= 1e-3
    whole, headless = tmp_path / "whole.mp3", tmp_path / "headless.mp3"
    soundfile.write(whole, audio, 44_100, bitrate_mode="VARIABLE")
    data = whole.read_bytes()
    whole.write_bytes(data + b"TAG".ljust(128))
    headless.write_bytes(data[data.index(data[:2], 4) :])
    assert soundfile.info(headless).duration < 15
    found = write_features(micro_pretrained("base"), [headless, whole], tmp_path / "out", layers=[1])
    assert np.load(tmp_path / "out" / "whole.npy").shape == (999, 32)
    (bad,) = found.bad
    assert bad.file == str(headless) and bad.reason.startswith("longer than the ")


def test_bad_audio_is_named_and_the_rest_is_written(run: Path, tmp_path: Path) -> None:
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
        (short, "has 160 samples, fewer than the 400 of one frame"),
        (cut_off, "cannot be decoded: "),
        (infinite, "contains samples that are not finite"),
    ):
        assert sum(line.startswith(f"{path}: {reason}") for line in result.output.splitlines()) == 1, path
    assert [path.name for path in out.iterdir()] == ["good.npy"]


def test_mistakes(tmp_path: Path) -> None:
    model = micro_pretrained("base")
    one = write_audio(tmp_path / "a" / "one.wav", noise(1.0))
    (tmp_path / "empty").mkdir()
    for audio, options, message in (
        ([one, one], {}, f"{one}: its output "),
        ([tmp_path / "empty"], {}, "no audio in it"),
        ([tmp_path / "absent.jsonl"], {}, "no such manifest"),
        ([one], {"file_format": "csv"}, "--format csv: choose one of npy, safetensors"),
        ([one], {"layers": [9]}, "layer 9: the model has layers 0 to 3"),
        ([one], {"batch_seconds": 0.0}, "batch_seconds=0.0: must be above 0"),
    ):
        with pytest.raises(UserError) as error:
            write_features(model, audio, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be written: "):
        write_features(model, [one], write_text(tmp_path / "file"))
