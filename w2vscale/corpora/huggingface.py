"""Prepare a dataset of Hugging Face: a folder of Parquet or Arrow files, or a name on the Hub, read as a stream."""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from w2vscale.corpora.finding import Unusable
from w2vscale.corpora.listing import Listing, Utterance, prepare_listing
from w2vscale.corpora.preparing import DEFAULTS, Options, Text
from w2vscale.corpora.report import Report
from w2vscale.corpora.tables import Table, TablesInFolder, Unreadable, find_tables, tables_on_hub
from w2vscale.data.audio import RATES_IN_WORDS, SAMPLING_RATES
from w2vscale.data.decoding import is_audio
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, new_file, writing

COLUMNS = {
    "text": ("text", "sentence", "transcript", "transcription", "normalized_text", "raw_transcription", "raw_text"),
    "speaker": ("speaker_id", "speaker", "client_id", "spk_id"),
    "language": ("language", "locale", "lang"),
    "id": ("id", "segment_id", "utterance_id", "utt_id", "uid"),
}
"""Names of columns that are taken, the first one that a dataset has."""

MAGIC = {
    ".wav": rb"RIFF....WAVE",
    ".flac": rb"fLaC",
    ".ogg": rb"OggS",
    ".aiff": rb"FORM",
    ".m4a": rb"....ftyp",
    ".webm": rb"\x1aE\xdf\xa3",
    ".wma": rb"0&\xb2u",
    ".aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    ".mp3": rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]",
}
"""The first bytes of encoded audio by the suffix of its format. Those of ID3 tags do not tell the format."""

KINDS: dict[type, str] = {list: "a list", dict: "a struct", bool: "a truth value", int: "a number", float: "a number"}

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

    `source` is a folder of .parquet or .arrow files, also one that `save_to_disk` wrote (see `find_tables`), or a
    dataset on the Hub, whose configuration is `config`. `audio` and `text` are the names of its columns, if they are
    not found by themselves. A repeated call keeps the audio files that are there. Files and rows that cannot be used
    are left out and reported.

    Raises UserError if datasets is not installed, the dataset or a split cannot be found, the Hub cannot be read, the
    audio cannot be written, or like `prepare_listing`.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError("datasets is not installed: pip install 'w2vscale[datasets]'")
    folder = Path(source).absolute()
    local = folder.is_dir()
    if local and config is not None:
        raise UserError(f"--config {config}: only a dataset on the Hub has configurations; {source} is a folder")
    if not local and (folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"{source}: no such folder{nearest_path(source)}")
    found = find_tables(folder) if local else TablesInFolder(tables_on_hub(source, config))
    for split in splits:
        if split not in found.splits:
            raise UserError(f"--split {split}: {source} has no such split; choose from {', '.join(found.splits)}")
    listing = Listing(folder if local else output.absolute(), unusable=found.unusable)
    chosen = list(dict.fromkeys(splits or found.splits))
    for split in chosen:
        listing.notes[f"shards of {split} that are not in the folder"] = found.absent[split]
        _add(listing, split, found.splits[split], output.absolute() / "audio" / split, audio, text)
    for path, reason in found.others:
        if str(path) not in listing.recordings:  # rows may name audio files beside their table
            listing.others[path.suffix.lower() or "(no suffix)", reason] += 1
            if is_audio(path.name):
                listing.left_out.append((str(path), reason))
    return prepare_listing(listing, output, chosen, options)


