"""Prepare manifests of LibriSpeech and mini LibriSpeech with Lhotse."""

from __future__ import annotations

from pathlib import Path

from lhotse import CutSet

from w2vscale.corpora.finding import find_audio
from w2vscale.corpora.manifests import PreparedManifest, existing_folder, write_cuts
from w2vscale.data.audio import own_decoders
from w2vscale.data.decoding import AudioError, read_header, reason_of
from w2vscale.errors import UserError


def prepare_librispeech(
    corpus: Path, output: Path, *, parts: list[str] | None = None, mini: bool = False, jobs: int = 1
) -> list[PreparedManifest]:
    """Write `cuts_PART.jsonl` for each part of LibriSpeech or mini LibriSpeech found in `corpus`.

    Raises UserError if the folder or a part is missing, a part has no utterances, or the output cannot be written.
    """
    # Imported here: the module imports the recipes of all corpora that Lhotse supports.
    from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, prepare_librispeech

    known = MINI_LIBRISPEECH if mini else (*LIBRISPEECH, *MINI_LIBRISPEECH)
    corpus = existing_folder(corpus)
    if not any((corpus / part).is_dir() for part in known) and (corpus / "LibriSpeech").is_dir():
        corpus = corpus / "LibriSpeech"
    wanted = parts or [part for part in known if (corpus / part).is_dir()]
    if not wanted:
        raise UserError(f"{corpus}: contains no part of the corpus (looked for {', '.join(known)})")
    for part in wanted:
        if part not in known:
            raise UserError(f"--part {part}: not a part of the corpus; choose from {', '.join(known)}")
        existing_folder(corpus / part)
    written = []
    for part in wanted:
        try:
            with own_decoders():
                sets = prepare_librispeech(corpus, dataset_parts=[part], num_jobs=jobs)[part]
        except Exception as error:
            reason = f"{corpus / part}: no usable utterance with a transcript: {reason_of(error)}"
            raise UserError(_first_unreadable(corpus / part) or reason) from None
        if len(sets["recordings"]) == 0:
            raise UserError(f"{corpus / part}: no utterance with a transcript")
        # One recording is one utterance. Its own id is kept; Lhotse would append a number to it.
        named = [cut.with_id(cut.recording.id) for cut in CutSet.from_manifests(**sets)]
        written.append(write_cuts(sorted(named, key=lambda cut: cut.id), output / f"cuts_{part}.jsonl"))
    return written


def _first_unreadable(folder: Path) -> str | None:
    """The first audio file below a folder that cannot be read, with the reason."""
    for file in find_audio(folder).audio:
        try:
            read_header(folder / file.path)
        except AudioError as error:
            return f"{folder / file.path}: {error}"
    return None
