"""Prepare corpora by name. Where Lhotse has a recipe, it reads how the corpus is laid out; we read and check the audio.

While a recipe runs, its audio is not opened: every file seems to have `UNREAD` seconds. So one damaged file does not
end a recipe, and Lhotse's decoders, some of which run programs, are not used. Lhotse's recipes of MLS, Common Voice and
Libri-Light are not used: they end at the first file that is missing, or open audio in processes of their own.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from lhotse.audio import backend

from w2vscale.corpora.finding import PREFERRED, FolderContents, Unusable, find_audio, identifier_of
from w2vscale.corpora.listing import Listing, Recording, Utterance, prepare_listing
from w2vscale.corpora.manifests import existing_folder
from w2vscale.corpora.preparing import DEFAULTS, Options, Text, check_segment_seconds
from w2vscale.corpora.report import Report
from w2vscale.corpora.segments import Segment
from w2vscale.corpora.text_files import lines_of_file, text_of_file
from w2vscale.data.decoding import is_audio
from w2vscale.errors import UserError

UNREAD = 1e6  # seconds
RATE = 16_000  # Hz

Sets = Mapping[str, Any]
"""Lhotse's `recordings` and `supervisions` of a part of a corpus."""

WITHOUT_TRANSCRIPT = "audio files without a transcript, which are left out"
WITHOUT_ROW = "clips that no table of their language names, which are left out"


def prepare_librispeech(
    corpus: Path, output: Path, *, parts: Sequence[str] = (), mini: bool = False, options: Options = DEFAULTS
) -> Report:
    """Write `cuts_PART.jsonl` for each part of LibriSpeech or mini LibriSpeech found in `corpus`.

    Raises UserError if the folder or a part is missing, a part has no utterances, or like `write_manifests`.
    """
    # Imported here: the module imports the recipes of all corpora that Lhotse supports.
    from lhotse.recipes import librispeech as recipe

    known = recipe.MINI_LIBRISPEECH if mini else (*recipe.LIBRISPEECH, *recipe.MINI_LIBRISPEECH)
    corpus = _root(corpus, known, "LibriSpeech")
    chosen = _chosen(corpus, known, parts)

    def read(part: str) -> Sets:
        found: Sets = recipe.prepare_librispeech(corpus, dataset_parts=[part])[part]
        return found

    return _prepare(recipe, corpus, output, chosen, read, options)


def prepare_mini_librispeech(
    corpus: Path, output: Path, *, parts: Sequence[str] = (), options: Options = DEFAULTS
) -> Report:
    """Write `cuts_PART.jsonl` for train-clean-5 and dev-clean-2, like `prepare_librispeech`."""
    return prepare_librispeech(corpus, output, parts=parts, mini=True, options=options)


def prepare_gigaspeech(corpus: Path, output: Path, *, parts: Sequence[str] = (), options: Options = DEFAULTS) -> Report:
    """Write `cuts_PART.jsonl` for parts of GigaSpeech, by default XL, DEV and TEST.

    Raises UserError if speechcolab is not installed, or like `prepare_librispeech`.
    """
    from lhotse.recipes import gigaspeech as recipe

    corpus = existing_folder(corpus)
    if not (corpus / "GigaSpeech.json").is_file():
        raise UserError(f"{corpus}: has no GigaSpeech.json")
    for part in parts:
        if part not in recipe.GIGASPEECH_PARTS:
            raise UserError(_unknown_part(part, recipe.GIGASPEECH_PARTS))

    def read(part: str) -> Sets:
        with TemporaryDirectory() as folder, _replaced(recipe, "parallel_map", _map):  # Lhotse writes its own manifests
            found = recipe.prepare_gigaspeech(corpus, folder, dataset_parts=[part])[part]
            return {name: found[name].to_eager() for name in ("recordings", "supervisions")}

    return _prepare(recipe, corpus, output, list(dict.fromkeys(parts or ("XL", "DEV", "TEST"))), read, options)


