"""Train the SentencePiece model for `objective.sentencepiece` from transcripts."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from w2vscale.corpora.index import build_index
from w2vscale.data.manifest import Manifest
from w2vscale.data.sentence_pieces import sentencepiece
from w2vscale.data.transcripts import transcript
from w2vscale.errors import UserError
from w2vscale.files import new_file


def train_pieces(manifests: Sequence[Path], output: Path, *, size: int) -> int:
    """Train a unigram model (Kudo 2018, arXiv:1804.10959) of `size` pieces that covers all characters.

    Returns the number of transcripts. They are in the Unicode form NFC, and white space becomes single spaces. The
    same transcripts always give the same file.

    Raises UserError if `output` exists or cannot be written, a manifest cannot be used, there are no transcripts,
    `size` is too large or too small for them, or sentencepiece is not installed.
    """
    if output.exists():
        raise UserError(f"{output}: exists; choose another name")
    library = sentencepiece()
    texts = [text for manifest in manifests for text in _transcripts(manifest)]
    if not texts:
        raise UserError(f"{', '.join(map(str, manifests))}: no transcripts")
    model = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            normalization_rule_name="identity",
            character_coverage=1.0,
            max_sentence_length=max(len(text.encode()) for text in texts),  # the trainer skips longer ones
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--size {size}: {_reason(str(error))}") from None
    with new_file(output, "wb") as file:
        file.write(model.getvalue())
    return len(texts)


def _transcripts(path: Path) -> Iterator[str]:
    build_index(path)
    manifest = Manifest(path)
    for cut in map(manifest.cut, range(len(manifest))):
        if text := " ".join(unicodedata.normalize("NFC", transcript(cut)).split()):
            yield text


def _reason(error: str) -> str:
    """The error message of the trainer in plain words."""
    if found := re.search(r"too high .* <= (\d+)", error):
        return f"the transcripts allow at most {found[1]} pieces"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"too small for the characters of the transcripts; choose at least {found[1]}"
    return f"sentencepiece failed: {' '.join(error.split())}"
