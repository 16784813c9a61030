"""The settings of a run, each with its type, default, unit and limits.

Defaults are those of wav2vec 2.0 BASE (Baevski et al. 2020, arXiv:2006.11477) with this project's own
optimisation (AdamW, cosine, clipping, BF16). Presets state only what differs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from w2vscale.data.sentence_pieces import open_pieces, vocabulary_of

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

BASE_CONV_LAYERS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean_for_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic takes true for 1, and YAML takes yes and on for true.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"{value} is neither a number nor text")
        return value


class ModelConfig(Section):
    """Architecture and pretext task of one wav2vec 2.0 model."""

    sampling_rate: Count = Field(16_000, description="Hz; audio at other rates is resampled to it")
    normalize_waveform: bool = Field(False, description="zero mean, unit variance per utterance")

    conv_layers: tuple[tuple[Count, Count, Count], ...] = Field(
        BASE_CONV_LAYERS, min_length=1, description="(channels, kernel, stride) of each layer"
    )
    conv_norm: Literal["group", "layer"] = Field("group", description="group: on layer 0 only; layer: every layer")
    conv_norm_groups: Count = Field(512, description="groups of layer 0's GroupNorm")
    conv_bias: bool = False
    conv_padding: bool = Field(False, description="pad each convolution by (kernel - 1) // 2")
    feature_grad_mult: Fraction = Field(0.1, description="scale of the gradient into the feature encoder")

    layers: Count = 12
    dim: Count = 768
    ffn_dim: Count = 3072
    heads: Count = 12
    norm_first: bool = Field(False, description="pre-LN blocks and a final LayerNorm; otherwise post-LN blocks")
    embedding_norm: bool = Field(True, description="LayerNorm after the positional convolution")
    positional_kernel: Count = 128
    positional_groups: Count = 16
    max_frames: Count | None = Field(None, description="longest input, in frames")

    dropout: Probability = Field(0.1, description="after attention, feed-forward and the embeddings")
    attention_dropout: Probability = 0.1
    activation_dropout: Probability = Field(0.0, description="inside the feed-forward")
    input_dropout: Probability = Field(0.1, description="on the projected features")
    feature_dropout: Probability = Field(0.1, description="on the quantizer's input")
    layerdrop: Probability = 0.05

    codebooks: Count = 2
    codebook_entries: Annotated[int, Field(ge=2)] = Field(320, description="per codebook")
    codevector_dim: Count = Field(256, description="of all codebooks together")
    quantizer_input: Literal["features", "projected"] = "features"
    target_projection: bool = Field(True, description="project quantized vectors before comparing them")
    projection_dim: Count = Field(256, description="of the space in which context and targets are compared")
    gumbel_start: Positive = 2.0
    gumbel_end: Positive = 0.5
    gumbel_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.999995, description="per update")

    mask_probability: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65
    mask_length: Count = Field(10, description="frames of one span")
    mask_min_spans: Count = 2
    negatives: Count = 100
    logit_temperature: Positive = 0.1
    diversity_weight: Annotated[float, Field(ge=0.0)] = 0.1
    feature_penalty_weight: Annotated[float, Field(ge=0.0)] = 10.0

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        channels = self.conv_layers[0][0]
        if self.conv_norm == "group" and channels % self.conv_norm_groups:
            raise ValueError(f"conv_norm_groups={self.conv_norm_groups} does not divide {channels} channels")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        if self.dim % self.positional_groups:
            raise ValueError(f"positional_groups={self.positional_groups} does not divide dim={self.dim}")
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


ARCHITECTURE = {
    "sampling_rate", "normalize_waveform", "conv_layers", "conv_norm", "conv_norm_groups", "conv_bias", "conv_padding",
    "layers", "dim", "ffn_dim", "heads", "norm_first", "embedding_norm", "positional_kernel", "positional_groups",
    "codebooks", "codebook_entries", "codevector_dim", "quantizer_input", "target_projection", "projection_dim",
}  # fmt: skip
"""Settings of the model that its weights were trained with, whether their shapes show it or not."""

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
"""The vocabulary of the published English models, in their order; `|` is the space."""


def _read_vocabulary(value: object) -> object:
    if value == "letters":
        return LETTERS
    if not isinstance(value, str | Path):
        return value
    try:
        return [line.split()[0] for line in Path(value).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{value}: neither `letters` nor a file of symbols ({error})") from None


class CtcConfig(Section):
    """Fine-tuning: an output layer for text in place of the pretext task."""

    vocabulary: Annotated[list[str], BeforeValidator(_read_vocabulary)] = Field(
        [],
        description="symbols of the output layer, the first CTC's blank: a list, a file with one a line, or `letters` "
        "(English capitals, as in the published models). Empty: a run pretrains",
    )
    sentencepiece: Path | None = Field(
        None,
        description="SentencePiece model that cuts transcripts into labels; an empty ctc.vocabulary becomes the blank "
        "and its pieces",
    )
    final_dropout: Probability = Field(0.0, description="before the output layer")
    channel_mask_probability: Fraction = Field(0.0, description="of a channel to be masked; model.mask_* mask frames")
    channel_mask_length: Count = Field(64, description="channels of one span")
    freeze_encoder_updates: Annotated[int, Field(ge=0)] = Field(
        0,
        description="updates in which the output layer alone learns; model.feature_grad_mult=0 freezes the CNN always",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_pieces(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and not settings.get("vocabulary"):
            path = settings.get("sentencepiece")
            if isinstance(path, str | Path):
                return {**settings, "vocabulary": vocabulary_of(open_pieces(Path(path)))}
        return settings

    @model_validator(mode="after")
    def _check(self) -> CtcConfig:
        if repeated := [symbol for symbol in self.vocabulary if self.vocabulary.count(symbol) > 1]:
            raise ValueError(f"vocabulary: {repeated[0]!r} is in it twice")
        if len(self.vocabulary) == 1:
            raise ValueError("vocabulary: a blank alone")
        return self


class DataConfig(Section):
    """Which audio is read, and how."""

    mode: Literal["index", "stream"] = Field(
        "index", description="index: planned, with exact resumes. stream: Lhotse Shar, read in sequence"
    )
    train: Annotated[list[Path], BeforeValidator(_as_list)] = Field(
        [], description="indexed Lhotse cut manifests; of mode=stream, folders of shards"
    )
    validation: Annotated[list[Path], BeforeValidator(_as_list)] = Field([], description="likewise; may be empty")
    max_seconds: Positive = Field(15.625, description="longer utterances are cropped to this at a random offset")
    min_seconds: Positive = Field(2.0, description="shorter utterances are left out")
    max_bad_fraction: Fraction = Field(0.05, description="of unreadable utterances, above which the run stops")
    workers: Annotated[int, Field(ge=0)] = Field(4, description="loader processes per rank; 0: in the main process")
    prefetch: Count = Field(
        4, description="micro-batches that each loader process prepares ahead; more where an update needs more"
    )
    stream_buffer: Count = Field(
        1000, description="mode=stream: utterances that each loader process holds, to batch those of similar length"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds={self.min_seconds} is above max_seconds={self.max_seconds}")
        return self


class MixConfig(Section):
    """How much of each corpus or language an epoch of `data.train` holds; it lasts as long as all of them together."""

    by: Literal["nothing", "corpus", "language", "corpus/language"] = Field(
        "nothing", description="what is balanced; a corpus is one manifest. nothing: an epoch has each utterance once"
    )
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="a group's share is proportional to hours^temperature; 1: as it is, 0: all equal"
    )
    weights: dict[str, Positive] = Field(
        {}, description="shares instead of a temperature, for every manifest's path, language, or path/language"
    )

    @model_validator(mode="after")
    def _check(self) -> MixConfig:
        if self.weights and self.by == "nothing":
            raise ValueError("weights need mix.by: corpus, language or corpus/language")
        return self


class AugmentConfig(Section):
    """Lhotse's augmentations of `data.train`; off by default."""

    speed: list[Annotated[float, Field(ge=0.5, le=2.0)]] = Field(
        [], description="factors, of which each utterance draws one; with 1.0 some stay as they are"
    )
    reverb: Annotated[list[Path], BeforeValidator(_as_list)] = Field(
        [], description="indexed cut manifests of room impulse responses"
    )
    reverb_probability: Fraction = Field(0.5, description="of an utterance to be reverberated")
    noise: Annotated[list[Path], BeforeValidator(_as_list)] = Field([], description="indexed cut manifests of noises")
    noise_probability: Fraction = Field(0.5, description="of an utterance to get a noise added")
    noise_snr: tuple[float, float] = Field((10.0, 20.0), description="signal-to-noise ratio in dB: from, to")

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.noise_snr[0] > self.noise_snr[1]:
            raise ValueError(f"noise_snr={list(self.noise_snr)}: the first is above the second")
        return self