def prepare_peoples_speech(
    corpus: Path, output: Path, *, parts: Sequence[str] = (), options: Options = DEFAULTS
) -> Report:
    """Write `cuts_PART.jsonl` for the parts of The People's Speech in `corpus`, such as clean. UserError as above."""
    from lhotse.recipes import peoples_speech as recipe

    corpus = existing_folder(corpus)
    subsets = {subset.partition("/")[2]: subset for subset in recipe.PEOPLES_SPEECH}
    found = [part for part, subset in subsets.items() if (corpus / f"{subset}.json").is_file()]
    chosen = _chosen(corpus, subsets, parts, found=found)

    def read(part: str) -> Sets:
        with _replaced(recipe, "PEOPLES_SPEECH", (subsets[part],)):
            sets: Sets = recipe.prepare_peoples_speech(corpus)[subsets[part]]
            return sets

    return _prepare(recipe, corpus, output, chosen, read, options)


def prepare_aishell(corpus: Path, output: Path, *, parts: Sequence[str] = (), options: Options = DEFAULTS) -> Report:
    """Write `cuts_PART.jsonl` for train, dev and test of AISHELL-1 that are in `corpus`. UserError as above."""
    from lhotse.recipes import aishell as recipe

    corpus = _root(corpus, ["data_aishell"], "aishell")
    known = ("train", "dev", "test")
    found = [part for part in known if (corpus / "data_aishell" / "wav" / part).is_dir()]
    chosen = _chosen(corpus / "data_aishell" / "wav", known, parts, found=found)
    known_sets: dict[str, Sets] = {}

    def read(part: str) -> Sets:
        if not known_sets:
            known_sets.update(recipe.prepare_aishell(corpus))
        return known_sets[part]

    return _prepare(recipe, corpus, output, chosen, read, options)


def prepare_voxpopuli(corpus: Path, output: Path, *, language: str, options: Options = DEFAULTS) -> Report:
    """Write `cuts_LANGUAGE_PART.jsonl` for the transcribed train, dev and test of VoxPopuli in one language.

    `corpus` has raw_audios/LANGUAGE and the transcripts asr_LANGUAGE.tsv.gz. UserError as above.
    """
    from lhotse.recipes import voxpopuli as recipe

    corpus = existing_folder(corpus)
    if language not in recipe.ASR_LANGUAGES:
        raise UserError(f"--language {language}: choose one of {', '.join(recipe.ASR_LANGUAGES)}")
    existing_folder(corpus / "raw_audios" / language)
    places = [corpus / name for name in ("", "transcribed_data", f"transcribed_data/{language}", "annotations/asr")]
    transcripts = next((path for place in places if (path := place / f"asr_{language}.tsv.gz").is_file()), None)
    if transcripts is None:  # Lhotse would download it
        url = f"{recipe.DOWNLOAD_BASE_URL}/annotations/asr/asr_{language}.tsv.gz"
        raise UserError(
            f"{corpus}: has no asr_{language}.tsv.gz: get it from {url}, or prepare the audio without transcripts: "
            f"w2vscale data prepare folder {corpus}/raw_audios/{language} OUT --language {language}"
        )
    known_sets: dict[str, Sets] = {}

    def read(part: str) -> Sets:
        if not known_sets:
            with TemporaryDirectory() as folder:
                (Path(folder) / transcripts.name).symlink_to(transcripts)
                known_sets.update(recipe.prepare_voxpopuli(corpus, folder, lang=language))
        return known_sets[part.rpartition("_")[2]]

    parts = [f"{language}_{part}" for part in ("train", "dev", "test")]
    return _prepare(recipe, corpus, output, parts, read, options)


