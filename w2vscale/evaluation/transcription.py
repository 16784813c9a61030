"""What a fine-tuned model writes: greedy transcripts of audio of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import SPACE
from w2vscale.errors import UserError
from w2vscale.evaluation.pretrained import BATCH_SECONDS, CHUNK_SECONDS, OVERLAP_SECONDS, Pretrained
from w2vscale.evaluation.sources import open_by_duration, sources_of
from w2vscale.models.ctc import BLANK, Wav2Vec2ForCTC

MARKS = {"<s>", "</s>", "<pad>"}


@dataclass(frozen=True)
class Transcript:
    """What is said in an utterance."""

    utterance: str
    file: str
    text: str


def text_of(labels: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Labels as text: spaces for `|`, without sentence marks."""
    symbols = [vocabulary[label] for label in labels]
    return "".join(" " if symbol == SPACE else symbol for symbol in symbols if symbol not in MARKS).strip()


def transcribe(
    pretrained: Pretrained,
    audio: Sequence[Path],
    *,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Transcript | BadAudio]:
    """Greedy transcripts of files, folders and Lhotse cut manifests, shortest first, and what could not be used.

    Audio above `CHUNK_SECONDS` is computed in chunks with context on either side, as in `Pretrained.features`.

    Raises:
        UserError: the model writes nothing; a folder without audio, or a bad manifest.
    """
    model, vocabulary = pretrained.model, pretrained.config.ctc.vocabulary
    if not isinstance(model, Wav2Vec2ForCTC):
        raise UserError("the checkpoint is only pretrained and has no output layer: w2vscale finetune gives it one")
    opened, bad = open_by_duration([source for path in audio for source in sources_of(path)])
    yield from bad
    stream = pretrained.stream(
        [one for _, one in opened],
        layers=[pretrained.config.model.layers],
        chunk_seconds=CHUNK_SECONDS,
        overlap_seconds=OVERLAP_SECONDS,
        batch_seconds=batch_seconds,
    )
    best: list[Tensor] = []
    for number, piece in stream:
        source, one = opened[number]
        if isinstance(piece, AudioError):
            best.clear()
            yield BadAudio(source.name, source.file, piece.kind, str(piece))
        else:
            best.append(_best_symbols(model, piece.hidden[0]))
            if sum(map(len, best)) == pretrained.frames(one):
                path = torch.unique_consecutive(torch.cat(best)).tolist()
                best.clear()
                labels = [symbol for symbol in path if symbol != BLANK]
                yield Transcript(source.name, source.file, text_of(labels, vocabulary))
        if progress is not None:
            progress(number + 1, len(opened))


@torch.no_grad()
def _best_symbols(model: Wav2Vec2ForCTC, hidden_TD: Tensor) -> Tensor:
    """The most probable symbol of each frame, from the last block's output."""
    x_TD = hidden_TD.to(model.head.weight.device)
    norm = model.encoder.transformer.final_norm
    logits_TV: Tensor = model.head(x_TD if norm is None else norm(x_TD))
    return logits_TV.argmax(dim=1).cpu()
