"""Prepare a dataset of Hugging Face: a folder of Parquet or Arrow files, or a name on the Hub, read as a stream."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from w2vscale.corpora.finding import Unusable
from w2vscale.corpora.listing import Listing, Utterance, prepare_listing
from w2vscale.corpora.preparing import DEFAULTS, Options, Text
from w2vscale.corpora.report import Report
from w2vscale.data.audio import RATES_IN_WORDS, SAMPLING_RATES
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, new_file

COLUMNS = {
    "text": ("text", "sentence", "transcript", "transcription", "normalized_text", "raw_transcription", "raw_text"),
    "speaker": ("speaker_id", "speaker", "client_id", "spk_id"),
    "language": ("language", "locale", "lang"),
    "id": ("id", "segment_id", "utterance_id", "utt_id", "uid"),
}
"""Names of columns that are taken, the first one that a dataset has."""

MAGIC = {
    ".wav": rb"RIFF",
    ".flac": rb"fLaC",
    ".ogg": rb"OggS",
    ".aiff": rb"FORM",
    ".m4a": rb"....ftyp",
    ".webm": rb"\x1aE\xdf\xa3",
    ".wma": rb"0&\xb2u",
    ".mp3": rb"ID3|\xff[\xe0-\xff]",
}
"""The first bytes of encoded audio by the suffix of its format."""

FILES_PER_FOLDER = 10_000
MOST_CHANNELS = 16
LOUDEST = 100.0  # of floating-point samples


def prepare_huggingface(
    source: str,
    output: Path,
    *,
    config: str | None = None,
    splits: Sequence[str] = (),
    audio: str | None = None,
    text: str | None = None,
    options: Options = DEFAULTS,
) -> Report:
    """Write `cuts_SPLIT.jsonl` for each split of a dataset, and its audio, as it is encoded, to `output`/audio/SPLIT/.

    `source` is a folder that `save_to_disk` wrote, a folder of .parquet or .arrow files, or a dataset on the Hub, whose
    configuration is `config`. `audio` and `text` are the names of its columns, if they are not found by themselves. A
    repeated call keeps the audio files that are there.

    Raises UserError if datasets is not installed, the dataset or a column cannot be found, or like `write_manifests`.
    """
    if config is not None and Path(source).is_dir():
        raise UserError(f"--config {config}: only a dataset on the Hub has configurations; {source} is a folder")
    found = _open(source, config)
    for split in splits:
        if split not in found:
            raise UserError(f"--split {split}: {source} has no such split; choose from {', '.join(found)}")
    listing = Listing(output.absolute())
    chosen = list(dict.fromkeys(splits or found))
    for split in chosen:
        _add(listing, source, split, found[split], audio, text)
    return prepare_listing(listing, output, chosen, options)


def _open(source: str, config: str | None) -> Mapping[str, Any]:
    """The splits of a dataset, as streams of rows."""
    try:
        import datasets
    except ImportError:
        raise UserError("datasets is not installed: pip install 'w2vscale[datasets]'") from None
    folder = Path(source)
    try:
        if not folder.is_dir():
            if folder.suffix or source.startswith((".", "/")) or source.count("/") > 1:
                raise UserError(f"{source}: no such folder{nearest_path(source)}")
            found = datasets.load_dataset(source, config, streaming=True)
        elif any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source)
        else:
            kind, files = _files_by_split(folder)
            found = datasets.load_dataset(kind, data_files=files, streaming=True)
    except UserError:
        raise
    except Exception as error:  # datasets raises many types of errors
        raise UserError(f"{source}: cannot be opened as a dataset: {' '.join(str(error).split())[:300]}") from None
    return found if isinstance(found, Mapping) else {str(getattr(found, "split", None) or "train"): found}


def _files_by_split(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The format of the files below a folder, and the files of each split, which their names begin with.

    Where several folders have the same split, as with a folder per language, their names become part of it.
    """
    for kind in ("parquet", "arrow"):
        found: dict[str, dict[str, list[str]]] = {}  # by split and folder
        for path in sorted(folder.rglob(f"*.{kind}")):
            split, place = path.stem.partition("-")[0], path.parent.relative_to(folder).as_posix()
            if split.isdecimal() and path.parent != folder:
                split, place = path.parent.name, path.parent.parent.relative_to(folder).as_posix()
            found.setdefault(split, {}).setdefault(place, []).append(str(path))
        if found:
            return kind, {
                split if len(places) == 1 else f"{place.replace('/', '_')}_{split}": files
                for split, places in found.items()
                for place, files in places.items()
            }
    raise UserError(f"{folder}: has no .parquet or .arrow file; for audio files use: w2vscale data prepare folder")