class BatchConfig(Section):
    """What one update consists of."""

    max_seconds: Positive = Field(87.5, description="padded audio of one micro-batch, at most")
    micro_batches: Count = Field(64, description="per update, over all ranks")
    concat: Count | Literal["auto"] = Field(
        1,
        description="micro-batches that share one forward; does not change the result. auto: as many of similar length "
        "as fit into memory, measured before the first update",
    )
    buckets: Count = Field(64, description="duration buckets, at most")
    pad_to: Literal["longest", "bucket"] = Field(
        "longest",
        description="pad to a micro-batch's longest utterance, or to its bucket's: more padding, few widths; "
        "does not change the result",
    )

    @field_validator("concat", mode="before")
    @classmethod
    def _check_concat(cls, value: object) -> object:
        if value != "auto" and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{value} is neither auto nor a whole number from 1 on")
        return value


class ParameterGroupConfig(Section):
    """Settings of the parameters whose name a regular expression finds."""

    pattern: Pattern
    lr_scale: Annotated[float, Field(ge=0.0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0.0)] | None = Field(None, description="null: optim.weight_decay")


class OptimConfig(Section):
    """AdamW."""

    lr: Positive = Field(5e-4, description="peak learning rate")
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.01, description="on matrices only")
    max_norm: Positive | None = Field(1.0, description="gradients are clipped to this L2 norm; null: never")
    groups: list[ParameterGroupConfig] = []


