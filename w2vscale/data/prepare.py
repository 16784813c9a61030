"""From corpora on disk to Lhotse cut manifests: LibriSpeech's layout by Lhotse's recipes, or any folder of audio."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.cut import Cut

from w2vscale.data.validate import libsndfile_reason
from w2vscale.errors import UserError

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}


@dataclass(frozen=True)
class PreparedManifest:
    """A manifest that was written."""

    path: Path
    utterances: int
    hours: float
    left_out: int = 0


def prepare_librispeech(
    corpus: Path, output: Path, *, parts: list[str] | None = None, mini: bool = False, jobs: int = 1
) -> list[PreparedManifest]:
    """Write `cuts_PART.jsonl` for each part of LibriSpeech or mini LibriSpeech found in `corpus`.

    Raises:
        UserError: the folder or a part is missing, a part holds no utterance, or the output cannot be written.
    """
    # Imported here: the recipes module pulls in every corpus that Lhotse knows.
    from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, prepare_librispeech

    known = MINI_LIBRISPEECH if mini else (*LIBRISPEECH, *MINI_LIBRISPEECH)
    corpus = _existing_folder(corpus)
    if not any((corpus / part).is_dir() for part in known) and (corpus / "LibriSpeech").is_dir():
        corpus = corpus / "LibriSpeech"
    wanted = parts or [part for part in known if (corpus / part).is_dir()]
    for part in wanted:
        if part not in known:
            raise UserError(f"--part {part}: not a part of the corpus (parts: {', '.join(known)})")
        if not (corpus / part).is_dir():
            raise UserError(f"{corpus / part}: no such folder")
    if not wanted:
        raise UserError(f"{corpus}: no part of the corpus in it (looked for {', '.join(known)})")
    written = []
    for part in wanted:
        logging.getLogger().setLevel(logging.WARNING)
        try:
            sets = prepare_librispeech(corpus, dataset_parts=[part], num_jobs=jobs)[part]
        except Exception as error:
            unreadable = _first_unreadable(_audio_files(corpus / part))
            reason = f"no utterance with a transcript could be taken: {libsndfile_reason(error)}"
            raise UserError(unreadable or f"{corpus / part}: {reason}") from None
        recordings, supervisions = sets["recordings"], sets["supervisions"]
        assert isinstance(recordings, RecordingSet) and isinstance(supervisions, SupervisionSet)
        if len(recordings) == 0:
            raise UserError(f"{corpus / part}: no utterance with a transcript in it")
        # A recording is one utterance, and its id is the corpus' own; Lhotse would append a number.
        cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
        named = [cut.with_id(cut.recording.id) for cut in cuts]
        written.append(write_cuts(sorted(named, key=lambda cut: cut.id), output / f"cuts_{part}.jsonl"))
    return written


def prepare_folder(
    audio: Path,
    output: Path,
    *,
    jobs: int = 1,
    window_seconds: float | None = None,
    validation_share: float = 0.0,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[PreparedManifest]:
    """Write `cuts_train.jsonl` (and `cuts_validation.jsonl`) for every audio file below a folder.

    The file's folder is taken as the speaker; a .txt of the same name beside it is the transcript. Recordings
    longer than `window_seconds` are cut into windows. `validation_share` of the recordings, chosen by a hash of
    their names, go into the validation manifest.

    Raises:
        UserError: no audio, a file that is no audio (unless `skip_unreadable`), two files with one id, or the
            output cannot be written.
    """
    audio = _existing_folder(audio)
    if not 0.0 <= validation_share < 1.0:
        raise UserError(f"--validation-share {validation_share}: must be at least 0 and below 1")
    if window_seconds is not None and not window_seconds > 0:
        raise UserError(f"--window {window_seconds}: must be above 0 seconds")
    files = _audio_files(audio)
    if not files:
        raise UserError(f"{audio}: no audio in it (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
    _refuse_duplicates(files, audio)
    cuts: list[Cut] = []
    unreadable: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        for done, found in enumerate(pool.map(lambda file: _cut_of(file, audio), files), start=1):
            if isinstance(found, str):
                unreadable.append(found)
            else:
                cuts.append(found)
            if progress is not None:
                progress(done, len(files))
    if unreadable and not (skip_unreadable and cuts):
        more = f" and {len(unreadable) - 1} more of {len(files)} files" if len(unreadable) > 1 else ""
        advice = "no other file is left" if skip_unreadable else "leave such files out with --skip-unreadable"
        raise UserError(f"{unreadable[0]}{more}; {advice}")
    # By a threshold, so that a file added later moves no other; small corpora hold out at least one recording.
    hashes = {cut.id: zlib.crc32(cut.id.encode()) for cut in cuts}
    limit = max(validation_share * 2**32, min(hashes.values()) + 1) if validation_share else 0
    held_out = {identifier for identifier, value in hashes.items() if value < limit}
    sets = {
        "train": [cut for cut in cuts if cut.id not in held_out],
        "validation": [cut for cut in cuts if cut.id in held_out],
    }
    if validation_share and not all(sets.values()):
        raise UserError(f"--validation-share {validation_share}: leaves a set of {len(cuts)} recordings empty")
    return [
        write_cuts(_windows(chosen, window_seconds), output / f"cuts_{name}.jsonl", left_out=len(unreadable))
        for name, chosen in sets.items()
        if chosen
    ]


def write_cuts(cuts: Iterable[Cut], path: Path, *, left_out: int = 0) -> PreparedManifest:
    """Write a JSONL manifest, one cut a line; it appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    count, seconds = 0, 0.0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as lines:
            for cut in cuts:
                lines.write(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")
                count += 1
                seconds += cut.duration
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return PreparedManifest(path, count, seconds / 3600, left_out)


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path.resolve()


def _audio_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())


def _identifier(file: Path, root: Path) -> str:
    return str(file.relative_to(root).with_suffix("")).replace("/", "-")


def _refuse_duplicates(files: list[Path], root: Path) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(_identifier(file, root), file)
        if other is not file:
            raise UserError(f"{file}: would have the same id as {other}: rename one")


def _cut_of(file: Path, root: Path) -> Cut | str:
    """The cut of a whole file, or why there is none."""
    try:
        soundfile.info(file)  # Lhotse's own error would name the last library that it tried
        recording = Recording.from_file(file, recording_id=_identifier(file, root))
        if recording.num_samples <= 0:
            return f"{file}: holds no audio"
    except Exception as error:
        return f"{file}: not readable as audio: {libsndfile_reason(error)}"
    cut = recording.to_cut()
    transcript = file.with_suffix(".txt")
    text = transcript.read_text(encoding="utf-8", errors="replace").strip() if transcript.is_file() else None
    speaker = str(file.parent.relative_to(root))
    cut.supervisions = [
        SupervisionSegment(
            id=recording.id,
            recording_id=recording.id,
            start=0.0,
            duration=recording.duration,
            channel=recording.channel_ids if recording.num_channels > 1 else recording.channel_ids[0],
            text=text,
            speaker=speaker if speaker != "." else None,
        )
    ]
    return cut


def _windows(cuts: list[Cut], seconds: float | None) -> Iterator[Cut]:
    for cut in cuts:
        if seconds is None or cut.duration <= seconds:
            yield cut
        else:
            yield from cut.cut_into_windows(seconds, keep_excessive_supervisions=True)


def _first_unreadable(files: list[Path]) -> str | None:
    for file in files:
        found = _cut_of(file, file.parent)
        if isinstance(found, str):
            return found
    return None