def _add(listing: Listing, source: str, split: str, rows: Any, audio: str | None, text: str | None) -> None:
    """Add the utterances of a split, and save their audio."""
    import datasets

    names = list(rows.features or next(iter(rows.take(1)), {}))
    columns = {what: next((name for name in known if name in names), None) for what, known in COLUMNS.items()}
    columns["text"] = text or columns["text"]
    audio = audio or _audio_column(rows, names)
    for option, column in (("--audio-column", audio), ("--text-column", columns["text"])):
        if column is not None and column not in names:
            raise UserError(f"{option} {column}: {source} has the columns {', '.join(names)}")
    if audio is None:
        raise UserError(f"{source}: no column with audio; name it with --audio-column: {', '.join(names)}")
    if isinstance((rows.features or {}).get(audio), datasets.Audio):
        rows = rows.cast_column(audio, datasets.Audio(decode=False))
    used = ", ".join(f"{what} from {name}" for what, name in {"audio": audio, **columns}.items() if name)
    without = "" if columns["text"] else ", and no transcripts: name their column with --text-column"
    for number, row in enumerate(_rows(rows, source)):
        listing.notes[f"rows of {split}: {used}{without}"] += 1
        values = {what: str(row[name]) for what, name in columns.items() if name and row.get(name) is not None}
        name = listing.new_name(split, values.get("id") or f"{split}-{number:08d}")
        try:
            file = _save(row[audio], listing.folder / "audio" / split / str(number // FILES_PER_FOLDER), name, number)
        except ValueError as error:
            listing.unusable.append(Unusable(f"{split} {number}", "no audio", f"{name}: {error}"))
            continue
        said = Text(values.get("text"), values.get("speaker"), values.get("language"))
        listing.add(file, Utterance(split, name, said))


def _rows(rows: Any, source: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # damaged files and lost connections raise many types of errors
        raise UserError(f"{source}: cannot be read further: {' '.join(str(error).split())[:300]}") from None


def _audio_column(rows: Any, names: Sequence[str]) -> str | None:
    """The column that has audio: by its type, or else by its name."""
    import datasets

    for name, kind in (rows.features or {}).items():
        if isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()):
            return str(name)
    return "audio" if "audio" in names else None


def _save(value: Any, folder: Path, name: str, number: int) -> str:
    """Save encoded audio, unless it is there already; returns its path. ValueError if there is no audio in `value`."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    path = value.get("path") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and value.get("array") is not None:
        content, path = _encoded(value["array"], value.get("sampling_rate")), "array.wav"
    if not isinstance(content, bytes):
        path = value if isinstance(value, str) else path
        if path and os.path.isfile(path):
            return os.path.abspath(path)
        raise ValueError(f"there is no audio file {path[:200]!r}" if path else "it has no audio")
    detected = (suffix for suffix, magic in MAGIC.items() if re.match(magic, content, re.DOTALL))
    suffix = os.path.splitext(path or "")[1].lower() or next(detected, ".wav")
    target = folder / f"{number:08d}{suffix}"
    if not (target.is_file() and target.read_bytes() == content):
        with new_file(target, "wb") as file:
            file.write(content)
    return str(target)


def _encoded(array: Any, rate: Any) -> bytes:
    """Decoded samples [S], or [channels, S] of at most 16 channels, as WAV. ValueError if they are something else."""
    if type(rate) is not int or rate not in SAMPLING_RATES:
        raise ValueError(f"its samples have the sampling rate {rate}, not {RATES_IN_WORDS}")
    try:
        samples = np.asarray(array)
        if samples.dtype.kind == "i":  # lists of the values of 16-bit audio
            samples = samples / 2**15
        samples = samples.astype(np.float32)
    except (TypeError, ValueError):
        raise ValueError("its samples are not numbers") from None
    if samples.ndim == 2 and len(samples) <= MOST_CHANNELS:
        samples = samples.T
    if samples.ndim not in (1, 2) or samples[:1].size > MOST_CHANNELS or np.abs(samples).max(initial=0) > LOUDEST:
        raise ValueError("its samples are not audio: numbers about -1 to 1, or integers of 16 bits")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
