"""Transcribe audio of any length with a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import ALONE, Ranks
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.pretrained import BATCH_SECONDS, Audio, ChunkFeatures, Pretrained
from w2vscale.inference.utterances import Utterance, map_utterances


@dataclass(frozen=True)
class Transcript:
    """The transcript of an utterance."""

    utterance: str
    file: str
    text: str


@torch.no_grad()
def transcribe(
    pretrained: Pretrained,
    utterances: Sequence[Utterance],
    *,
    search: BeamSearch | None = None,
    ranks: Ranks = ALONE,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[Transcript | BadAudio]:
    """Transcribe utterances, shortest first, with greedy decoding or a beam search.

    Yields a transcript for each utterance, or the record of unusable audio. Audio above `CHUNK_SECONDS` is computed in
    chunks with context. `log` receives warnings; for `ranks` and `progress` see `map_utterances`.
    Raises UserError if the model has no output layer, or a lexicon or language model is unusable.
    """
    objective = pretrained.objective
    objective.check_outputs_text()
    decoder = build_decoder(objective.vocabulary, search, log, spaced=objective.spaced)

    def decode(utterance: Utterance, audio: Audio, chunks: Iterator[ChunkFeatures]) -> Transcript:
        hidden = (chunk.hidden[0].to(pretrained.device) for chunk in chunks)
        scores = torch.cat([decoder.reduce(objective.logits(pretrained.model, hidden_TD)) for hidden_TD in hidden])
        return Transcript(utterance.name, utterance.file, decoder.text(scores))

    last = [pretrained.config.model.layers]
    yield from map_utterances(
        decode, pretrained, utterances, layers=last, ranks=ranks, batch_seconds=batch_seconds, progress=progress
    )
