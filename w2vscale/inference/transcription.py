"""Transcribe audio of any length with a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

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
    chunks with context. With several ranks, each transcribes every n-th utterance by duration; `progress` is called
    with (utterances done, utterances in total) of this rank. `log` receives warnings.

    Raises:
        UserError: the model has no output layer, or a lexicon or language model is unusable.
    """
    objective, model = pretrained.objective, pretrained.model
    if not objective.vocabulary:
        raise UserError(
            "the checkpoint is only pretrained, without an output layer; fine-tune it with w2vscale finetune"
        )
    decoder = build_decoder(objective.vocabulary, search, log)
    opened, bad = open_by_duration(utterances)
    if ranks.is_main:
        yield from bad
    opened = opened[ranks.rank :: ranks.world_size]
    last_layer = [pretrained.config.model.layers]
    stream = pretrained.stream([audio for _, audio in opened], layers=last_layer, batch_seconds=batch_seconds)
    for number, chunks in by_audio(stream):
        utterance, _ = opened[number]
        try:
            hidden = (chunk.hidden[0].to(pretrained.device) for chunk in chunks)
            scores = torch.cat([decoder.reduce(objective.logits(model, hidden_TD)) for hidden_TD in hidden])
            yield Transcript(utterance.name, utterance.file, decoder.text(scores))
        except AudioError as error:
            yield utterance.bad(error)
        progress(number + 1, len(opened))