def prepare_mls(corpus: Path, output: Path, *, parts: Sequence[str] = (), options: Options = DEFAULTS) -> Report:
    """Write `cuts_LANGUAGE_PART.jsonl` for train, dev and test of each language of MLS, such as german_train.

    `corpus` has folders such as mls_german_opus or mls_german. A line of another form is unusable. UserError as above.
    """
    corpus = existing_folder(corpus)
    if corpus.name.startswith("mls_"):
        corpus = corpus.parent
    folders = {
        f"{folder.name.split('_')[1]}_{part}": folder / part
        for folder in sorted(corpus.glob("mls_*"))
        for part in ("train", "dev", "test")
        if (folder / part / "transcripts.txt").is_file()
    }
    listing = Listing(corpus)
    chosen = _chosen(corpus, folders, parts, found=list(folders))
    for part in chosen:
        path = folders[part] / "transcripts.txt"
        there = _audio_below(folders[part] / "audio")
        suffix = ".flac" if any(file.endswith(".flac") for file in there) else ".opus"
        for number, line in enumerate(lines_of_file(path, strip=False), start=1):
            name, tab, text = line.partition("\t")
            speaker, book, *_ = [*name.split("_"), ""]
            if tab and book:
                file = str(folders[part] / "audio" / speaker / book / f"{name}{suffix}")
                there.discard(file)
                listing.add(file, Utterance(part, name, Text(text.strip(), speaker, part.partition("_")[0])))
            elif line.strip():
                reason = f"line {number} is not: SPEAKER_BOOK_NUMBER, a tab, and the text"
                listing.unusable.append(Unusable(str(path), "line", reason))
        listing.notes[WITHOUT_TRANSCRIPT] += len(there)
    return prepare_listing(listing, output, chosen, options)


def prepare_commonvoice(
    corpus: Path, output: Path, *, parts: Sequence[str] = (), options: Options = DEFAULTS
) -> Report:
    """Write `cuts_LANGUAGE_PART.jsonl` for each language of Common Voice, by default for train, dev and test.

    `corpus` is the folder of a language, with clips/ and train.tsv, or the folder of several. A row of another form is
    unusable. UserError as above.
    """
    corpus = existing_folder(corpus)
    folders = [corpus] if (corpus / "clips").is_dir() else sorted(path.parent for path in corpus.glob("*/clips"))
    tables = {f"{folder.name}_{table.stem}": table for folder in folders for table in sorted(folder.glob("*.tsv"))}
    found = [part for part in tables if part.endswith(("_train", "_dev", "_test"))]
    wanted = [[name for name in tables if part == name or name.endswith(f"_{part}")] or [part] for part in parts]
    chosen = _chosen(
        corpus, tables, [*dict.fromkeys(chain.from_iterable(wanted))], found=list(tables) if parts else found
    )
    listing = Listing(corpus)
    for part in chosen:
        columns, rows = _table(tables[part])
        if not {"path", "sentence"} <= {*columns}:
            raise UserError(f"{tables[part]}: has no columns path and sentence")
        for number, values in rows:
            row = dict(zip(columns, values, strict=False))
            wrong = f"has more than {len(columns)} columns" if len(values) > len(columns) else ""
            if wrong or not row.get("path") or "sentence" not in row:
                reason = f"line {number} {wrong or 'has no path or no sentence'}"
                listing.unusable.append(Unusable(str(tables[part]), "row", reason))
                continue
            file = tables[part].parent / "clips" / row["path"]
            language = row.get("locale") or tables[part].parent.name
            text = Text(row["sentence"].strip(), row.get("client_id") or None, language)
            listing.add(str(file), Utterance(part, file.stem, text))
    for folder in {tables[part].parent: None for part in chosen}:
        _count_unnamed_clips(folder, listing.notes)
    return prepare_listing(listing, output, chosen, options)


