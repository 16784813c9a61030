"""Read the lists that users of other toolkits have: Kaldi's data folders, NeMo's manifests, fairseq's .tsv files."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2vscale.corpora.finding import Unusable, identifier_of
from w2vscale.corpora.kaldi import KaldiSegment, count_differences, read_segments, read_table
from w2vscale.corpora.listing import Listing, Utterance, prepare_listing
from w2vscale.corpora.manifests import existing_folder
from w2vscale.corpora.preparing import DEFAULTS, Options, Text
from w2vscale.corpora.report import Report
from w2vscale.corpora.text_files import lines_of_file
from w2vscale.errors import UserError
from w2vscale.files import nearest_path

DECODING: dict[str, dict[str, bool]] = {
    "cat": {},
    "flac": dict.fromkeys(
        ["-c", "-d", "-s", "-f", "-cd", "-dc", "-dcs", "-cds", "--decode", "--stdout", "--silent"], False
    ),
    "sph2pipe": {"-p": False, "-f": True, "-c": True},
    "sox": {**dict.fromkeys(["-t", "-r", "-b", "-e", "-c"], True), "-V1": False, "-G": False},
    "ffmpeg": {
        **dict.fromkeys(["-i", "-f", "-ar", "-ac", "-acodec", "-c:a", "-v", "-loglevel", "-sample_fmt"], True),
        **dict.fromkeys(["-nostdin", "-hide_banner", "-y", "-vn"], False),
    },
}
"""Programs in a `wav.scp` that decode a file, with the options that change nothing else, and whether they have a value.

