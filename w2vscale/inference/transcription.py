"""What a fine-tuned model writes: transcripts of audio of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import ALONE, Ranks
from w2vscale.errors import UserError
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.pretrained import BATCH_SECONDS, CHUNK_SECONDS, OVERLAP_SECONDS, Pretrained
from w2vscale.inference.sources import Source, open_by_duration
from w2vscale.objectives.ctc import Wav2Vec2ForCTC


@dataclass(frozen=True)
class Transcript:
    """What is said in an utterance."""

    utterance: str
    file: str
    text: str


def transcribe(
    pretrained: Pretrained,
    sources: Sequence[Source],
    *,
    search: BeamSearch | None = None,
    ranks: Ranks = ALONE,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[Transcript | BadAudio]:
    """Transcripts of utterances, shortest first, and what could not be used.

    Greedy, or by the beam `search`. Audio above `CHUNK_SECONDS` is computed in chunks with context on either side, as
    in `Pretrained.features`. Of several `ranks` each takes every n-th utterance by duration.

    Raises:
        UserError: the model writes nothing; a lexicon or language model cannot be used.
    """
    model = pretrained.model
    if not isinstance(model, Wav2Vec2ForCTC):
        raise UserError("the checkpoint is only pretrained and has no output layer: w2vscale finetune gives it one")
    decoder = build_decoder(pretrained.config.ctc.vocabulary, search, log)
    opened, bad = open_by_duration(sources)
    if ranks.is_main:
        yield from bad
    opened = opened[ranks.rank :: ranks.world_size]
    stream = pretrained.stream(
        [one for _, one in opened],
        layers=[pretrained.config.model.layers],
        chunk_seconds=CHUNK_SECONDS,
        overlap_seconds=OVERLAP_SECONDS,
        batch_seconds=batch_seconds,
    )
    kept: list[Tensor] = []
    for number, piece in stream:
        source, one = opened[number]
        if isinstance(piece, AudioError):
            kept.clear()
            yield BadAudio(source.name, source.file, piece.kind, str(piece))
        else:
            kept.append(decoder.reduce(_logits(model, piece.hidden[0])))
            if sum(map(len, kept)) == pretrained.frames(one):
                whole = torch.cat(kept)
                kept.clear()
                yield Transcript(source.name, source.file, decoder.text(whole))
        if progress is not None:
            progress(number + 1, len(opened))


@torch.no_grad()
def _logits(model: Wav2Vec2ForCTC, hidden_TD: Tensor) -> Tensor:
    """Logits [T, V] from the last block's output."""
    x_TD = hidden_TD.to(model.head.weight.device)
    norm = model.encoder.transformer.final_norm
    logits_TV: Tensor = model.head(x_TD if norm is None else norm(x_TD))
    return logits_TV
