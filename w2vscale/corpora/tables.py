"""The tables of Hugging Face datasets: the Parquet and Arrow files of a folder by split, or the splits on the Hub."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from w2vscale.corpora.finding import Unusable
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, read_text

SHARD = re.compile(r"(?:(.*?)-)?(\d{5,})(?:-of-(\d{5,}))?(?:-[0-9a-f]{16})?")
"""train-00000-of-00008, train-00000-of-00001-a09b74b3ef9c3b56, 00000"""

CACHED = re.compile(r"(.+)-((?:train|validation|valid|dev|test)(?:\.\w+)*)")
"""librispeech_asr-train.clean.100: a dataset and its split, as `datasets` names its files"""

CACHE_OF_MAP = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow|tmp\w+\.arrow")
"""What the methods of a dataset in memory, such as `map`, write beside its files."""

ABOUT_THE_DATASET = re.compile(
    r"(README|LICENSE|dataset_infos?|dataset_dict|state)(\.\w+)?|\.gitattributes|\.cache|\.huggingface", re.IGNORECASE
)
"""Files and folders that are part of a dataset without having its rows."""

ROWS_AT_A_TIME = 16  # audio can have megabytes per row
BUFFER = 2**20  # bytes; without it, pyarrow reads whole columns of a row group, and with pre_buffer the whole file


class Unreadable(Exception):
    """A table, or a row of one, cannot be used. The message is the reason; `kind` classifies it in a word or two."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


Row = dict[str, Any] | Unreadable
"""The values of a row by column, or why it cannot be read."""


class Table(Protocol):
    """Rows of a split, read as a stream."""

    @property
    def where(self) -> str:
        """The path of its file, or the like."""

    @property
    def folder(self) -> Path:
        """Where relative paths in its rows may begin."""

    def features(self) -> Mapping[str, Any]:
        """The types of its columns, None where `datasets` does not know them. Raises Unreadable or UserError."""

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Its rows, with these columns. Raises Unreadable where the rest cannot be read, or UserError."""


@dataclass(frozen=True)
class TableFile:
    """A .parquet or .arrow file."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        return self.path.parent

    def features(self) -> Mapping[str, Any]:
        import datasets
        import pyarrow
        import pyarrow.parquet

        try:
            if self.path.suffix.lower() == ".parquet":
                schema = pyarrow.parquet.read_schema(self.path)
            else:
                with pyarrow.memory_map(str(self.path)) as file:
                    schema = _reader(file).schema
            features: Mapping[str, Any] = datasets.Features.from_arrow_schema(schema)
        except Exception as error:  # pyarrow and datasets raise many types of errors
            raise Unreadable("unreadable", f"cannot be read: {_in_one_line(error)}") from None
        return features

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        import pyarrow

        number = 0
        try:
            for batch in self._batches(columns):
                for number_in_batch in range(batch.num_rows):
                    row = batch.slice(number_in_batch, 1)
                    try:
                        row.validate(full=True)  # or damaged offsets end the process
                        yield row.to_pylist()[0]
                    except pyarrow.ArrowInvalid as error:
                        yield Unreadable("damaged", _in_one_line(error))
                    number += 1
        except Exception as error:  # as above
            reason = f"cannot be read from row {number} on: {_in_one_line(error)}"
            raise Unreadable("unreadable", reason) from None

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        if self.path.suffix.lower() == ".parquet":
            options = {"buffer_size": BUFFER, "pre_buffer": False, "page_checksum_verification": True}
            with pyarrow.parquet.ParquetFile(self.path, **options) as table:
                yield from table.iter_batches(ROWS_AT_A_TIME, columns=list(columns))
            return
        with pyarrow.memory_map(str(self.path)) as file:
            reader = _reader(file)
            if isinstance(reader, pyarrow.RecordBatchFileReader):
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                batches = iter(reader)
            for batch in batches:
                yield batch.select(list(columns))


