"""Transcribe audio of any length with a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import ALONE, Ranks
from w2vscale.errors import UserError
from w2vscale.inference.chunks import by_audio
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.pretrained import BATCH_SECONDS, Pretrained
from w2vscale.inference.utterances import Utterance, open_by_duration


@dataclass(frozen=True)
class Transcript:
    """The transcript of an utterance."""

    utterance: str
    file: str
    text: str


def transcribe(
    pretrained: Pretrained,
    utterances: Sequence[Utterance],
    *,
    search: BeamSearch | None = None,
    ranks: Ranks = ALONE,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[Transcript | BadAudio]:
    """Transcribe utterances, shortest first.

    Args:
        pretrained: a fine-tuned model.
        utterances: what to transcribe. Audio above `CHUNK_SECONDS` is computed in chunks with context.
        search: settings of a beam search; greedy decoding by default.
        ranks: with several ranks, each transcribes every n-th utterance by duration.
        batch_seconds: padded audio per forward pass.
        progress: called with (utterances done, utterances in total) of this rank.
        log: receives warnings.

    Yields:
        A transcript for each utterance, or the record of unusable audio.

    Raises:
        UserError: the model has no output layer, or a lexicon or language model is unusable.
    """
    objective = pretrained.objective
    if not objective.vocabulary:
        raise UserError(
            "the checkpoint is only pretrained, without an output layer; fine-tune it with w2vscale finetune"
        )
    decoder = build_decoder(objective.vocabulary, search, log)
    opened, bad = open_by_duration(utterances)
    if ranks.is_main:
        yield from bad
    opened = opened[ranks.rank :: ranks.world_size]
    stream = pretrained.stream(
        [audio for _, audio in opened], layers=[pretrained.config.model.layers], batch_seconds=batch_seconds
    )
    for number, chunks in by_audio(stream):
        utterance, _ = opened[number]
        found: Transcript | BadAudio
        try:
            scores = torch.cat([decoder.reduce(_logits(pretrained, chunk.hidden[0])) for chunk in chunks])
            found = Transcript(utterance.name, utterance.file, decoder.text(scores))
        except AudioError as error:
            found = utterance.bad(error)
        yield found
        if progress is not None:
            progress(number + 1, len(opened))


@torch.no_grad()
def _logits(pretrained: Pretrained, hidden_TD: Tensor) -> Tensor:
    """Compute logits [T, V] from the output of the last block."""
    device = pretrained.model.encoder.mask_embedding.device
    return pretrained.objective.logits(pretrained.model, hidden_TD.to(device))
