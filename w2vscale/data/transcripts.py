"""From transcripts to labels: what fine-tuning's micro-batches hold beside audio."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray

from w2vscale.config.tree import Config
from w2vscale.data.audio import AudioError
from w2vscale.data.inputs import CtcInputs
from w2vscale.data.micro_batch import pad_waveforms, shortest_samples
from w2vscale.data.randomness import Stream, generator
from w2vscale.data.sentence_pieces import open_pieces, vocabulary_of
from w2vscale.errors import UserError
from w2vscale.models.lengths import output_frames
from w2vscale.objectives.ctc import BLANK
from w2vscale.objectives.masking import frame_mask, span_mask

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "|"
PIECE_SPACE = "▁"
"""The space in sentence pieces."""
UNKNOWN = "<unk>"


class Transcripts:
    """Spells transcripts by a vocabulary of characters, where `|` is the space, or cuts them into sentence pieces.

    Where the vocabulary has letters of one case only, transcripts are brought to it. The labels of pieces need their
    SentencePiece model, the case does not.

    Raises:
        UserError: sentencepiece is not installed, or the model cannot be read or is of another vocabulary.
    """

    def __init__(self, vocabulary: Sequence[str], sentencepiece: Path | None = None) -> None:
        self._pieces = None
        if sentencepiece is not None:
            self._pieces = open_pieces(sentencepiece)
            if (wanted := vocabulary_of(self._pieces)) != list(vocabulary):
                raise UserError(
                    f"ctc.sentencepiece={sentencepiece}: its {len(wanted) - 1} pieces after a blank are not the "
                    f"{len(vocabulary)} symbols of ctc.vocabulary; a new run takes them with ctc.vocabulary=[]"
                )
        # The blank is no label, even where a transcript has a character that is called like it.
        self._numbers = {symbol: number for number, symbol in enumerate(vocabulary) if number != BLANK}
        # Longer symbols without a space are marks such as <unk>, or pieces whose letters others have, too.
        letters = "".join(symbol for symbol in vocabulary if len(symbol) == 1 or PIECE_SPACE in symbol)
        self._upper, self._lower = letters == letters.upper(), letters == letters.lower()

    def normalised(self, text: str) -> str:
        """A text in the vocabulary's case, with single spaces."""
        text = " ".join(text.split())
        return text.upper() if self._upper else text.lower() if self._lower else text

    def labels(self, text: str) -> tuple[list[int], str]:
        """The labels of a text, and its characters that are outside the vocabulary and became `<unk>`.

        Neighbouring characters that no sentence piece has are one `<unk>`.

        Raises:
            AudioError: there is no text, or such a character and no `<unk>`.
        """
        text = self.normalised(text)
        if not text:
            raise AudioError("no transcript", "has no transcript")
        if self._pieces is not None:
            return _piece_labels(text, self._pieces)
        spelled = text.replace(" ", SPACE)
        unknown = "".join(sorted({character for character in spelled if character not in self._numbers}))
        if unknown and UNKNOWN not in self._numbers:
            raise AudioError("unknown symbols", f"its transcript has {unknown!r}, which is not in ctc.vocabulary")
        return [self._numbers.get(character, self._numbers.get(UNKNOWN, BLANK)) for character in spelled], unknown


def _piece_labels(text: str, pieces: SentencePieceProcessor) -> tuple[list[int], str]:
    numbers = pieces.encode(text)
    unknown = {
        character
        for number, piece in zip(numbers, pieces.encode(text, out_type=str), strict=True)
        if number == pieces.unk_id()
        for character in piece
    }
    return [BLANK + 1 + number for number in numbers], "".join(sorted(unknown))


def transcript(cut: Cut) -> str:
    """What is said in an utterance."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)


def refuse_too_many(labels: Sequence[int], frames: int) -> None:
    """Raise AudioError where an utterance has too few frames for its labels and the blanks between equal ones."""
    needed = len(labels) + sum(one == other for one, other in pairwise(labels))
    if needed > frames:
        raise AudioError("too short", f"its {frames} frames are too few for the {len(labels)} labels of its transcript")


def make_ctc_inputs(
    waveforms: Sequence[NDArray[np.float32]],
    labels: Sequence[Sequence[int]],
    places: Sequence[int],
    *,
    number: int,
    seed: int,
    config: Config,
    width: int = 0,
) -> CtcInputs:
    """Pad utterances to the longest, and no less than `width` samples; draw the masks of their frames and channels.

    An utterance's draws depend on (seed, number, place) alone. Without any utterance the result is one of silence
    without labels: it can be computed, and weighs nothing.
    """
    if not waveforms:
        waveforms, labels, places = [np.zeros(shortest_samples(config.model), dtype=np.float32)], [[]], [0]
    padded, lengths = pad_waveforms(waveforms, width)
    frames = np.array([output_frames(int(length), config.model) for length in lengths])
    masks = np.zeros((len(waveforms), output_frames(padded.shape[1], config.model)), dtype=np.bool_)
    channel_masks = np.zeros((len(waveforms), config.model.dim), dtype=np.bool_)
    for row, place in enumerate(places):
        draws = generator(seed, Stream.MASK, number, place)
        masks[row, : frames[row]] = frame_mask(int(frames[row]), config.model, draws)
        if config.ctc.channel_mask_probability > 0.0:
            channel_masks[row] = span_mask(
                config.model.dim,
                probability=config.ctc.channel_mask_probability,
                length=config.ctc.channel_mask_length,
                min_spans=0,
                generator=draws,
            )
    counts = [len(each) for each in labels]
    return CtcInputs(
        waveforms_BS=padded,
        lengths_B=torch.from_numpy(lengths),
        frames_B=torch.from_numpy(frames),
        mask_BT=torch.from_numpy(masks),
        channel_mask_BD=torch.from_numpy(channel_masks),
        labels_L=torch.tensor([label for each in labels for label in each], dtype=torch.long),
        label_lengths_B=torch.tensor(counts),
        utterances=(len(waveforms),),
        labels=(sum(counts),),
        padded=bool((lengths != padded.shape[1]).any()),
    )
