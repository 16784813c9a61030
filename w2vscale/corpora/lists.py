"""Read the lists that users of other toolkits have: Kaldi's data folders, NeMo's manifests, fairseq's .tsv files."""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

from w2vscale.corpora.finding import Unusable
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


def prepare_kaldi(folder: Path, output: Path, *, encoding: str | None = None, options: Options = DEFAULTS) -> Report:
    """Write `cuts_FOLDER.jsonl` for a data folder of Kaldi: wav.scp; segments, text, utt2spk and utt2lang if present.

    No command in wav.scp is run: where it only decodes a file, the file is read. Raises UserError if a file is missing
    or has another form, or like `write_manifests`.
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
    base = _base(folder, audio)
    for recording, source in audio.items():
        try:
            path, channel = _file_of(source)
            files[recording] = (str(base / path), channel)
        except ValueError as error:
            listing.unusable.append(Unusable(source[:200], "command", str(error)))
    utterances = [KaldiSegment(recording, recording, 0.0, math.inf, None) for recording in audio]
    if (folder / "segments").is_file():
        utterances = read_segments(folder / "segments", encoding=encoding)
    if texts is not None:
        count_differences(texts, {utterance.name for utterance in utterances}, listing.notes)
    without_audio = 0
    for name, recording, start, end, channel in utterances:
        if recording not in files:
            without_audio += recording not in audio
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
    listing.notes["segments of recordings that are not in wav.scp, which are left out"] += without_audio
    return prepare_listing(listing, output, [part], options)


def _file_of(source: str) -> tuple[str, int | None]:
    """The file that an entry of wav.scp decodes, and its channel if one is chosen. ValueError if it does more."""
    if not source.endswith("|"):
        if source == "-" or (source.rpartition(":")[2].isdecimal() and ".ark:" in source):
            raise ValueError("audio in archives is not read: save it as files")
        return source, None
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
    return files[0], int(chosen) - 1 if chosen else None


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

    Paths are absolute or relative to the manifest. Raises UserError if a line has another form, or like
    `write_manifests`.
    """
    listing, part = Listing(manifest.absolute().parent), manifest.stem
    for number, line in enumerate(_lines(manifest, encoding), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path = entry["audio_filepath"]
            start, duration = float(entry.get("offset") or 0.0), entry.get("duration")
            length = None if duration is None else float(duration)
            channel = entry.get("channel_selector")
            if not isinstance(path, str):
                raise TypeError("audio_filepath is not text")
            json.dumps(entry, ensure_ascii=False).encode()  # raises for half of a surrogate pair
            if channel is not None and type(channel) is not int:
                raise TypeError("channel_selector is not the number of a channel")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:100]
            raise UserError(f"{manifest}: line {number} is not an utterance of NeMo: {reason}") from None
        if "shard_id" in entry:
            raise UserError(f"{manifest}: line {number} is of audio in a tar archive; unpack it, and use its manifest")
        given = next((entry[key] for key in ("id", "utt_id") if entry.get(key) is not None), None)
        name = os.path.splitext(path)[0].lstrip("./").replace("/", "-") if given is None else str(given)
        language = entry.get("lang") or entry.get("language") or entry.get("source_lang")
        text = Text(_text(entry.get("text")), _text(entry.get("speaker")), _text(language))
        listing.add(path, Utterance(part, listing.new_name(part, name), text, start, length, channel))
    return prepare_listing(listing, output, [part], options)


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return None if value is None else str(value)


def _lines(path: Path, encoding: str | None) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file{nearest_path(path)}")
    return lines_of_file(path, encoding=encoding)


def prepare_fairseq(
    manifest: Path, output: Path, *, encoding: str | None = None, options: Options = DEFAULTS
) -> Report:
    """Write `cuts_NAME.jsonl` for a fairseq manifest NAME.tsv, with the transcripts NAME.wrd or NAME.ltr if present.

    The first line is the folder of the audio, each other line a path and its number of samples. The folder of a file is
    its speaker. Raises UserError if a line has another form, the transcripts have another number of lines, or like
    `write_manifests`.
    """
    lines = _lines(manifest, encoding)
    root, entries = Path(lines[0].strip()) if lines else Path(), [line for line in lines[1:] if line.strip()]
    if not entries:
        raise UserError(
            f"{manifest}: has no utterance; the first line is a folder, each other a path, a tab and samples"
        )
    if not root.is_absolute():
        root = manifest.absolute().parent / root
    texts = _fairseq_texts(manifest, len(entries), encoding)
    listing, part = Listing(root), manifest.stem
    for number, (line, text) in enumerate(zip(entries, texts, strict=True), start=2):
        path, tab, samples = line.partition("\t")
        if not (tab and samples.strip().isdecimal()):
            raise UserError(f"{manifest}: line {number} is not a path, a tab, and a number of samples")
        name = os.path.splitext(path)[0].replace("/", "-")
        listing.add(path, Utterance(part, listing.new_name(part, name), Text(text, os.path.dirname(path) or None)))
        listing.recordings[path].samples = int(samples)
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