class ScheduleConfig(Section):
    """The learning rate over the updates, as a share of `optim.lr`."""

    kind: Literal["cosine", "linear", "tri_stage"] = "cosine"
    warmup_updates: Annotated[int, Field(ge=0)] = Field(32_000, description="cosine and linear")
    final_ratio: Fraction = Field(0.1, description="at the last update")
    initial_ratio: Fraction = Field(0.01, description="tri_stage: at the first update")
    stages: tuple[Fraction, Fraction, Fraction] = Field(
        (0.1, 0.4, 0.5), description="tri_stage: shares of warm-up, constant and decay"
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if abs(sum(self.stages) - 1.0) > 1e-6:
            raise ValueError(f"stages={self.stages} must add up to 1")
        if self.kind == "tri_stage" and self.final_ratio == 0.0:
            raise ValueError("final_ratio=0 cannot be reached by tri_stage's exponential decay")
        return self


class EngineConfig(Section):
    """What runs the updates. The engine does not change the result."""

    name: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    reshard_after_forward: bool = Field(
        True, description="fsdp: free gathered parameters after the forward, and shard gradients after each backward"
    )
    shard_size: Count | None = Field(
        None, description="fsdp: ranks that share one copy of the model (hybrid sharding); null: all"
    )
    offload: bool = Field(False, description="fsdp: keep parameters, gradients and optimizer state in host memory")
    deepspeed_config: str = Field("zero2", description="deepspeed: the name of a file in ds_configs/, or a path")
    activation_checkpointing: Literal["none", "features", "selective", "full"] = Field(
        "none",
        description="recompute activations in the backward. features: of the feature encoder; selective: and of every "
        "n-th block; full: and of every block",
    )
    activation_checkpointing_every: Count = Field(2, description="selective: n")
    compile: bool = Field(False, description="compile the transformer's blocks (torch.compile)")
    compare_ranks_every: Count = Field(
        50, description="updates, between checks that all ranks are about to compute the same"
    )

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.name != "fsdp" and (self.offload or self.shard_size is not None):
            setting = "offload=true" if self.offload else f"shard_size={self.shard_size}"
            hint = "; choose deepspeed_config=zero2_offload" if self.name == "deepspeed" and self.offload else ""
            raise ValueError(f"{setting} is for name=fsdp, not name={self.name}{hint}")
        return self


class PrecisionConfig(Section):
    """Master weights, optimizer state and reductions are always fp32."""

    compute: Literal["bf16", "fp32"] = "bf16"


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Count = Field(1000, description="updates")
    asynchronous: bool = Field(True, description="training goes on while a copy in host memory is written")
    keep_last: Count = Field(2, description="newest checkpoints")
    keep_every: Annotated[int, Field(ge=0)] = Field(0, description="also keep every multiple of this; 0: none")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        0, description="also keep this many with the lowest validation loss at their update; 0: none"
    )