def _table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The columns of a .tsv file, and the number and values of each line that is not blank."""
    first, *rest = lines_of_file(path, strip=False) or [""]
    return first.split("\t"), ((number, line.split("\t")) for number, line in enumerate(rest, 2) if line.strip())


def _count_unnamed_clips(folder: Path, notes: Counter[str]) -> None:
    """Count the clips of a language of Common Voice that none of its tables names, and tables that cannot be read."""
    clips = _audio_below(folder / "clips")
    for table in sorted(folder.glob("*.tsv")):
        try:
            columns, rows = _table(table)
        except UserError as error:
            notes[f"table of clips cannot be read: {error}"] += 1
            continue
        if "path" in columns:
            at = columns.index("path")
            clips.difference_update(f"{folder}/clips/{values[at]}" for _, values in rows if len(values) > at)
    notes[WITHOUT_ROW] += len(clips)


def _audio_below(folder: Path) -> set[str]:
    """The paths of the audio files below a folder that are not hidden."""
    return {
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if is_audio(name) and not name.startswith(".")
    }


def prepare_librilight(
    corpus: Path,
    output: Path,
    *,
    parts: Sequence[str] = (),
    segment_seconds: float = 30.0,
    options: Options = DEFAULTS,
) -> Report:
    """Write `cuts_PART.jsonl` for small, medium and large of Libri-Light, as far as they are in `corpus`.

    The recordings are cut at pauses into segments of at most `segment_seconds`, by the speech that is listed in the
    JSON file beside each recording. UserError as above.
    """
    check_segment_seconds(segment_seconds, at_pauses=True)
    known = ("small", "medium", "large")
    corpus = _root(corpus, known, "librilight")
    chosen = _chosen(corpus, known, parts)
    listing = Listing(corpus, longest=segment_seconds)
    for part in chosen:
        contents = find_audio(corpus / part)
        listing.others += _not_used(contents)
        listing.left_out += [(f"{part}/{path}", reason) for path, reason in contents.left_out]
        listing.unusable += [one._replace(path=f"{part}/{one.path}") for one in contents.unusable]
        for file in contents.audio:
            path = f"{part}/{file.path}"
            described = (corpus / path).with_suffix(".json")
            try:
                document = json.loads(text_of_file(described))
                speech = [Segment(float(start), float(end)) for start, end in document["voice_activity"]]
                if sorted(speech) != speech or any(not 0.0 <= start < end for start, end in speech):
                    raise ValueError("its times are not in order")
            except (UserError, ValueError, KeyError, TypeError) as error:
                why = " ".join(str(error).removeprefix(f"{described}: ").split())
                reason = f"its speech is not listed in {described.name}: {why}"
                listing.unusable.append(Unusable(path, "no speech listed", reason))
                continue
            name = identifier_of(path)
            speaker = document.get("speaker") or Path(file.path).parts[0]
            utterance = Utterance(part, name, Text(None, str(speaker), "English"))
            listing.recordings[path] = Recording(name, [utterance], speech)
    return prepare_listing(listing, output, chosen, options)


def _not_used(contents: FolderContents) -> Counter[tuple[str, str]]:
    """What is not used of a part of Libri-Light: the .json beside a recording is, and transcripts are not."""
    found: Counter[tuple[str, str]] = Counter()
    for (suffix, reason), count in contents.others.items():
        found[suffix, "not used with Libri-Light" if reason == PREFERRED else reason] += count
    for file in contents.audio:
        found.update((suffix.lower(), "not used with Libri-Light") for suffix in file.suffixes)
    return Counter({entry: count for entry, count in found.items() if entry != (".json", "not used with Libri-Light")})


def _root(corpus: Path, parts: Sequence[str], name: str) -> Path:
    """The folder that has the parts of a corpus: `corpus`, or `name` in it."""
    corpus = existing_folder(corpus)
    if not any((corpus / part).is_dir() for part in parts) and (corpus / name).is_dir():
        return corpus / name
    return corpus


def _chosen(
    corpus: Path, known: Sequence[str] | Mapping[str, Any], wanted: Sequence[str], *, found: Sequence[str] | None = None
) -> list[str]:
    """The wanted parts of a corpus, by default all that are there. Raises UserError if one is unknown or missing."""
    there = [part for part in known if (corpus / part).is_dir()] if found is None else found
    looked_for = known and f"looked for {', '.join(known)}"
    for part in wanted if known else ():
        if part not in known:
            raise UserError(_unknown_part(part, known))
        if part not in there:
            existing_folder(corpus / part)
    if not known or not (wanted or there):
        raise UserError(f"{corpus}: contains no part of the corpus{f' ({looked_for})' if looked_for else ''}")
    return list(dict.fromkeys(wanted or there))


def _unknown_part(part: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    return f"--part {part}: not a part of the corpus; choose from {', '.join(known)}"


def _prepare(
    recipe: ModuleType,
    corpus: Path,
    output: Path,
    parts: Sequence[str],
    read: Callable[[str], Sets],
    options: Options,
) -> Report:
    """Prepare parts of a corpus, which a recipe of Lhotse reads."""
    listing = Listing(corpus)
    for part in parts:
        known = len(listing.unusable)
        with _audio_unopened(recipe, listing):
            try:
                found = read(part)
            except ImportError as error:
                raise UserError(" ".join(str(error).split())) from None
            except Exception as error:  # Lhotse raises many types of errors
                reasons = [one.reason for one in listing.unusable[known:]]
                reasons += [f"an entry has no {error}" if isinstance(error, KeyError) else str(error)]
                why = " ".join(reasons[0].split())[:200]
                raise UserError(f"{corpus}: no usable utterance with a transcript in {part}: {why}") from None
        recordings = {recording.id: recording for recording in found["recordings"]}
        for one in found["supervisions"]:
            recording = recordings[one.recording_id]
            whole = one.start == 0.0 and recording.duration == UNREAD
            text = Text(one.text, one.speaker, one.language)
            times = (0.0, None) if whole else (one.start, one.duration)
            file = str(Path(recording.sources[0].source).absolute())
            listing.add(file, Utterance(part, one.id, text, *times), recording=recording.id)
    return prepare_listing(listing, output, parts, options)


def _map(function: Callable[..., Any], *items: Iterable[Any], num_jobs: int = 1) -> Iterator[Any]:
    """Lhotse's `parallel_map` without its threads, which print their errors and do not pass them on."""
    return map(function, *items)


