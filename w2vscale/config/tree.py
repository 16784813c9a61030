"""The settings of a run, each with its type, default, unit and limits.

Defaults are those of the preset `base`: wav2vec 2.0 BASE (Baevski et al. 2020, arXiv:2006.11477) with the optimisation
of this project (AdamW, cosine, clipping, BF16). presets/base.yaml names the source of each number.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from w2vscale.config.running import (
    CheckpointConfig,
    EngineConfig,
    HealthConfig,
    LoggingConfig,
    PrecisionConfig,
    TrainerConfig,
    WatchdogConfig,
)
from w2vscale.config.section import (
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Pattern,
    Places,
    Positive,
    Probability,
    Scheme,
    Section,
    Size,
    architecture,
    as_list,
)

FINAL_RATIOS = {"cosine": 0.1, "linear": 0.0, "tri_stage": 0.05}  # as in GPT-3; fairseq; fairseq's wav2vec 2.0
BASE_CONV_LAYERS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)


class ModelConfig(Section):
    """Architecture of the encoder."""

    sampling_rate: Count = architecture(16_000, "sampling rate in Hz; other audio is resampled")
    normalize_waveform: bool = architecture(False, "normalise each utterance to zero mean and unit variance")

    conv_layers: tuple[tuple[Size, Size, Size], ...] = architecture(
        BASE_CONV_LAYERS,
        "(channels, kernel, stride) of each convolution of the feature encoder",
        min_length=1,
        max_length=100,
    )
    conv_norm: Literal["group", "layer"] = architecture(
        "group", "normalisation of the convolutions: GroupNorm in the first one, or LayerNorm in every one"
    )
    conv_norm_groups: Count = architecture(512, "number of groups with conv_norm=group")
    conv_bias: bool = architecture(False, "add a bias in the convolutions")
    conv_padding: bool = architecture(False, "pad each convolution by (kernel - 1) // 2 on both sides")

    layers: Count = architecture(12, "number of transformer blocks", le=1000)
    dim: Size = architecture(768, "width of the transformer")
    ffn_dim: Size = architecture(3072, "width of the feed-forward network")
    heads: Count = architecture(12, "number of attention heads")
    norm_first: bool = architecture(False, "pre-LN blocks with a final LayerNorm (true) or post-LN blocks (false)")
    embedding_norm: bool = architecture(True, "apply LayerNorm after the positional convolution")
    positional_kernel: Size = architecture(128, "kernel of the positional convolution, in frames")
    positional_groups: Count = architecture(16, "number of groups of the positional convolution")
    max_frames: Count | None = Field(None, description="longest input in frames; null: no limit")
    waveform_eps: Positive = Field(
        1e-7, description="added to the variance with normalize_waveform: 1e-7 in Transformers, 1e-5 in fairseq"
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        channels = self.conv_layers[0][0]
        if self.conv_norm == "group" and channels % self.conv_norm_groups:
            raise ValueError(f"conv_norm_groups={self.conv_norm_groups} does not divide {channels} channels")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        if self.dim % self.positional_groups:
            raise ValueError(f"positional_groups={self.positional_groups} does not divide dim={self.dim}")
        return self


class RegularizationConfig(Section):
    """Dropout and gradient scaling in the encoder. Masks are settings of the objective."""

    dropout: Probability = Field(0.1, description="dropout after attention, feed-forward network and embeddings")
    attention_dropout: Probability = Field(0.1, description="dropout of the attention weights")
    activation_dropout: Probability = Field(0.0, description="dropout inside the feed-forward network")
    input_dropout: Probability = Field(0.1, description="dropout of the projected features")
    layerdrop: Probability = Field(
        0.05, description="probability of skipping a transformer block, drawn once per update for all ranks"
    )
    feature_grad_mult: Fraction = Field(
        0.1, description="scale of the gradient into the feature encoder; 0 freezes its parameters"
    )


class ObjectiveConfig(Section):
    """What the model learns. Each objective has its own settings, which `w2vscale.objectives` defines and checks."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("wav2vec2", description="training objective")