def _add(
    listing: Listing, split: str, tables: Sequence[Table], saved: Path, audio: str | None, text: str | None
) -> None:
    """Add the utterances of a split, and save their audio to the folder `saved`."""
    number = 0  # of a row in the split
    columns_used: Counter[str] = Counter()
    for table in tables:
        try:
            features = table.features()
            columns = _columns(features, audio, text)
            for row_of_table, row in enumerate(table.rows([*columns.values()])):
                columns_used[_in_words(columns)] += 1
                target = saved / str(number // FILES_PER_FOLDER) / f"{number:08d}"
                try:
                    if isinstance(row, Unreadable):
                        raise row
                    values = {what: _value(what, row.get(name), features[name]) for what, name in columns.items()}
                    file = _save(values["audio"], target, (table.folder, listing.folder, Path()))
                except Unreadable as error:
                    listing.unusable.append(Unusable(table.where, error.kind, f"row {row_of_table}: {error}"))
                else:
                    name = listing.new_name(split, values.get("id") or f"{split}-{number:08d}")
                    said = Text(values.get("text"), values.get("speaker"), values.get("language"))
                    listing.add(file, Utterance(split, name, said))
                number += 1
        except Unreadable as error:
            listing.unusable.append(Unusable(table.where, error.kind, str(error)))
    for used, rows in columns_used.items():
        listing.notes[f"{'row' if rows == 1 else 'rows'} of {split}: {used}"] = rows


def _columns(features: Mapping[str, Any], audio: str | None, text: str | None) -> dict[str, str]:
    """The names of the columns for audio, text, speaker, language and id. Raises Unreadable if there is no audio."""
    columns = {"audio": audio or _audio_column(features)}
    columns |= {what: next((name for name in known if name in features), None) for what, known in COLUMNS.items()}
    columns["text"] = text or columns["text"]
    names = ", ".join(features)
    for option, what in (("--audio-column", "audio"), ("--text-column", "text")):
        if columns[what] is not None and columns[what] not in features:
            raise Unreadable("columns", f"has no column {columns[what]} ({option}); its columns are {names}")
    if columns["audio"] is None:
        raise Unreadable("columns", f"no column with audio; name it with --audio-column: {names}")
    return {what: name for what, name in columns.items() if name is not None}


def _audio_column(features: Mapping[str, Any]) -> str | None:
    """The column that has audio: by its type, or else by its name."""
    import datasets

    for name, kind in features.items():
        if isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()):
            return name
    return "audio" if "audio" in features else None


def _in_words(columns: Mapping[str, str]) -> str:
    without = "" if "text" in columns else ", and no transcripts: name their column with --text-column"
    return ", ".join(f"{what} from {name}" for what, name in columns.items()) + without


def _value(what: str, value: Any, feature: Any) -> Any:
    """A value as it is if it is audio, else as a text, or None. Raises Unreadable if it is something else."""
    import datasets

    if what == "audio" or value is None or value != value:  # NaN is how pandas writes a missing value
        return value if what == "audio" else None
    if isinstance(feature, datasets.ClassLabel):
        if value == -1:  # how datasets writes an unknown label
            return None
        if not 0 <= value < feature.num_classes:
            raise Unreadable(what, f"its {what} is the label {value}, which has no name")
        return str(feature.int2str(value))
    if isinstance(value, str) or (what != "text" and isinstance(value, int | float)):
        return str(value)
    raise Unreadable(what, f"its {what} is {KINDS.get(type(value), f'of type {type(value).__name__}')}, not text")


def _save(value: Any, target: Path, folders: Sequence[Path]) -> str:
    """Save encoded audio as `target` with a suffix, unless it is there already; returns its path.

    Audio that `value` only names is looked up in `folders`, and stays where it is. Raises Unreadable if there is no
    audio, and UserError if it cannot be written.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else value
    path = value.get("path") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and value.get("array") is not None:
        content, path = _encoded(value["array"], value.get("sampling_rate")), None
    if not isinstance(content, bytes):
        path = value if isinstance(value, str) else path
        if not isinstance(path, str):
            raise Unreadable("no audio", "it has no audio")
        for folder in folders:
            if os.path.isfile(folder / path):
                return os.path.abspath(folder / path)
        raise Unreadable("missing", f"there is no audio file {path[:200]!r}")
    detected = (suffix for suffix, magic in MAGIC.items() if re.match(magic, content, re.DOTALL))
    named = os.path.splitext(path)[1].lower() if path and is_audio(path) else ".wav"
    target = target.with_suffix(next(detected, named))
    with writing(target):
        unchanged = target.is_file() and target.read_bytes() == content
    if not unchanged:
        with new_file(target, "wb") as file:
            file.write(content)
    return str(target)


def _encoded(array: Any, rate: Any) -> bytes:
    """Decoded samples [S], or [channels, S] of at most 16 channels, as WAV. Raises Unreadable if they are not."""
    if type(rate) is not int or rate not in SAMPLING_RATES:
        raise Unreadable("no audio", f"its samples have the sampling rate {rate}, not {RATES_IN_WORDS}")
    try:
        samples = np.asarray(array)
        if samples.dtype.kind == "i":  # lists of the values of 16-bit audio
            samples = samples / 2**15
        samples = samples.astype(np.float32)
    except (TypeError, ValueError):
        raise Unreadable("no audio", "its samples are not numbers") from None
    if samples.ndim == 2 and len(samples) <= MOST_CHANNELS:
        samples = samples.T
    if samples.ndim not in (1, 2) or samples[:1].size > MOST_CHANNELS or np.abs(samples).max(initial=0) > LOUDEST:
        raise Unreadable("no audio", "its samples are not audio: numbers about -1 to 1, or integers of 16 bits")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
