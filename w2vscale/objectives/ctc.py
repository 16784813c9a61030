"""Fine-tuning for speech recognition with connectionist temporal classification (CTC, Graves et al. 2006)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import Config, HealthConfig, ModelConfig, RegularizationConfig
from w2vscale.data.inputs import AudioBatch, Utterance
from w2vscale.data.label_counts import count_labels
from w2vscale.data.randomness import Generators
from w2vscale.data.sentence_pieces import BLANK_SYMBOL
from w2vscale.data.transcripts import Transcripts, labels_to_text, refuse_overhang, refuse_too_many, transcript
from w2vscale.data.vocabulary import (
    BLANK,
    PIECE_SPACE,
    SPACE,
    is_control,
    read_vocabulary,
    unknown_symbol,
)
from w2vscale.errors import UserError
from w2vscale.kernels.packing import Lengths
from w2vscale.models.initialisation import empty_parameters
from w2vscale.models.layers import Linear, dropout
from w2vscale.models.lengths import output_frames
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder, normal_as_in_bert, valid_mask
from w2vscale.objectives.base import Finding, Objective, Panel, StepContext, Target, TransformersHead
from w2vscale.objectives.details import Details, Sample, attention_of_first, on_host, waveform
from w2vscale.objectives.masking import Spans, draw_masks, masked_batch
from w2vscale.objectives.settings import CtcSettings
from w2vscale.optim.adamw import parameter_groups

if TYPE_CHECKING:
    from lhotse.cut import Cut

LETTER_TOKENIZER = {
    "tokenizer_class": "Wav2Vec2CTCTokenizer", "replace_word_delimiter_char": " ", "do_lower_case": False,
}  # fmt: skip
PHONE_TOKENIZER = {
    "tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer", "do_phonemize": False, "phone_delimiter_token": " ",
    "word_delimiter_token": None,
}  # fmt: skip
"""Settings of the tokenizers of Transformers."""

ONLY_BLANKS = 0.999
"""A model whose best symbol is the blank in more than this fraction of frames outputs nothing."""


class CtcInputs(NamedTuple):
    """B utterances with L labels in total, listed utterance by utterance."""

    audio: AudioBatch
    channel_mask_BD: Tensor
    labels_L: Tensor
    label_lengths_B: Tensor
    labels: tuple[int, ...]  # label_lengths_B as Python numbers, so that reading them does not synchronise the GPU

    @property
    def weights(self) -> tuple[int, ...]:
        """Number of labels of each micro-batch."""
        return self.audio.per_micro_batch(self.labels)


class CtcSums(NamedTuple):
    """Sums over labels. Divide them by the number of labels of the update, over all ranks."""

    total: Tensor  # in nats
    labels: Tensor  # number of labels
    frames: Tensor  # number of frames, in utterances with labels
    blanks: Tensor  # those whose most probable symbol is the blank
    # Training does not decode, so the rest is 0 in training.
    errors: Tensor  # edit distance between greedy and reference labels
    words: Tensor  # words of the references
    word_errors: Tensor  # edit distance between greedy and reference words


class Wav2Vec2ForCTC(nn.Module):
    """The encoder with a linear output layer over the vocabulary."""

    def __init__(
        self,
        model: ModelConfig,
        regularization: RegularizationConfig,
        settings: CtcSettings,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.final_dropout = settings.final_dropout
        self.compute_dtype = compute_dtype
        self.encoder = Wav2Vec2Encoder(model, regularization)
        self.vocabulary = read_vocabulary(settings.vocabulary)
        self.spaced = settings.split == "spaces"
        init: Any = nn.init.xavier_uniform_ if settings.head_init == "xavier" else normal_as_in_bert
        self.head = Linear(model.dim, len(self.vocabulary), init=init)

    def forward(
        self,
        inputs: CtcInputs,
        *,
        active: Sequence[bool] | None = None,
        frozen: bool = False,
        detailed: bool = False,
    ) -> CtcSums | Tensor:
        """Compute the loss sums or, if `detailed`, the most probable symbol of each frame, [B, T].

        With `frozen`, only the head gets gradients. In evaluation nothing is masked.

        Errors are counted in evaluation only. `active` says which transformer blocks to compute.
        """
        audio = inputs.audio
        masks = (audio.mask_BT, inputs.channel_mask_BD) if self.training else (None, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            encoded = self.encoder(audio.waveforms_BS.to(self.compute_dtype), audio.lengths, *masks, active=active)
        logits_BTV = self.head(dropout(encoded.context_BTD, self.final_dropout, self.training))
        if detailed:
            return logits_BTV.argmax(dim=2)
        total = ctc_loss(logits_BTV, audio.frames_B, inputs.labels_L, inputs.label_lengths_B)
        counts = (0, 0, 0)
        if not self.training:
            counts = count_errors(logits_BTV, inputs, self.vocabulary, spaced=self.spaced)
        errors, words, word_errors = (torch.full_like(total.detach(), count) for count in counts)
        labels = torch.full_like(total.detach(), sum(inputs.labels))
        frames = torch.full_like(total.detach(), sum(compress(audio.frames, inputs.labels)))
        blanks = count_blanks(logits_BTV.detach(), inputs).to(frames.dtype)
        return CtcSums(total, labels, frames, blanks, errors, words, word_errors)

    def logits(self, waveforms_BS: Tensor, lengths: Lengths | None = None) -> Tensor:
        """Compute logits [B, T, V]. `lengths` is None if no utterance is padded."""
        encoded = self.encoder(waveforms_BS.to(self.compute_dtype), lengths)
        logits_BTV: Tensor = self.head(encoded.context_BTD)
        return logits_BTV


class Ctc(Objective):
    """The objective of fine-tuning for speech recognition with CTC."""

    Settings = CtcSettings
    settings: CtcSettings
    crops = False  # the transcript is of the whole utterance
    error_metrics = ("loss", "label_error_rate", "wer")
    most_epochs = 100_000  # fairseq fine-tunes for 35,000 on 10 minutes
    updates_at_chance = 1000

    def __init__(self, settings: CtcSettings, *others: Any) -> None:
        completed = settings.completed()
        assert isinstance(completed.vocabulary, list)
        self.vocabulary, self.spaced = completed.vocabulary, completed.split == "spaces"
        super().__init__(completed, *others)

    @cached_property
    def transcripts(self) -> Transcripts:
        """Converter from transcripts to labels."""
        return Transcripts(self.vocabulary, self.settings.sentencepiece, spaced=self.spaced)

    def check(self, config: Config) -> None:
        super().check(config)
        assert self.transcripts  # loads the SentencePiece model, and raises if it does not fit the vocabulary
        frozen_updates = self.settings.freeze_encoder_updates
        if config.trainer.init_from is None and (frozen_updates or config.regularization.feature_grad_mult == 0.0):
            raise UserError(
                "the encoder is frozen but randomly initialised; set trainer.init_from, or train from scratch with "
                "objective.freeze_encoder_updates=0 regularization.feature_grad_mult=1"
            )
        if not frozen_updates:
            return
        with empty_parameters():
            shapes = [(name, parameter.shape) for name, parameter in self.build_model().named_parameters()]
        for group in parameter_groups(shapes, config.optim):
            if group.weight_decay and any(name.startswith("encoder.") for name in group.names):
                raise UserError(
                    f"a weight decay of {group.weight_decay:g} would shrink the encoder while it is frozen "
                    f"(objective.freeze_encoder_updates={frozen_updates}); set optim.weight_decay=0, and none in "
                    "optim.groups for the encoder"
                )

    def unfrozen(self) -> CtcSettings:
        return self.settings.model_copy(update={"freeze_encoder_updates": 0})

    def build_model(self) -> Wav2Vec2ForCTC:
        return Wav2Vec2ForCTC(self.model, self.regularization, self.settings, self.compute_dtype)

    def read_target(self, cut: Cut, *, offset: int, samples: int) -> Target:
        """Return the labels, and a note about symbols that are not in the vocabulary."""
        refuse_overhang(cut)
        labels, unknown = self.transcripts.labels(transcript(cut))
        refuse_too_many(labels, output_frames(samples, self.model))
        if not unknown:
            return Target(labels)
        reason = f"its transcript has {unknown!r}, not in objective.vocabulary; used {self.transcripts.unknown}"
        return Target(labels, ("unknown symbols", reason))

    def largest_target(self, samples: int) -> list[int]:
        """Return a label for each frame, the most that CTC can align: equal ones would need a blank in between."""
        labels = max(len(self.vocabulary) - 1, 1)
        return [1 + place % labels for place in range(output_frames(samples, self.model))]

    def describe_targets(self, cuts: Iterable[Cut]) -> list[str]:
        """Count the labels, those that are unknown, and the utterances without a usable transcript.

        Raises UserError if there are no transcripts, or more is unknown than `objective.max_unknown_fraction`.
        """
        found, limit = count_labels(self.transcripts, cuts), self.settings.max_unknown_fraction
        summary = found.describe(self.transcripts.unknown)
        if not found.transcripts:
            raise UserError(f"no utterance has a transcript that can be used: {summary}")
        if found.unknown_share > limit:
            raise UserError(
                f"more is unknown than objective.max_unknown_fraction={limit:g}: {summary}; make another "
                "objective.vocabulary (w2vscale data vocabulary CUTS -o FILE), correct the transcripts, or raise "
                "the limit"
            )
        return [summary]

    def make_inputs(self, utterances: Sequence[Utterance], *, rng: Generators, width: int = 0) -> CtcInputs:
        settings = self.settings
        # fairseq rounds the number of spans of each utterance by itself where utterances are padded.
        audio, generators = masked_batch(utterances, self.model, settings, rng=rng, width=width, one_rounding=False)
        labels: list[list[int]] = [utterance.target for utterance in utterances] or [[]]
        channel_masks_BD = np.zeros((len(labels), self.model.dim), dtype=np.bool_)
        if settings.channel_mask_probability > 0.0 and generators:
            spans = Spans(settings.channel_mask_probability, settings.channel_mask_length, least=0)
            trimmed = settings.mask_trim == "micro_batch"
            channel_masks_BD[:] = draw_masks([self.model.dim] * len(generators), spans, generators, trimmed=trimmed)
        counts = tuple(map(len, labels))
        return CtcInputs(
            audio=audio,
            channel_mask_BD=torch.from_numpy(channel_masks_BD),
            labels_L=torch.tensor([label for each in labels for label in each], dtype=torch.long),
            label_lengths_B=torch.tensor(counts),
            labels=counts,
        )

    def draws(self, inputs: CtcInputs, step: StepContext) -> dict[str, Any]:
        return {"frozen": step.update < self.settings.freeze_encoder_updates and not step.worst_case}

    def inspect(self, module: nn.Module, inputs: CtcInputs, *, samples: int, blocks: Sequence[int]) -> Details:
        audio = inputs.audio
        with attention_of_first(module, audio, blocks) as attention:
            best_BT: Tensor = module(inputs, detailed=True).cpu()
        references = inputs.labels_L.cpu().split(list(inputs.labels))
        shown = []
        for number in range(min(samples, len(audio.samples))):
            emitted = emissions(best_BT[number, : audio.frames[number]].tolist())
            found, wanted = [symbol for _, symbol in emitted], references[number].tolist()
            shown.append(
                Sample(
                    waveform(audio, number),
                    masked_T=np.zeros(audio.frames[number], dtype=np.bool_),
                    correct_T=np.full(audio.frames[number], np.nan, dtype=np.float32),
                    symbols=tuple((frame, self.vocabulary[symbol]) for frame, symbol in emitted),
                    reference=labels_to_text(wanted, self.vocabulary, spaced=self.spaced),
                    hypothesis=labels_to_text(found, self.vocabulary, spaced=self.spaced),
                )
            )
        return Details(tuple(shown), attention=on_host(attention))

    def metrics(self, sums: CtcSums) -> dict[str, float]:
        """Compute metrics per label; NaN if there is none.

        `loss` is in nats. `label_error_rate` is the error rate of greedy decoding, spaces included; 0 in training.
        `wer` is that of words, in evaluation only; an unknown character of a reference counts as `<unk>`.
        `blank_fraction` is the fraction of frames whose most probable symbol is the blank.
        """
        labels, words = float(sums.labels) or math.nan, float(sums.words)
        return {
            "loss": float(sums.total) / labels,
            "label_error_rate": float(sums.errors) / labels,
            **({"wer": float(sums.word_errors) / words} if words else {}),
            "blank_fraction": float(sums.blanks) / (float(sums.frames) or math.nan),
            "labels": float(sums.labels),
        }

    def scheduled(self, update: int) -> dict[str, float]:
        return {"encoder_frozen": float(update < self.settings.freeze_encoder_updates)}

    def line(self, metrics: Mapping[str, float]) -> str:
        if not metrics["labels"]:
            return "no labels in its utterances"
        fields = [f"loss {metrics['loss']:.3f} nats per label", f"blanks {metrics['blank_fraction']:.1%}"]
        if metrics.get("encoder_frozen"):
            fields.append("encoder frozen")
        if "utterances" in metrics:  # decoded in validation only
            fields.append(f"label errors {metrics['label_error_rate']:.1%}")
        if "wer" in metrics:
            fields.append(f"WER {metrics['wer']:.1%}")
        return "  ".join(fields)

    def table(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {
            "loss per label": f"{metrics['loss']:.4f} nats",
            "label error rate, greedy": f"{metrics['label_error_rate']:.2%}",
            **({"word error rate, greedy": f"{metrics['wer']:.2%}"} if "wer" in metrics else {}),
            "labels": f"{int(metrics['labels']):,}",
        }

    def findings(self, metrics: Mapping[str, float], limits: HealthConfig) -> list[Finding]:
        """A model at chance level outputs only blanks, which is normal as long as its encoder is frozen."""
        blanks = metrics["blank_fraction"]
        if metrics["encoder_frozen"] or not blanks > ONLY_BLANKS:
            return []
        return [
            Finding(
                "chance",
                f"the model outputs only blanks: in {blanks:.2%} of the frames (above {ONLY_BLANKS:.1%}); train longer "
                "(trainer.updates), try another optim.lr, or start from a pretrained model (trainer.init_from)",
            )
        ]

    def phase(self, update: int) -> int:
        """While the encoder is frozen, only the output layer has a gradient."""
        return int(update >= self.settings.freeze_encoder_updates)

    def panels(self) -> tuple[Panel, Panel, Panel]:
        return (
            Panel("loss", "loss per label (nats)", {"loss": ""}),
            Panel(
                "label errors", "label error rate, validation", {"label_error_rate": ""}, training=False, percent=True
            ),
            Panel("WER", "word error rate, validation", {"wer": ""}, training=False, percent=True),
        )

    def logits(self, module: Any, hidden_TD: Tensor) -> Tensor:
        norm = module.encoder.transformer.final_norm
        logits_TV: Tensor = module.head(hidden_TD if norm is None else norm(hidden_TD))
        return logits_TV

    def transformers_head(self) -> TransformersHead:
        """In vocab.json `▁` becomes a space, because the tokenizer of Transformers only concatenates symbols.

        Its tokenizer of phonemes puts a space between them. Neither can split a text into symbols of several characters
        that have no spaces between them: the spaces around these symbols would be lost.
        """
        settings, vocabulary = self.settings, list(self.vocabulary)
        marks = {"pad": vocabulary[BLANK], "bos": "<s>", "eos": "</s>", "unk": unknown_symbol(vocabulary)}
        tokens = {name: symbol if symbol in vocabulary else None for name, symbol in marks.items()}
        return TransformersHead(
            architecture="Wav2Vec2ForCTC",
            summary="A speech recognition model: a wav2vec 2.0 encoder "
            "([Baevski et al. 2020](https://arxiv.org/abs/2006.11477)) with an output layer for text, trained on "
            "transcripts with connectionist temporal classification "
            "([CTC, Graves et al. 2006](https://doi.org/10.1145/1143844.1143891)).",
            tensors={"head": "lm_head"},
            settings={
                "vocab_size": len(vocabulary),
                **{
                    f"{name}_token_id": vocabulary.index(symbol)
                    for name, symbol in tokens.items()
                    if symbol is not None and name != "unk"
                },
                "ctc_loss_reduction": "sum",
                "ctc_zero_infinity": True,
                "final_dropout": settings.final_dropout,
                "mask_time_prob": settings.mask_probability,
                "mask_time_length": settings.mask_length,
                "mask_time_min_masks": settings.mask_min_spans,
                "mask_feature_prob": settings.channel_mask_probability,
                "mask_feature_length": settings.channel_mask_length,
            },
            note=self._tokenizer_note(),
            files={
                "vocab.json": {symbol.replace(PIECE_SPACE, " "): label for label, symbol in enumerate(vocabulary)},
                "tokenizer_config.json": {
                    "processor_class": "Wav2Vec2Processor",
                    **{f"{name}_token": symbol for name, symbol in tokens.items()},
                    **(PHONE_TOKENIZER if self.spaced else LETTER_TOKENIZER),
                    **({} if self.spaced else {"word_delimiter_token": SPACE if SPACE in vocabulary else " "}),
                },
            },
        )

    def _tokenizer_note(self) -> str:
        if self.spaced:
            return ""
        note = "The tokenizer converts labels to text, but not text to labels."
        if any(PIECE_SPACE in symbol for symbol in self.vocabulary):
            shift = " + 1" * (self.vocabulary[BLANK] == BLANK_SYMBOL)
            return f"{note} A label is the id in the SentencePiece model{shift}."
        if any(len(symbol) > 1 and not is_control(symbol) for symbol in self.vocabulary[BLANK + 1 :]):
            return f"{note} In text, it would lose the spaces around symbols of several characters."
        return ""


def ctc_loss(logits_BTV: Tensor, frames_B: Tensor, labels_L: Tensor, label_lengths_B: Tensor) -> Tensor:
    """Return the sum over utterances of -log p(labels), in nats, fp32.

    `labels_L` lists the labels of all utterances one after another. An utterance without labels, or with too few frames
    for its labels and the blanks between equal ones, counts as 0.
    """
    log_probabilities_TBV = logits_BTV.float().log_softmax(dim=2).transpose(0, 1)
    losses_B = F.ctc_loss(
        log_probabilities_TBV, labels_L, frames_B, label_lengths_B, blank=BLANK, reduction="none", zero_infinity=True
    )
    return losses_B.masked_fill(label_lengths_B == 0, 0.0).sum()


def emissions(best: Sequence[int]) -> list[tuple[int, int]]:
    """Merge repetitions in a path of symbols and remove blanks. Returns (first frame, symbol) of what is left."""
    changes = ((frame, symbol) for frame, symbol in enumerate(best) if frame == 0 or symbol != best[frame - 1])
    return [(frame, symbol) for frame, symbol in changes if symbol != BLANK]


def greedy_labels(logits_TV: Tensor) -> list[int]:
    """Decode greedily: take the most probable symbol of each frame, merge repetitions and remove blanks."""
    best = torch.unique_consecutive(logits_TV.argmax(dim=1)).tolist()
    return [symbol for symbol in best if symbol != BLANK]


def count_blanks(logits_BTV: Tensor, inputs: CtcInputs) -> Tensor:
    """Return the number of frames whose most probable symbol is the blank, in utterances with labels."""
    counted_BT = valid_mask(inputs.audio.frames_B, logits_BTV.shape[1]) & (inputs.label_lengths_B > 0).unsqueeze(1)
    return ((logits_BTV.argmax(dim=2) == BLANK) & counted_BT).sum()


def count_errors(
    logits_BTV: Tensor, inputs: CtcInputs, vocabulary: Sequence[str], *, spaced: bool = False
) -> tuple[int, int, int]:
    """Return the edit distance between greedy and reference labels, the number of reference words, and that of words.

    All are sums over the utterances. If the text is `spaced`, each symbol is a word.
    """
    from rapidfuzz.distance import Levenshtein

    errors = words = word_errors = 0
    logits_BTV = logits_BTV.float().cpu()
    references = inputs.labels_L.cpu().split(inputs.label_lengths_B.tolist())
    for logits_TV, frames, labels in zip(logits_BTV, inputs.audio.frames_B.tolist(), references, strict=True):
        if not len(labels):  # the silence of a micro-batch without utterances
            continue
        found, wanted = greedy_labels(logits_TV[:frames]), labels.tolist()
        errors += int(Levenshtein.distance(found, wanted))
        hypothesis, reference = (labels_to_text(each, vocabulary, spaced=spaced).split() for each in (found, wanted))
        words += len(reference)
        word_errors += int(Levenshtein.distance(hypothesis, reference))
    return errors, words, word_errors