class DataConfig(Section):
    """Which audio is read, and how."""

    mode: Literal["index", "stream"] = Field(
        "index",
        description="index: files, read at random; stream: indexed Lhotse Shar, read in sequence. Both resume exactly",
    )
    train: Places = Field(
        [],
        description="indexed Lhotse cut manifests or, with mode=stream, indexed folders of Shar shards; paths or URLs",
    )
    validation: Places = Field([], description="indexed Lhotse cut manifests, by path or URL; empty: no validation")
    validation_sets: dict[str, Places] = Field(
        {},
        description="further validation sets by name, each of one manifest or a list. Their metrics are logged; "
        "data.validation alone ranks checkpoints and stops early",
    )
    url_schemes: Annotated[list[Scheme], BeforeValidator(as_list)] = Field(
        ["file"],
        description="where the audio of a manifest may be: file (files on this machine), and schemes of URLs such as "
        "s3. A manifest that names another place is refused",
    )
    max_seconds: Positive = Field(15.625, description="crop longer utterances to this many seconds, at a random offset")
    min_seconds: Positive = Field(2.0, description="leave out utterances shorter than this many seconds")
    max_bad_fraction: Fraction = Field(0.05, description="abort when more than this fraction of utterances is unusable")
    # One process loads about 1,500 seconds of FLAC per second. BASE took 6,077 on an H100; 9,500 are the roofline.
    workers: CountOrZero = Field(8, description="loader processes per rank; 0: load in the main process")
    prefetch: Count = Field(
        4, description="micro-batches that each loader process prepares ahead; raised where an update needs more"
    )
    stream_buffer: Count = Field(
        1000,
        description="with mode=stream, utterances in a block. A block is stored in one place, and batches are formed "
        "within it. Blocks in memory: batch.micro_batches / the length of a series (batch.same_bucket)",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds={self.min_seconds} is above max_seconds={self.max_seconds}")
        if self.validation_sets and not self.validation:
            raise ValueError("validation_sets need data.validation, the set that ranks checkpoints")
        for name, places in self.validation_sets.items():
            if not re.fullmatch(r"[a-z0-9_-]+", name):
                raise ValueError(f"validation_sets.{name}: the name of a set consists of a-z, 0-9, _ and -")
            if not places:
                raise ValueError(f"validation_sets.{name}: names no manifest")
        return self


class MixConfig(Section):
    """The share of each corpus or language in an epoch, which is as long as all of `data.train`."""

    by: Literal["nothing", "corpus", "language", "corpus/language"] = Field(
        "nothing",
        description="what is balanced; a corpus is one manifest. nothing: an epoch has each utterance once",
    )
    temperature: Fraction = Field(
        0.5, description="the share of a group is proportional to hours^temperature; 1: as it is, 0: equal shares"
    )
    weights: dict[str, Positive] = Field(
        {}, description="shares to use instead of a temperature, by manifest path, language, or path/language"
    )

    @model_validator(mode="after")
    def _check(self) -> MixConfig:
        if self.weights and self.by == "nothing":
            raise ValueError("weights need mix.by: corpus, language or corpus/language")
        return self


class AugmentConfig(Section):
    """Lhotse's augmentations of `data.train`; off by default."""

    speed: list[Annotated[float, Field(ge=0.5, le=2.0)]] = Field(
        [], description="speed factors; each utterance draws one"
    )
    reverb: Places = Field([], description="indexed cut manifests of room impulse responses, by path or URL")
    reverb_probability: Fraction = Field(0.5, description="probability of reverberating an utterance")
    noise: Places = Field([], description="indexed cut manifests of noise, by path or URL")
    noise_probability: Fraction = Field(0.5, description="probability of adding noise to an utterance")
    noise_snr: tuple[float, float] = Field((10.0, 20.0), description="range of the signal-to-noise ratio in dB")

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.noise_snr[0] > self.noise_snr[1]:
            raise ValueError(f"noise_snr={list(self.noise_snr)}: the first value is above the second")
        return self


class BatchConfig(Section):
    """What one update consists of."""

    max_seconds: Positive = Field(87.5, description="largest micro-batch in seconds of padded audio")
    micro_batches: Count = Field(64, description="micro-batches per update, over all ranks")
    same_bucket: Count = Field(
        8,
        description="draw up to this many consecutive micro-batches (a series) from one duration bucket, so that they "
        "can share a forward with little padding; series are shorter in a small corpus, and if an update would have "
        "fewer than four",
    )
    concat: Count | Literal["auto"] = Field(
        "auto",
        description="micro-batches that share one forward; changes the noise of dropout, nothing else. auto: on a GPU, "
        "as many of the same bucket as fit into its memory, measured before the first update; 1 on a CPU",
    )
    buckets: Count = Field(64, description="largest number of duration buckets")
    pad_to: Literal["longest", "bucket"] = Field(
        "longest",
        description="pad to the longest utterance of a micro-batch, or of its bucket (more padding, fewer shapes); "
        "does not change the result",
    )

    @field_validator("concat", mode="before")
    @classmethod
    def _check_concat(cls, value: object) -> object:
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ValueError(f"{value} is neither auto nor a whole number from 1 on")
        return value


class ParameterGroupConfig(Section):
    """Settings of the parameters whose name a regular expression finds."""

    pattern: Pattern = Field(description="regular expression that is searched in parameter names")
    lr_scale: NotNegative = Field(1.0, description="factor of the learning rate")
    weight_decay: NotNegative | None = Field(
        None, description="weight decay of all of them, vectors too; null: as in optim.weight_decay"
    )


class OptimConfig(Section):
    """AdamW."""

    lr: Positive = Field(5e-4, description="peak learning rate")
    betas: tuple[Probability, Probability] = Field((0.9, 0.98), description="decay rates of the moments")
    eps: Positive = Field(1e-6, description="added to the denominator")
    weight_decay: NotNegative = Field(
        0.01, description="weight decay of matrices, and of vectors with decay_vectors or by optim.groups"
    )
    decay_vectors: bool = Field(False, description="apply weight_decay to vectors too: biases, norms, mask embedding")
    max_norm: Positive | None = Field(1.0, description="clip gradients to this L2 norm; null: do not clip")
    groups: list[ParameterGroupConfig] = Field(
        [], description="parameter groups with other settings; the first pattern that matches counts"
    )
    ema_decay: Probability = Field(
        0.0,
        description="decay per update of a moving average of the weights, which is validated and exported, e.g. 0.999 "
        "or 0.9999; 0: no average",
    )


class ScheduleConfig(Section):
    """The learning rate over the updates, as a share of `optim.lr`."""

    kind: Literal["cosine", "linear", "tri_stage"] = Field("cosine", description="shape of the schedule")
    warmup_updates: CountOrZero = Field(32_000, description="updates of linear warm-up (cosine, linear)")
    first_step: Literal[0, 1] = Field(
        1,
        description="step of the schedule at the first update (cosine, linear). 1: it has 1 / warmup_updates of the "
        "peak. 0: it has rate 0, and the schedule runs one update later (fairseq, Transformers)",
    )
    final_ratio: Fraction | None = Field(
        None, description="share of the peak at the end; null: 0.1 with cosine, 0 with linear, 0.05 with tri_stage"
    )
    initial_ratio: Fraction = Field(0.01, description="share of the peak at the first update (tri_stage)")
    stages: tuple[Fraction, Fraction, Fraction] = Field(
        (0.1, 0.4, 0.5), description="shares of warm-up, constant rate and decay (tri_stage)"
    )

    @property
    def end(self) -> float:
        """The share of the peak at the end."""
        return FINAL_RATIOS[self.kind] if self.final_ratio is None else self.final_ratio

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if abs(sum(self.stages) - 1.0) > 1e-6:
            raise ValueError(f"stages={self.stages} must add up to 1")
        if self.kind == "tri_stage" and self.final_ratio == 0.0:
            raise ValueError("final_ratio=0 cannot be reached by the exponential decay of kind=tri_stage")
        return self


class Config(Section):
    """All settings of one run."""

    model: ModelConfig = ModelConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    mix: MixConfig = MixConfig()
    augment: AugmentConfig = AugmentConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        data, batch = self.data, self.batch
        if data.mode == "stream" and self.mix.by != "nothing":
            raise ValueError(f"mix.by={self.mix.by} is for data.mode=index, not data.mode=stream")
        if data.mode == "stream" and batch.pad_to == "bucket":
            raise ValueError("batch.pad_to=bucket is for data.mode=index, not data.mode=stream")
        if data.max_seconds > batch.max_seconds:
            raise ValueError(
                f"data.max_seconds={data.max_seconds} does not fit "
                f"into a micro-batch of batch.max_seconds={batch.max_seconds}"
            )
        if batch.max_seconds * self.model.sampling_rate >= 2**31:
            raise ValueError(f"batch.max_seconds={batch.max_seconds:g}: a micro-batch has at most 2^31 - 1 samples")
        if self.checkpoint.keep_best and not data.validation:
            raise ValueError(f"checkpoint.keep_best={self.checkpoint.keep_best} needs data.validation")
        if self.trainer.early_stopping and not data.validation:
            raise ValueError(f"trainer.early_stopping={self.trainer.early_stopping} needs data.validation")
        saved, health = self.checkpoint, self.health
        if health.action == "roll_back" and (saved.keep_last - 1) * saved.every < health.patience * self.logging.every:
            raise ValueError(
                f"health.action=roll_back goes back {health.patience * self.logging.every} updates (health.patience * "
                f"logging.every), but checkpoint.keep_last={saved.keep_last} and checkpoint.every={saved.every} keep "
                f"checkpoints of only {(saved.keep_last - 1) * saved.every}: raise checkpoint.keep_last"
            )
        if batch.concat != "auto" and batch.concat > batch.micro_batches:
            raise ValueError(f"batch.concat={batch.concat} is above batch.micro_batches={batch.micro_batches}")
        if wrong := [one for one in self.logging.attention_layers if not 1 <= abs(one) <= self.model.layers]:
            raise ValueError(
                f"logging.attention_layers={wrong[0]} is not one of the {self.model.layers} blocks (model.layers), "
                "from 1; -1 is the last one"
            )
        if self.schedule.kind != "tri_stage" and self.schedule.warmup_updates > self.trainer.updates:
            raise ValueError(
                f"schedule.warmup_updates={self.schedule.warmup_updates} is above "
                f"trainer.updates={self.trainer.updates}: lower it, too"
            )
        return self