Such a file is read itself. Other rates and the mean of the channels are made when audio is read.
"""

WITHOUT_AUDIO = "segments of recordings that are not in wav.scp, which are left out"
WITHOUT_SEGMENT = "recordings in wav.scp without a line in segments, which are left out"


def prepare_kaldi(folder: Path, output: Path, *, encoding: str | None = None, options: Options = DEFAULTS) -> Report:
    """Write `cuts_FOLDER.jsonl` for a data folder of Kaldi: wav.scp; segments, text, utt2spk and utt2lang if present.

    No command in wav.scp is run: where it only decodes a file, the file is read. A line of segments of another form is
    an unusable utterance. Raises UserError if wav.scp is missing, a table has a name twice, or like `write_manifests`.
    """
    folder = existing_folder(folder)
    audio = read_table(folder / "wav.scp", encoding=encoding)
    if audio is None:
        raise UserError(f"{folder / 'wav.scp'}: no such file{nearest_path(folder / 'wav.scp')}")
    texts, speakers, languages = (
        read_table(folder / name, encoding=encoding) for name in ("text", "utt2spk", "utt2lang")
    )
    listing, part = Listing(folder), folder.name
    files: dict[str, tuple[str, int | None]] = {}
    unread: dict[str, str] = {}  # recordings whose audio is not read, and why
    base = _base(folder, audio)
    for recording, source in audio.items():
        try:
            path, channel = _file_of(source)
            files[recording] = (str(base / path), channel)
        except ValueError as error:
            unread[recording] = f"{recording}: {source[:200]}: {error}"
    utterances = [KaldiSegment(recording, recording, 0.0, math.inf, None) for recording in audio]
    if (folder / "segments").is_file():
        utterances = read_segments(folder / "segments", encoding=encoding, unusable=listing.unusable)
    if texts is not None:
        count_differences(texts, {utterance.name for utterance in utterances}, listing.notes)
    count = Counter(utterance.recording for utterance in utterances)
    listing.unusable += [
        Unusable("wav.scp", "command", why, count[recording]) for recording, why in unread.items() if count[recording]
    ]
    listing.notes[WITHOUT_SEGMENT] += len(audio.keys() - count.keys())
    for name, recording, start, end, channel in utterances:
        if recording not in files:
            listing.notes[WITHOUT_AUDIO] += recording not in audio
            continue
        path, decoded = files[recording]
        if decoded is not None and channel:
            reason = f"{name} is in channel {channel}, but the command in wav.scp takes one channel of the file"
            listing.unusable.append(Unusable(path, "mismatched", reason))
            continue
        text = Text(*((table or {}).get(name) for table in (texts, speakers, languages)))
        duration = None if end == math.inf else end - start
        utterance = Utterance(part, name, text, start, duration, channel if decoded is None else decoded)
        listing.add(path, utterance, recording=recording)
    return prepare_listing(listing, output, [part], options)


def _file_of(source: str) -> tuple[str, int | None]:
    """The file that an entry of wav.scp decodes, and its channel if one is chosen. ValueError if it does more."""
    if not source.endswith("|"):
        return _refuse_archive(source), None
    program, *words = shlex.split(source[:-1]) or [""]
    options = DECODING.get(os.path.basename(program))
    if options is None:
        raise ValueError("commands are not run; name a file, or run the command and save what it writes")
    files, chosen = list[str](), None
    while words:
        word = words.pop(0)
        if word.startswith("-") and word != "-":
            if word not in options:
                raise ValueError(f"commands are not run, and {word} may change the audio; save what it writes")
            value = words.pop(0) if options[word] and words else None
            chosen = value if word == "-c" and os.path.basename(program) == "sph2pipe" else chosen
            files += [value] if word == "-i" and value else []
        elif word != "-":
            files.append(word)
    if len(files) != 1:
        raise ValueError("commands are not run, and this one does more than decode one file; save what it writes")
    return _refuse_archive(files[0]), int(chosen) - 1 if chosen else None


def _refuse_archive(source: str) -> str:
    if source == "-" or (source.rpartition(":")[2].isdecimal() and ".ark:" in source):
        raise ValueError("audio in archives is not read: save it as files")
    return source


def _base(folder: Path, audio: dict[str, str]) -> Path:
    """What relative paths in wav.scp are relative to: the current folder, as in Kaldi, or the data folder."""
    for source in audio.values():
        try:
            path = _file_of(source)[0]
        except ValueError:
            continue
        return Path.cwd() if os.path.exists(path) or not (folder / path).exists() else folder
    return folder


def prepare_nemo(manifest: Path, output: Path, *, encoding: str | None = None, options: Options = DEFAULTS) -> Report:
    """Write `cuts_NAME.jsonl` for a manifest NAME.jsonl or NAME.json of NeMo: an object with audio_filepath per line.

    Paths are absolute or relative to the manifest. An utterance with a field of another type is unusable. Raises
    UserError if a line is no such object, or like `write_manifests`.
    """
    listing, part = Listing(manifest.absolute().parent), manifest.stem
    for number, line in enumerate(_lines(manifest, encoding), start=1):
        if not line.strip():
            continue
        entry = _entry(line, f"{manifest}: line {number}")
        path = entry["audio_filepath"]
        try:
            json.dumps(entry, ensure_ascii=False).encode()  # raises for half of a surrogate pair
            if "\0" in path:
                raise ValueError("audio_filepath has a zero character")
            given = _text(entry, "id", "utt_id", numbers=True)
            text = Text(
                _text(entry, "text", lists=True),
                _text(entry, "speaker", numbers=True),
                _text(entry, "lang", "language", "source_lang") or None,
            )
            start, duration, channel = _seconds(entry, "offset"), _seconds(entry, "duration"), _channel(entry)
        except (ValueError, RecursionError) as error:
            reason = f"line {number}: {' '.join(str(error).split())[:200]}"
            listing.unusable.append(Unusable(manifest.name, "line", reason))
            continue
        name = listing.new_name(part, given or identifier_of(path.lstrip("./")))
        listing.add(path, Utterance(part, name, text, start or 0.0, duration, channel))
    return prepare_listing(listing, output, [part], options)


def _entry(line: str, where: str) -> dict[str, Any]:
    """The object in a line of a manifest of NeMo, with audio_filepath. Raises UserError if there is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not an utterance of NeMo: {' '.join(str(error).split())[:100]}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("audio_filepath"), str):
        raise UserError(f"{where} is not an utterance of NeMo: it is no object with a string audio_filepath")
    if "shard_id" in entry:
        raise UserError(f"{where} is of audio in a tar archive; unpack it, and use its manifest")
    return entry


