"""Transcribe audio of any length with a fine-tuned model, with the times of words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import ALONE, Ranks
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.pretrained import BATCH_SECONDS, Audio, ChunkFeatures, Pretrained
from w2vscale.inference.utterances import Utterance, map_utterances
from w2vscale.inference.words import Word
from w2vscale.models.lengths import hop


@dataclass(frozen=True)
class TimedWord:
    """A word and its time in the recording, in seconds."""

    text: str
    start: float
    duration: float
    score: float  # confidence from 0 to 1: the geometric mean of the probabilities of its symbols in their frames


@dataclass(frozen=True)
class Transcript:
    """The transcript of an utterance."""

    utterance: str
    file: str
    recording: str
    channel: int  # of the recording, from 0
    start: float  # of the utterance in the recording, in seconds
    duration: float
    text: str
    words: tuple[TimedWord, ...]


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

    Yields a transcript for each utterance, or the record of unusable audio. A word begins with the first frame that
    emits one of its symbols, and ends with the last one. Audio above `CHUNK_SECONDS` is computed in chunks with
    context. `log` receives warnings; for `ranks` and `progress` see `map_utterances`.
    Raises UserError if the model has no output layer, or a lexicon or language model is unusable.
    """
    objective = pretrained.objective
    objective.check_outputs_text()
    decoder = build_decoder(objective.vocabulary, search, log, spaced=objective.spaced)

    def decode(utterance: Utterance, audio: Audio, chunks: Iterator[ChunkFeatures]) -> Transcript:
        hidden = (chunk.hidden[0].to(pretrained.device) for chunk in chunks)
        scores = torch.cat([decoder.reduce(objective.logits(pretrained.model, hidden_TD)) for hidden_TD in hidden])
        words = decoder.words(scores)
        return Transcript(
            utterance.name,
            utterance.file,
            utterance.recording or utterance.name,
            utterance.channel,
            utterance.start,
            audio.seconds,
            " ".join(word.text for word in words),
            tuple(timed(word, utterance.start, audio.seconds) for word in words),
        )

    model = pretrained.config.model
    frame_seconds = hop(model) / model.sampling_rate

    def timed(word: Word, offset: float, duration: float) -> TimedWord:
        start, end = (min(frame * frame_seconds, duration) for frame in (word.first, word.end))
        return TimedWord(word.text, offset + start, end - start, word.score)

    last = [pretrained.config.model.layers]
    yield from map_utterances(
        decode, pretrained, utterances, layers=last, ranks=ranks, batch_seconds=batch_seconds, progress=progress
    )