class _Unopened(backend.LibsndfileBackend):
    """Takes every file for mono audio of `UNREAD` seconds."""

    def info(self, path_or_fd: Any, **settings: object) -> Any:
        return backend.LibsndfileCompatibleAudioInfo(1, round(UNREAD * RATE), RATE, UNREAD)


@contextmanager
def _audio_unopened(recipe: ModuleType, listing: Listing) -> Iterator[None]:
    """Run a recipe of Lhotse without opening audio or printing, and add its warnings to the listing."""
    previous, logger = backend.CURRENT_AUDIO_BACKEND, logging.getLogger()
    warnings = _Warnings(listing)
    backend.set_current_audio_backend(_Unopened())
    handlers, logger.handlers = logger.handlers, [warnings]
    try:
        with _replaced(recipe, "tqdm", lambda items, **settings: items):
            yield
    finally:
        logger.handlers = handlers
        backend.CURRENT_AUDIO_BACKEND = previous


class _Warnings(logging.Handler):
    def __init__(self, listing: Listing) -> None:
        super().__init__(logging.WARNING)
        self.listing = listing

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("No such file: "):
            path = message.removeprefix("No such file: ")
            self.listing.unusable.append(Unusable(path, "missing", "no such file, but it has a transcript"))
        elif message.startswith("No transcript: "):
            self.listing.notes[WITHOUT_TRANSCRIPT] += 1
        elif not message.endswith("has no transcript."):
            self.listing.notes[f"warning of Lhotse: {' '.join(message.split())}"] += 1


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module for some time."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
