"""A folder of files of every kind through all commands: each is used, or named with the reason why it is not."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from tests.helpers.audio import noise, write_audio, write_text
from tests.helpers.commands import command
from tests.helpers.containers import write_container
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import MICRO_RUN
from tests.helpers.spelled import SPELLING
from w2vscale.checkpoint.format import TrainState
from w2vscale.config import load_config
from w2vscale.data.audio import read_audio
from w2vscale.data.decoding import AUDIO_SUFFIXES
from w2vscale.files import read_metrics
from w2vscale.terminal import visible

pytestmark = pytest.mark.slow

LIBSNDFILE = [  # path, format, encoding, sampling rate, channels
    ("pcm/plain.wav", "WAV", "PCM_16", 16_000, 1),
    ("pcm/Plain.wav", "WAV", "PCM_24", 44_100, 2),
    ("pcm/PLAIN.WAV", "WAV", "PCM_U8", 8_000, 1),
    ("pcm/with space.wav", "WAV", "FLOAT", 48_000, 2),
    ('pcm/it\'s "quoted".wav', "WAV", "DOUBLE", 22_050, 1),
    ("pcm/new\nline.wave", "WAVEX", "PCM_32", 16_000, 1),
    ("pcm/naïve ☃ 音.wav", "WAV", "ULAW", 8_000, 2),
    ("pcm/-o.wav", "WAV", "ALAW", 8_000, 1),
    ("pcm/$(touch marker);`id`.wav", "WAV", "PCM_16", 11_025, 1),
    ("pcm/[bold]%s #1.wav", "WAV", "PCM_16", 32_000, 1),
    ("pcm/a.b.c.bwf", "WAV", "PCM_24", 96_000, 2),
    ("phone/gsm.wav", "WAV", "GSM610", 8_000, 1),
    ("phone/g721.wav", "WAV", "G721_32", 8_000, 1),
    ("phone/nms.wav", "WAV", "NMS_ADPCM_32", 8_000, 1),
    ("phone/ima.wav", "WAV", "IMA_ADPCM", 16_000, 2),
    ("phone/ms.w64", "W64", "MS_ADPCM", 22_050, 2),
    ("phone/g723.au", "AU", "G723_40", 8_000, 1),
    ("phone/g721.snd", "AU", "G721_32", 8_000, 1),
    ("phone/gsm.aiff", "AIFF", "GSM610", 8_000, 1),
    ("phone/ima.aif", "AIFF", "IMA_ADPCM", 16_000, 1),
    ("phone/dwvw.aifc", "AIFF", "DWVW_24", 44_100, 1),
    ("phone/psion.wve", "WVE", "ALAW", 8_000, 1),
    ("phone/dpcm.xi", "XI", "DPCM_16", 44_100, 1),
    ("deep/er/and/deeper/rf.rf64", "RF64", "PCM_16", 16_000, 2),
    ("deep/er/lossless.flac", "FLAC", "PCM_24", 44_100, 2),
    ("deep/er/8bit.FLAC", "FLAC", "PCM_S8", 16_000, 1),
    ("deep/vorbis.ogg", "OGG", "VORBIS", 44_100, 2),
    ("deep/vorbis.oga", "OGG", "VORBIS", 16_000, 1),
    ("deep/opus.opus", "OGG", "OPUS", 48_000, 2),
    ("deep/opus.ogg", "OGG", "OPUS", 16_000, 1),
    ("deep/layer3.mp3", "MP3", "MPEG_LAYER_III", 44_100, 2),
    ("deep/sphere.sph", "NIST", "ULAW", 8_000, 2),
    ("deep/sphere.nist", "NIST", "PCM_16", 16_000, 1),
    ("deep/alac.caf", "CAF", "ALAC_16", 44_100, 2),
    ("deep/alac24.caf", "CAF", "ALAC_24", 48_000, 1),
    ("old/creative.voc", "VOC", "PCM_16", 16_000, 2),
    ("old/ircam.sf", "IRCAM", "FLOAT", 16_000, 1),
    ("old/ensoniq.paf", "PAF", "PCM_24", 16_000, 2),
    ("old/portable.pvf", "PVF", "PCM_32", 16_000, 1),
    ("old/avr.avr", "AVR", "PCM_16", 16_000, 2),
    ("old/amiga.iff", "SVX", "PCM_16", 16_000, 1),
    ("old/htk.htk", "HTK", "PCM_16", 16_000, 1),
]
CONTAINERS = [  # path, sampling rate, channels
    ("video/phone.m4a", 44_100, 2),
    ("video/apple lossless.mp4", 16_000, 1),
    ("video/browser.webm", 48_000, 2),
    ("video/matroska.mka", 44_100, 2),
    ("video/media.wma", 44_100, 2),
    ("video/adts.aac", 16_000, 1),
    ("video/dolby.ac3", 48_000, 2),
    ("video/pack.wv", 44_100, 2),
    ("video/true.tta", 22_050, 1),
    ("video/camera.avi", 16_000, 2),
]
LINKS = ("linked/elsewhere.flac", "linked file.wav")
GOOD = [*(row[0] for row in LIBSNDFILE), *(row[0] for row in CONTAINERS), *LINKS]

UNREADABLE = {  # named by `prepare`: kind, and a part of the reason
    "bad/text.wav": ("undecodable", "not readable as audio: Format not recognised"),
    "bad/empty.wav": ("empty", "not readable as audio: the file is empty"),
    "bad/empty.mp4": ("empty", "not readable as audio: the file is empty"),
    "bad/half.m4a": ("undecodable", "not readable as audio: Invalid data found"),
    "bad/no header.au": ("undecodable", "not readable as audio: it has no header"),
    "bad/no samples.wav": ("empty", "holds no audio"),
    "bad/absurd.wav": ("sampling rate", "sampling rate is 999983 Hz, not a whole number from 1,000 to 500,000"),
    "bad/latin.flac": ("transcript", "bad/latin.txt: line 1 is not UTF-8"),
}
UNDECODABLE = {  # named by `validate --audio`: kind, and a part of the reason
    "bad/half.flac": ("undecodable", "cannot be decoded: "),
    "bad/silence.wav": ("silent", "is silent: all samples are equal"),
    "bad/not a number.wav": ("not finite", "contains samples that are not finite"),
    "bad/cancel.wav": (
        "cancelling",
        "its channels cancel each other in the mean; use one of them, with --channel first",
    ),
}
OTHERS = {  # counted by `prepare`
    (".wav", "hidden"): 1,
    (".wav", "not a file"): 1,
    (".wav", "broken link"): 2,
    (".pdf", "not audio"): 1,
    (".txt", "transcript"): 1,
    (".txt", "its audio file is left out"): 1,
    (".txt", "no audio file beside it has its name"): 1,
    (".flac", "link to a file that is used anyway"): 1,
    ("(no suffix)", "link to a folder that is used anyway"): 2,
}


@dataclass(frozen=True)
class Prepared:
    folder: Path
    out: Path
    done: CompletedProcess[str]

    @property
    def manifest(self) -> Path:
        return self.out / "cuts_train.jsonl"

    def relative(self, file: str) -> str:
        return str(Path(file).relative_to(self.folder))


def write_good(folder: Path) -> None:
    for number, (name, form, encoding, rate, channels) in enumerate(LIBSNDFILE):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        audio = np.stack([noise(1.5 + number / 60, rate=rate, seed=2 * number + n) for n in range(channels)], axis=1)
        soundfile.write(path, audio, rate, format=form, subtype=encoding)
    for number, (name, rate, channels) in enumerate(CONTAINERS, start=len(LIBSNDFILE)):
        audio = np.stack([noise(1.5 + number / 60, rate=rate, seed=2 * number + n) for n in range(channels)], axis=1)
        write_container(folder / name, audio, rate=rate)
    (folder / "deep" / "vorbis.txt").write_text("A CAB AD", encoding="utf-8")


def write_links(folder: Path, elsewhere: Path) -> None:
    write_audio(elsewhere / "elsewhere.flac", noise(1.7, seed=200))
    os.symlink(elsewhere, folder / "linked")
    os.symlink(elsewhere, folder / "pcm" / "linked again")
    os.symlink(folder, folder / "deep" / "loop")
    os.symlink(write_audio(elsewhere.parent / "blob.wav", noise(1.6, seed=201)), folder / "linked file.wav")
    os.symlink("er/lossless.flac", folder / "deep" / "twice.flac")
    os.symlink(folder / "vanished.wav", folder / "broken.wav")
    os.symlink("self.wav", folder / "self.wav")


def write_bad(folder: Path) -> None:
    bad = folder / "bad"
    write_text(bad / "text.wav")
    write_text(bad / "no header.au")
    (bad / "empty.wav").touch()
    (bad / "empty.mp4").touch()
    (bad / "half.m4a").write_bytes((folder / "video" / "phone.m4a").read_bytes()[:2000])
    half = write_audio(bad / "half.flac", noise(2.0))
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    write_audio(bad / "no samples.wav", np.zeros(0, np.float32))
    write_audio(bad / "absurd.wav", noise(1.0), rate=999_983)
    write_audio(bad / "silence.wav", np.zeros(24_000, np.float32))
    poisoned = noise(1.5)
    poisoned[9_000] = np.nan
    write_audio(bad / "not a number.wav", poisoned, subtype="FLOAT")
    write_audio(bad / "cancel.wav", np.stack([noise(1.5), -noise(1.5)], axis=1))
    write_audio(bad / "latin.flac", noise(1.5))
    (bad / "latin.txt").write_bytes("zwei Töne\n".encode("latin-1"))
    (bad / "._plain.wav").write_bytes(b"\x00\x05\x16\x07 of macOS")
    os.mkfifo(bad / "pipe.wav")
    (bad / "paper.pdf").write_bytes(b"%PDF-1.7")
    (bad / "lonely.txt").write_text("NO AUDIO")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    top = tmp_path_factory.mktemp("every file")
    folder = top / "audio"
    write_good(folder)
    write_links(folder, top / "elsewhere")
    write_bad(folder)
    yield Prepared(folder, top / "out", command("data", "prepare", "folder", folder, top / "out", "--jobs", 2))
    shutil.rmtree(top)


def test_there_are_sixty_files_in_25_suffixes(prepared: Prepared) -> None:
    files = [path for path in prepared.folder.rglob("*") if path.is_file() or path.is_symlink()]
    assert len(files) >= 60
    assert len({path.suffix.lower() for path in files} & AUDIO_SUFFIXES) >= 25


def test_prepare_uses_or_names_every_file(prepared: Prepared) -> None:
    assert prepared.done.returncode == 0, prepared.done.stderr
    assert prepared.done.stderr == ""
    report = json.loads((prepared.out / "prepare_report.json").read_text())
    found = {one["path"]: (one["kind"], one["reason"]) for one in report["unusable"]}
    assert found.keys() == UNREADABLE.keys()
    for name, (kind, reason) in UNREADABLE.items():
        assert found[name][0] == kind and reason in found[name][1], found[name]
    assert {(one["suffix"], one["reason"]): one["files"] for one in report["other_files"]} == OTHERS
    cuts = [*CutSet.from_file(prepared.manifest)]
    sources = [prepared.relative(cut.recording.sources[0].source) for cut in cuts]
    assert sorted(sources) == sorted([*GOOD, *UNDECODABLE])
    assert len({cut.id for cut in cuts}) == len(cuts)
    assert sum(report["used"].values()) == len(cuts) == report["manifests"][0]["utterances"]
    texts = {source: cut.supervisions[0].text for source, cut in zip(sources, cuts, strict=True)}
    assert {name: text for name, text in texts.items() if text} == {
        "deep/vorbis.ogg": "A CAB AD", "deep/vorbis.oga": "A CAB AD"
    }  # fmt: skip
    assert not [*prepared.folder.rglob("marker")]
    printed = prepared.done.stdout
    assert f"{prepared.manifest}: {len(cuts)} utterances, " in printed
    rows = Counter((Path(name).suffix, kind) for name, (kind, _) in UNREADABLE.items())
    for (suffix, kind), count in rows.items():
        names = [name for name in UNREADABLE if name.endswith(suffix) and UNREADABLE[name][0] == kind]
        example = "(, for example)?" if count > 1 else ""
        row = rf"^ *{re.escape(suffix)} +{count} +left out{example}: ({'|'.join(map(re.escape, names))}): "
        assert re.search(row, printed, re.MULTILINE), row


@pytest.mark.parametrize("name", GOOD)
def test_a_crop_equals_the_slice_of_the_whole(name: str, prepared: Prepared) -> None:
    (cut,) = [
        cut for cut in CutSet.from_file(prepared.manifest)
        if prepared.relative(cut.recording.sources[0].source) == name
    ]  # fmt: skip
    rate = cut.sampling_rate
    whole = read_audio(cut, sampling_rate=rate)
    assert whole.size == cut.num_samples and np.std(whole) > 0.01
    for offset, length in ((0, rate // 2), (777, rate), (whole.size - rate // 3, rate // 3)):
        crop = read_audio(cut, sampling_rate=rate, offset=offset, length=length)
        np.testing.assert_allclose(crop, whole[offset : offset + length], rtol=0, atol=1e-6)


def test_validate_names_what_cannot_be_decoded(prepared: Prepared) -> None:
    done = command("data", "validate", prepared.manifest, "--audio", "--jobs", 2)
    assert done.returncode == 2
    assert f"{len(UNDECODABLE)} bad utterances of {len(GOOD) + len(UNDECODABLE)}" in done.stderr
    listing = Path(f"{prepared.manifest}.bad_audio").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in listing]
    found = {prepared.relative(one["file"]): (one["kind"], one["reason"]) for one in records}
    assert found.keys() == UNDECODABLE.keys()
    for name, (kind, reason) in UNDECODABLE.items():
        assert found[name][0] == kind and reason in found[name][1], found[name]


def test_training_reads_all_and_counts_the_bad(prepared: Prepared, tmp_path: Path) -> None:
    assert command("data", "index", prepared.manifest).returncode == 0
    settings = (*MICRO_RUN, f"data.train={prepared.manifest}", "trainer.updates=10", "data.max_bad_fraction=0.5")
    done = command("train", "base", *settings, "--exp", tmp_path / "exp")
    assert done.returncode == 0, done.stderr
    curve = read_metrics(tmp_path / "exp" / "metrics.jsonl", "train")
    assert curve[-1]["update"] == 10 and all(np.isfinite(row["loss"]) for row in curve)
    listing = (tmp_path / "exp" / "logs" / "bad_audio.jsonl").read_text(encoding="utf-8").splitlines()
    found = {prepared.relative(one["file"]): one["kind"] for one in map(json.loads, listing)}
    assert found == {name: kind for name, (kind, _) in UNDECODABLE.items()}


def test_transcribe_uses_or_names_every_file(prepared: Prepared, tmp_path: Path) -> None:
    config = load_config("base", SPELLING)
    save_model(tmp_path / "ctc", config, random_model(config, seed=3).state_dict(), TrainState(update=7))
    done = command("transcribe", tmp_path / "ctc", prepared.folder, "--format", "json")
    assert done.returncode == 2
    found = [json.loads(line) for line in done.stdout.splitlines()]
    # Nothing is said in silence, and transcripts are not read.
    used = [*GOOD, "bad/silence.wav", "bad/latin.flac"]
    assert sorted(prepared.relative(one["file"]) for one in found) == sorted(used)
    assert len({one["utterance"] for one in found}) == len(found)
    bad = {**UNREADABLE, **UNDECODABLE}
    del bad["bad/latin.flac"], bad["bad/silence.wav"]
    bad |= dict.fromkeys(("broken.wav", "self.wav"), ("missing", "broken link"))
    bad["bad/no samples.wav"] = ("too short", "has 0 samples, fewer than the 400 of one frame")
    for name, (_, reason) in bad.items():
        line = visible(f"{prepared.folder / name}: ")
        assert any(line in row and reason in row for row in done.stderr.splitlines()), (name, done.stderr)
    assert f"{len(bad)} of {len(found) + len(bad)} utterances could not be used" in done.stderr