class LoggingConfig(Section):
    """Where and how often metrics go."""

    every: Count = Field(100, description="updates")
    tensorboard: bool = True


class TrainerConfig(Section):
    """The run as a whole."""

    updates: Count = 400_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    validate_every: Count = Field(5000, description="updates")
    init_from: Path | None = Field(
        None,
        description="whose weights a new run starts from: a checkpoint, a folder of Transformers, or fairseq's .pt",
    )
    init_allow: Annotated[list[Pattern], BeforeValidator(_as_list)] = Field(
        [], description="regular expressions: tensors and model settings that may be missing there or differ"
    )
    max_skipped_in_a_row: Count = Field(20, description="non-finite updates, after which the run stops")


class Config(Section):
    """All settings of one run."""

    model: ModelConfig = ModelConfig()
    ctc: CtcConfig = CtcConfig()
    data: DataConfig = DataConfig()
    mix: MixConfig = MixConfig()
    augment: AugmentConfig = AugmentConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.data.mode == "stream" and self.mix.by != "nothing":
            raise ValueError(f"mix.by={self.mix.by} is for data.mode=index, not data.mode=stream")
        if self.data.mode == "stream" and self.batch.pad_to == "bucket":
            raise ValueError("batch.pad_to=bucket is for data.mode=index, not data.mode=stream")
        if self.data.max_seconds > self.batch.max_seconds:
            raise ValueError(
                f"data.max_seconds={self.data.max_seconds} does not fit "
                f"into a micro-batch of batch.max_seconds={self.batch.max_seconds}"
            )
        if self.batch.max_seconds * self.model.sampling_rate >= 2**31:
            raise ValueError(
                f"batch.max_seconds={self.batch.max_seconds:g}: a micro-batch has at most 2^31 - 1 samples"
            )
        if self.checkpoint.keep_best and not self.data.validation:
            raise ValueError(f"checkpoint.keep_best={self.checkpoint.keep_best} needs data.validation")
        if self.ctc.vocabulary:
            self._check_fine_tuning()
        if self.batch.concat != "auto" and self.batch.concat > self.batch.micro_batches:
            raise ValueError(
                f"batch.concat={self.batch.concat} is above batch.micro_batches={self.batch.micro_batches}"
            )
        if self.schedule.kind != "tri_stage" and self.schedule.warmup_updates > self.trainer.updates:
            raise ValueError(
                f"schedule.warmup_updates={self.schedule.warmup_updates} is above "
                f"trainer.updates={self.trainer.updates}"
            )
        return self

    def _check_fine_tuning(self) -> None:
        if self.data.mode == "stream":
            raise ValueError("ctc.vocabulary: fine-tuning needs data.mode=index")
        if min(self.augment.speed, default=1.0) < 1.0:
            raise ValueError(
                f"augment.speed={self.augment.speed}: slowed utterances would be cropped, and their text not"
            )
        frozen = self.ctc.freeze_encoder_updates > 0 or self.model.feature_grad_mult == 0.0
        if frozen and self.optim.weight_decay > 0.0:
            raise ValueError(
                f"optim.weight_decay={self.optim.weight_decay:g} would shrink what is frozen "
                "(ctc.freeze_encoder_updates, model.feature_grad_mult=0): set it to 0"
            )