def _text(entry: dict[str, Any], *names: str, numbers: bool = False, lists: bool = False) -> str | None:
    """The first of some fields that an entry has. Raises ValueError if it is not a string, or what else is allowed."""
    name = next((name for name in names if entry.get(name) not in (None, "")), names[0])
    value = entry.get(name)
    if lists and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if numbers and type(value) in (int, float):
        return str(value)
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{name} is not a string: {json.dumps(value)}")


def _seconds(entry: dict[str, Any], name: str) -> float | None:
    """A time in an entry. Raises ValueError if it is not a number."""
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError(f"{name} is not a number: {json.dumps(value)}")


def _channel(entry: dict[str, Any]) -> int | None:
    """The channel of an entry, from 0. Raises ValueError if it is not the number of a channel."""
    value = entry.get("channel_selector")
    if value is None or (type(value) is int and value >= 0):
        return value
    raise ValueError(f"channel_selector is not the number of a channel: {json.dumps(value)}")


def _lines(path: Path, encoding: str | None, *, strip: bool = True) -> list[str]:
    if not path.is_file():
        problem = "a folder, not a file" if path.is_dir() else f"no such file{nearest_path(path)}"
        raise UserError(f"{path}: {problem}")
    return lines_of_file(path, encoding=encoding, strip=strip)


def prepare_fairseq(
    manifest: Path, output: Path, *, encoding: str | None = None, options: Options = DEFAULTS
) -> Report:
    """Write `cuts_NAME.jsonl` for a fairseq manifest NAME.tsv, with the transcripts NAME.wrd or NAME.ltr if present.

    The first line is the folder of the audio, each other line a path and its number of samples. The folder of a file is
    its speaker. Raises UserError if a line has no tab, the transcripts have another number of lines, or like
    `write_manifests`.
    """
    if manifest.suffix in (".wrd", ".ltr"):
        raise UserError(f"{manifest}: has transcripts; give the file with the paths: {manifest.with_suffix('.tsv')}")
    first, *rest = _lines(manifest, encoding, strip=False) or [""]
    entries = [(number, line) for number, line in enumerate(rest, start=2) if line.strip()]
    if not entries:
        raise UserError(
            f"{manifest}: has no utterance; the first line is a folder, each other a path, a tab and samples"
        )
    root = manifest.absolute().parent / first
    if not root.is_dir():
        raise UserError(f"{manifest}: line 1 must be the folder of the audio, and {first[:200]!r} is none")
    texts = _fairseq_texts(manifest, len(entries), encoding)
    listing, part = Listing(root), manifest.stem
    for (number, line), text in zip(entries, texts, strict=True):
        path, tab, samples = line.partition("\t")
        if not tab:
            raise UserError(f"{manifest}: line {number} is not a path, a tab, and a number of samples")
        if not (path and samples.strip().isdecimal()):
            reason = f"line {number} has no path, or {samples[:50]!r} is not a number of samples"
            listing.unusable.append(Unusable(str(manifest.absolute()), "line", reason))
            continue
        name = listing.new_name(part, identifier_of(path))
        said = Text(text, os.path.dirname(path) or None)
        listing.add(path, Utterance(part, name, said, samples=int(samples)))
    return prepare_listing(listing, output, [part], options)


def _fairseq_texts(manifest: Path, count: int, encoding: str | None) -> list[str | None]:
    """The transcript of each utterance: words, or else letters with `|` for the end of a word."""
    for suffix in (".wrd", ".ltr"):
        path = manifest.with_suffix(suffix)
        if path.is_file():
            texts = lines_of_file(path, encoding=encoding)
            if len(texts) != count:
                raise UserError(f"{path}: has {len(texts)} lines for the {count} utterances of {manifest.name}")
            if suffix == ".ltr":
                texts = [" ".join("".join(text.split()).replace("|", " ").split()) for text in texts]
            return list(texts)
    return [None] * count
