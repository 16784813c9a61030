"""Decoding of every format: lengths, crops, formats that cannot seek, and the decoder's own words for what is wrong."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.helpers.audio import noise, write_text
from tests.helpers.containers import FORMATS, write_container
from w2vscale.data.decoding import AUDIO_SUFFIXES, AudioError, is_audio, open_audio, read_header

LIBSNDFILE = [  # suffix, format, encoding
    (".wav", "WAV", "PCM_16"),
    (".wav", "WAV", "GSM610"),
    (".wav", "WAV", "G721_32"),
    (".wav", "WAV", "NMS_ADPCM_16"),
    (".wav", "WAV", "IMA_ADPCM"),
    (".wav", "WAV", "ULAW"),
    (".wav", "WAVEX", "PCM_24"),
    (".rf64", "RF64", "FLOAT"),
    (".w64", "W64", "MS_ADPCM"),
    (".flac", "FLAC", "PCM_24"),
    (".ogg", "OGG", "VORBIS"),
    (".opus", "OGG", "OPUS"),
    (".mp3", "MP3", "MPEG_LAYER_III"),
    (".aiff", "AIFF", "PCM_16"),
    (".aif", "AIFF", "DWVW_16"),
    (".au", "AU", "G723_24"),
    (".sph", "NIST", "ALAW"),
    (".caf", "CAF", "ALAC_16"),
    (".voc", "VOC", "PCM_16"),
    (".sf", "IRCAM", "PCM_32"),
]


def decoded(path: Path, start: int = 0, samples: int = 10**6) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with open_audio(path) as decoder:
        decoder.skip(start)
        return decoder.read(samples)


def assert_crops_equal_the_whole(path: Path) -> None:
    header = read_header(path, count=True)
    whole = decoded(path)
    assert header.exact and whole.shape == (header.samples, header.channels)
    for start in (1, 777, 16_384, header.samples - 3000):
        # An MP3 is decoded in floating point from another frame on.
        assert np.allclose(decoded(path, start, 3000), whole[start : start + 3000], atol=1e-6)
    with open_audio(path) as decoder:
        blocks = [decoder.read(4999) for _ in range(2 + header.samples // 4999)]
    assert np.allclose(np.concatenate(blocks), whole, atol=1e-6)


@pytest.mark.parametrize(("suffix", "form", "encoding"), LIBSNDFILE)
def test_a_crop_of_a_file_for_libsndfile_equals_the_whole(
    suffix: str, form: str, encoding: str, tmp_path: Path
) -> None:
    path, audio = tmp_path / f"a{suffix.upper()}", noise(3.0)
    soundfile.write(path, audio, 8_000 if encoding.startswith("NMS") else 16_000, format=form, subtype=encoding)
    assert is_audio(path.name)
    assert abs(read_header(path).samples - audio.size) <= 1024
    assert_crops_equal_the_whole(path)
    correlation = np.corrcoef(decoded(path)[: audio.size, 0], audio)[0, 1]
    assert correlation > 0.5  # of noise, which codecs of speech do not keep well


@pytest.mark.parametrize(
    ("form", "encoding"),
    [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "MS_ADPCM")],
)
def test_crops_from_every_part_of_a_long_file(form: str, encoding: str, tmp_path: Path) -> None:
    path, audio = tmp_path / "a.wav", noise(45.0)
    path = path.with_suffix({"MP3": ".mp3", "OGG": ".ogg"}.get(form, ".wav"))
    with soundfile.SoundFile(path, "w", 16_000, 1, format=form, subtype=encoding) as file:
        for start in range(0, audio.size, 16_000):  # libsndfile 1.2 crashes on a long block of Vorbis
            file.write(audio[start : start + 16_000])
    whole = decoded(path)
    for start in [*range(0, 700_000, 70_001), *range(whole.shape[0] - 20_000, whole.shape[0] - 2000, 2777)]:
        assert np.allclose(decoded(path, start, 2000), whole[start : start + 2000], atol=1e-6), start


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_crop_of_a_file_for_ffmpeg_equals_the_whole(suffix: str, tmp_path: Path) -> None:
    path = write_container(
        tmp_path / f"a{suffix}", np.stack([noise(2.0, rate=48_000), noise(2.0, rate=48_000)], axis=1)
    )
    header = read_header(path)
    assert (header.sampling_rate, header.channels) == (48_000, 2)
    assert not header.exact
    assert header.samples == 0 if suffix in (".aac", ".ac3") else abs(header.samples - 96_000) < 6_000
    assert_crops_equal_the_whole(path)


def test_encoded_audio_in_memory() -> None:
    file = io.BytesIO()
    soundfile.write(file, noise(1.0), 16_000, format="FLAC")
    file.seek(0)
    with open_audio(file) as decoder:
        assert decoder.header == (16_000, 1, 16_000, True)
        assert decoder.read(20_000).shape == (16_000, 1)


@pytest.mark.parametrize("suffix", sorted(AUDIO_SUFFIXES))
def test_a_file_that_is_not_audio_is_named_in_the_words_of_its_decoder(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"^(not readable as audio|cannot be decoded): \S") as caught:
        read_header(write_text(tmp_path / f"a{suffix}"), count=True)
    message = str(caught.value)
    assert str(tmp_path) not in message and "\n" not in message
    for other in ("torch", "ffmpeg", "sox", "lhotse"):
        assert other not in message.lower()


def test_a_flac_that_does_not_know_its_length_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(3.0), 16_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO from here on are the number of samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert read_header(path) == (16_000, 1, 0, False)
    assert read_header(path, count=True) == (16_000, 1, 48_000, True)
    assert decoded(path, 47_000).shape == (1000, 1)


def test_a_header_that_lies_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(3.0), 16_000)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    assert read_header(path).samples == 2**36 - 1
    assert decoded(path, samples=2**36).shape == (48_000, 1)


@pytest.mark.parametrize(
    ("suffix", "form", "encoding"),
    [one for one in LIBSNDFILE if one[1] not in ("FLAC", "MP3", "IRCAM")],  # known after decoding, or not at all
)
def test_a_file_of_which_a_part_is_missing_is_named(suffix: str, form: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, noise(3.0), 16_000, format=form, subtype=encoding)
    assert read_header(path).samples >= 48_000
    content = path.read_bytes()
    for share in (0.5, 0.75, 0.94):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(AudioError, match=r"^(a part of it is missing: .*|not readable as audio: .*malformed)$"):
            read_header(path)


@pytest.mark.parametrize("encoding", ["VORBIS", "OPUS"])
def test_streams_of_ogg_after_each_other_are_not_taken_for_the_first(encoding: str, tmp_path: Path) -> None:
    contents = []
    for seconds in (2.0, 1.0):
        soundfile.write(tmp_path / "a.ogg", noise(seconds), 16_000, format="OGG", subtype=encoding)
        contents.append((tmp_path / "a.ogg").read_bytes())
    (tmp_path / "a.ogg").write_bytes(b"".join(contents))
    with pytest.raises(AudioError, match="its stream of Ogg ends within a page, or before something else in the file"):
        read_header(tmp_path / "a.ogg")


def wav_that_says(path: Path, size: int) -> Path:
    """Three seconds, whose header says that they have `size` bytes."""
    soundfile.write(path, noise(3.0), 16_000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[4:8] = ((size + 36) % 2**32).to_bytes(4, "little")
    content[40:44] = size.to_bytes(4, "little")
    path.write_bytes(content)
    return path


def test_a_wav_whose_header_was_not_completed(tmp_path: Path) -> None:
    for size in (2**32 - 1, 2**31 - 1, 2**31 - 4096, 96_002):  # what programs write to a pipe, and one that rounds
        assert read_header(wav_that_says(tmp_path / "a.wav", size)).samples == 48_000
    for size in (0, 3000):
        with pytest.raises(AudioError, match=f"its header says {size:,} bytes of audio, but the file has 96,044"):
            read_header(wav_that_says(tmp_path / "a.wav", size))


def test_a_damaged_container(tmp_path: Path) -> None:
    import av

    path = write_container(tmp_path / "a.webm", noise(2.0, rate=48_000))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"^a part of it is missing: ends after \d+ of about 96\d+ samples$"):
        read_header(path, count=True)
    path = write_container(tmp_path / "a.m4a", noise(20.0, rate=48_000), index_first=True)
    assert read_header(path, count=True).exact
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux() if packet.pos]
    path.write_bytes(path.read_bytes()[: places[-40]])  # between two of its 938 frames
    with pytest.raises(AudioError, match="a part of it is missing: ends after"):
        read_header(path, count=True)
    path = write_container(tmp_path / "a.m4a", noise(2.0, rate=48_000))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(AudioError, match="not readable as audio: Invalid data found when processing input"):
        read_header(path)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n", "ffconcat version 1.0\nfile '{}'\n"]
)
def test_a_playlist_is_not_followed(text: str, tmp_path: Path) -> None:
    secret = write_container(tmp_path / "secret.aac", noise(1.0, rate=48_000))
    for suffix in FORMATS:
        path = tmp_path / f"a{suffix}"
        path.write_text(text.format(secret))
        with pytest.raises(AudioError):
            read_header(path, count=True)


def test_without_pyav_its_formats_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_container(tmp_path / "a.m4a", noise(1.0, rate=48_000))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"^\.m4a needs PyAV: pip install 'w2vscale\[av\]'$"):
        read_header(path)


def test_a_video_without_audio(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="has no audio track"):
        read_header(path)


@pytest.mark.parametrize("suffix", sorted(AUDIO_SUFFIXES))
def test_a_file_without_a_byte_is_named_as_that(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(AudioError, match=r"^not readable as audio: the file is empty$"):
        read_header(tmp_path / f"a{suffix}")


def test_missing_files_and_pipes_are_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "no.wav", tmp_path / "pipe.wav", tmp_path, tmp_path / "null\0.wav"):
        with pytest.raises(AudioError, match="no such file"):
            read_header(path)