@dataclass(frozen=True)
class TableOnHub:
    """A split of a dataset on the Hub. What cannot be read raises UserError: the connection may be lost."""

    source: str
    split: str
    stream: Any  # datasets.IterableDataset

    @property
    def where(self) -> str:
        return f"{self.source}/{self.split}/rows"

    @property
    def folder(self) -> Path:
        return Path()

    def features(self) -> Mapping[str, Any]:
        with_types: Mapping[str, Any] | None = self.stream.features
        return with_types or dict.fromkeys(next(self._read(self.stream.take(1)), {}))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        import datasets

        rows = self.stream.select_columns(list(columns))
        for name in columns:
            if isinstance((self.stream.features or {}).get(name), datasets.Audio):
                rows = rows.cast_column(name, datasets.Audio(decode=False))
        return self._read(rows)

    def _read(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except Exception as error:  # datasets raises many types of errors
            raise UserError(f"{self.source}: cannot be read further: {_in_one_line(error)}") from None


def tables_on_hub(source: str, config: str | None) -> dict[str, Sequence[Table]]:
    """The splits of a dataset on the Hub. Raises UserError if it cannot be opened."""
    import datasets

    try:
        found = datasets.load_dataset(source, config, streaming=True)
    except Exception as error:  # datasets raises many types of errors
        raise UserError(
            f"{source}: cannot be opened as a dataset: {_in_one_line(error)}{nearest_path(source)}"
        ) from None
    return {split: [TableOnHub(source, split, stream)] for split, stream in found.items()}


@dataclass
class TablesInFolder:
    """What is below a folder: tables by split, and files that are something else, with the reason."""

    splits: dict[str, Sequence[Table]] = field(default_factory=dict)
    absent: Counter[str] = field(default_factory=Counter)  # shards of each split that are not there
    unusable: list[Unusable] = field(default_factory=list)
    others: list[tuple[Path, str]] = field(default_factory=list)


def find_tables(folder: Path) -> TablesInFolder:
    """Find the .parquet and .arrow files below a folder. Symbolic links are followed.

    The split of a file is its name without the number of its shard; if nothing else is in the name, it is the name of
    its folder. Names of folders and datasets (de-DE/train.parquet, NAME-train.arrow) are part of the split, unless all
    files have the same. So files that may not belong together are never in one split.

    Raises UserError if the folder has no such file.
    """
    found = TablesInFolder()
    groups: dict[tuple[tuple[str, ...], str, str], list[TableFile]] = {}
    for place, names in _folders(folder, found):
        saved = _saved_dataset(place, names)
        if saved:
            missing = [Unusable(str(place / name), "missing", "no such file") for name in saved.files - {*names}]
            found.unusable += sorted(missing)
        for path in (place / name for name in names):
            suffix = path.suffix.lower()
            if ABOUT_THE_DATASET.fullmatch(path.name):
                continue
            if path.name.startswith("."):
                found.others.append((path, "hidden"))
            elif suffix not in (".parquet", ".arrow"):
                found.others.append((path, "not Parquet or Arrow"))
            elif path.exists() and not path.is_file():  # a FIFO would wait for ever
                found.others.append((path, "not a file"))
            elif CACHE_OF_MAP.fullmatch(path.name):
                found.others.append((path, "cache of datasets"))
            elif saved and path.name not in saved.files:
                found.others.append((path, "not listed in state.json"))
            else:
                folders = place.relative_to(folder).parts
                parts = folders or (saved.split,) if saved else _split_of(path.stem, folders)
                groups.setdefault((parts, str(place), suffix), []).append(TableFile(path))
    if not groups:
        raise UserError(f"{folder}: has no .parquet or .arrow file; for audio files use: w2vscale data prepare folder")
    common = len(Path(os.path.commonpath(["/".join(parts[:-1]) for parts, *_ in groups])).parts)
    for (parts, *_), tables in sorted(groups.items()):
        split = _unused("_".join(parts[common:]), found.splits)
        found.splits[split] = tables
        found.absent[split] = _absent_shards(tables)
    return found


def _absent_shards(tables: Sequence[TableFile]) -> int:
    """How many shards are missing of those that the names of others count (00000-of-00008)."""
    named = [shard for table in tables if (shard := SHARD.fullmatch(table.path.stem)) and shard[3]]
    there = {int(shard[2]) for shard in named}
    return max(max((int(shard[3]) for shard in named), default=0) - len(there), 0)


def _folders(folder: Path, found: TablesInFolder) -> Iterator[tuple[Path, list[str]]]:
    """The folders below a folder that are not hidden, each once, and the sorted names of the files in them."""

    def unreadable(error: OSError) -> None:
        found.unusable.append(Unusable(str(error.filename), "unreadable", f"cannot be read: {error.strerror}"))

    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            found.others.append((Path(place), "link to a folder that is used anyway"))
            folders.clear()
            continue
        visited.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        found.others += [(Path(place, name), "hidden") for name in hidden if not ABOUT_THE_DATASET.fullmatch(name)]
        folders[:] = sorted({*folders} - {*hidden})
        yield Path(place), sorted(names)


class _Saved(NamedTuple):
    split: str
    files: set[str]


def _saved_dataset(folder: Path, names: Sequence[str]) -> _Saved | None:
    """What `save_to_disk` wrote to a folder, unless this is something else."""
    if "state.json" not in names:
        return None
    try:
        state = json.loads(read_text(folder / "state.json"))
        files = {str(file["filename"]) for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Saved(str(state.get("_split") or "train").replace("/", "_").lstrip(".") or "train", files)


def _split_of(stem: str, folders: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of the name of a split: folders, the dataset, and the split itself."""
    shard = SHARD.fullmatch(stem)
    name = (shard[1] or "") if shard else stem
    if name in ("", "data") or name.isdecimal():
        return folders or ("train",)
    cached = CACHED.fullmatch(name)
    return (*folders, *(cached.groups() if cached else (name,)))


def _unused(name: str, names: Container[str]) -> str:
    """`name`, with a number if it is in `names`."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return name if name not in names else next(other for other in numbered if other not in names)


def _reader(file: Any) -> Any:
    """A reader of an Arrow file, in the format of streams, as `datasets` writes it, or in that of files."""
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(file)
    except pyarrow.ArrowInvalid:
        file.seek(0)
        return pyarrow.ipc.open_file(file)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
