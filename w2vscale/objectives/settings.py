"""The settings of each objective: the section `objective` of the config.

They can be read without importing PyTorch, which takes seconds: so a command refuses a wrong setting at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from w2vscale.config import Config, ObjectiveConfig, Section, architecture, load_config, objective_named, parse_section
from w2vscale.config.section import Count, CountOrZero, Fraction, NotNegative, Positive, Probability, Size
from w2vscale.data.vocabulary import check_vocabulary, is_spaced, read_vocabulary


class ObjectiveSettings(Section):
    """Settings of an objective: the section `objective` of the config."""

    name: str

    @property
    def shortest_frames(self) -> int:
        """Frames of the shortest utterance that can be learned from."""
        return 1

    def completed(self) -> Self:
        """The settings with the contents of the files that they name. Raises UserError if one cannot be used."""
        return self

    def check_new(self) -> None:
        """Check that a new model can have these completed settings. Raises a UserError that names the setting.

        This is apart from reading them, so that the checkpoints of earlier versions can be opened.
        """


class MaskSettings(ObjectiveSettings):
    """Settings of masks over spans of frames."""

    mask_probability: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.65, description="expected fraction of frames in masked spans, counted before they overlap"
    )
    mask_length: Size = Field(10, description="length of a masked span, in frames")
    mask_min_spans: Size = Field(2, description="minimum number of masked spans per utterance")
    mask_trim: Literal["none", "micro_batch"] = Field(
        "none",
        description="micro_batch: unmask single frames and channels at random until all utterances of a micro-batch "
        "have equally many masked, as fairseq does; none: keep whole spans",
    )

    @property
    def shortest_frames(self) -> int:
        """Minimum number of frames of an utterance of which at least `mask_min_spans` are always masked."""
        return self.mask_min_spans + 1


class ContrastiveSettings(MaskSettings):
    """Settings of quantizer, masks and loss."""

    name: Literal["wav2vec2"] = architecture("wav2vec2", "wav2vec 2.0 pretraining")
    codebooks: Count = architecture(2, "number of codebooks", le=1000)
    codebook_entries: Size = architecture(320, "number of entries of each codebook", ge=2)
    codevector_dim: Size = architecture(256, "width of a quantized vector: the entries of all codebooks, concatenated")
    quantizer_input: Literal["features", "projected"] = architecture(
        "features", "input of the quantizer: features after their LayerNorm, or after the projection to model.dim"
    )
    target_projection: bool = architecture(True, "project quantized vectors before comparing them")
    projection_dim: Size = architecture(256, "width of the space in which context and targets are compared")
    feature_dropout: Probability = Field(0.1, description="dropout on the input of the quantizer")
    gumbel_start: Positive = Field(2.0, description="temperature of the Gumbel softmax at update 0")
    gumbel_end: Positive = Field(0.5, description="lowest temperature of the Gumbel softmax")
    gumbel_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.999995, description="multiply the temperature by this factor in every update"
    )
    negatives: Size = Field(100, description="number of negatives per masked frame, from the same utterance")
    logit_temperature: Positive = Field(0.1, description="temperature that divides the cosine similarities")
    diversity_weight: NotNegative = Field(0.1, description="weight of the codebook diversity loss")
    feature_penalty_weight: NotNegative = Field(
        10.0, description="weight of the feature penalty, the mean square of the features"
    )

    @model_validator(mode="after")
    def _check(self) -> ContrastiveSettings:
        if self.codevector_dim % self.codebooks:
            raise ValueError(f"codebooks={self.codebooks} does not divide codevector_dim={self.codevector_dim}")
        if not self.target_projection and self.codevector_dim != self.projection_dim:
            raise ValueError(
                f"without target_projection, codevector_dim={self.codevector_dim} "
                f"must equal projection_dim={self.projection_dim}"
            )
        if self.gumbel_end > self.gumbel_start:
            raise ValueError(f"gumbel_end={self.gumbel_end} is above gumbel_start={self.gumbel_start}")
        return self

    def temperature(self, update: int) -> float:
        """Return the temperature of the Gumbel softmax in `update`: max(start * decay^update, end)."""
        return max(self.gumbel_start * self.gumbel_decay**update, self.gumbel_end)


class CtcSettings(MaskSettings):
    """Settings of vocabulary, masks and freezing."""

    name: Literal["ctc"] = architecture("ctc", "fine-tuning for speech recognition with CTC")
    vocabulary: list[str] | Path = architecture(
        [],
        "symbols of the output layer, the blank of CTC first: a list, a file (one symbol per line, dict.ltr.txt of "
        "fairseq, or vocab.json of Transformers), or `letters` (English capitals, as in the published models)",
    )
    split: Literal["auto", "longest", "spaces"] = architecture(
        "auto",
        "how to split transcripts into symbols: by the longest one that matches, at spaces (phones), or `auto`: at "
        "spaces if a symbol cannot be spelled with the single letters of the vocabulary",
    )
    sentencepiece: Path | None = Field(
        None,
        description="SentencePiece model that splits transcripts; an empty vocabulary becomes the blank and its "
        "pieces, or its pieces alone if the first is a control symbol such as <s>, which is then the blank",
    )
    max_unknown_fraction: Fraction = Field(
        0.05,
        description="refuse to start when more than this fraction of the symbols of transcripts is not in the "
        "vocabulary",
    )
    head_init: Literal["normal", "xavier"] = Field(
        "normal",
        description="initial weights of the output layer: normal with standard deviation 0.02, as in Transformers, or "
        "Xavier-uniform, as in fairseq",
    )
    final_dropout: Probability = Field(0.0, description="dropout before the output layer")
    channel_mask_probability: Fraction = Field(
        0.0, description="expected fraction of channels in masked spans, counted before they overlap"
    )
    channel_mask_length: Size = Field(64, description="length of a masked span, in channels")
    freeze_encoder_updates: CountOrZero = Field(0, description="train only the output layer for this many updates")

    def completed(self) -> Self:
        named, pieces = self.vocabulary, self.sentencepiece
        vocabulary = read_vocabulary(named, sentencepiece=pieces, split=self.split)
        spaced = is_spaced(vocabulary, sentencepiece=pieces, split=self.split)
        resolved = {
            "vocabulary": vocabulary,
            # An absolute path, so that the run can be resumed and evaluated from any folder.
            "sentencepiece": pieces and pieces.absolute(),
            "split": "spaces" if spaced else "longest",
        }
        return self.model_copy(update=resolved)

    def check_new(self) -> None:
        assert isinstance(self.vocabulary, list), "completed"
        check_vocabulary(self.vocabulary, sentencepiece=self.sentencepiece, split=self.split)


class BestRqSettings(MaskSettings):
    """Settings of the random quantizer and the masks."""

    name: Literal["best_rq"] = architecture("best_rq", "BEST-RQ pretraining")
    codebooks: Count = architecture(4, "number of random codebooks, each with its own output layer", le=1000)
    codebook_entries: Size = architecture(8192, "number of entries of each codebook", ge=2)
    codebook_dim: Count = architecture(16, "width of a codebook entry", le=1000)
    mel_bins: Size = architecture(80, "number of mel bins of the features that give the targets")


SETTINGS: dict[str, type[ObjectiveSettings]] = {
    "wav2vec2": ContrastiveSettings,
    "ctc": CtcSettings,
    "best_rq": BestRqSettings,
}
"""The settings of the objectives of this project. Others may be in `OBJECTIVES` alone."""


def load_settings(source: str | Path, overrides: Sequence[str] = (), *, new: bool = True) -> Config:
    """Load settings like `w2vscale.objectives.load`, but import PyTorch only for an objective that is not here."""
    name = objective_named(source, overrides)
    if not (isinstance(name, str) and name in SETTINGS):
        from w2vscale.objectives.registry import load

        return load(source, overrides, new=new)[0]
    config = load_config(source, overrides, objectives=SETTINGS)
    settings = parse_section(SETTINGS[name], config.objective.model_dump(), name="objective").completed()
    if new:
        settings.check_new()
    return with_settings(config, settings)


def with_settings(config: Config, settings: ObjectiveSettings) -> Config:
    """Replace the section `objective`."""
    return config.model_copy(update={"objective": ObjectiveConfig(**settings.model_dump())})


def effective(config: Config) -> dict[str, dict[str, Any]]:
    """Return all settings as plain values, with what `schedule.final_ratio=null` stands for."""
    document = config.model_dump(mode="json")
    document["schedule"]["final_ratio"] = config.schedule.end
    return document
