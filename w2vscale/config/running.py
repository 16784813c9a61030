"""The settings of how a run is carried out: engine, precision, checkpoints, watchdog, health, logging and trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from w2vscale.config.section import (
    AboveOne,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Pattern,
    Positive,
    Section,
    as_list,
)
from w2vscale.storage.urls import Place, Url

MOST_PROFILED = 100  # updates


def _check_span(text: str) -> str:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        raise ValueError(f"{text}: expected FIRST:END with 1 <= FIRST < END, such as 100:110 for updates 100 to 109")
    if int(end) - int(first) > MOST_PROFILED:
        raise ValueError(f"{text}: at most {MOST_PROFILED} updates, because each takes megabytes of the trace")
    return text


def _check_project(name: str) -> str:
    if not re.fullmatch(r"[^/\\#?%:\s]{1,128}", name):
        raise ValueError(
            f"{name}: the name of a project has at most 128 characters, no spaces, and none of / \\ # ? % :"
        )
    return name


class EngineConfig(Section):
    """What runs the updates. The engine does not change the result."""

    name: Literal["ddp", "fsdp", "deepspeed"] = Field("ddp", description="training engine")
    reshard_after_forward: bool = Field(
        True, description="fsdp: free gathered parameters after the forward, and shard gradients after each backward"
    )
    shard_size: Count | Literal["node"] | None = Field(
        None,
        description="fsdp: number of consecutive ranks that share one copy of the model (hybrid sharding); node: the "
        "processes of each machine; null: all",
    )
    offload: bool = Field(False, description="fsdp: keep parameters, gradients and optimizer state in host memory")
    deepspeed_config: str = Field("zero2", description="deepspeed: name of a file in ds_configs/, or a path")
    activation_checkpointing: Literal["none", "features", "selective", "full"] = Field(
        "none",
        description="recompute activations in the backward: none, those of the feature encoder, also of every n-th "
        "block, or also of every block",
    )
    activation_checkpointing_every: Count = Field(2, description="n with activation_checkpointing=selective")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="compile feature encoder and transformer blocks with torch.compile; auto: on GPUs, if Triton, a C "
        "compiler and Python.h are installed, but not with ZeRO-3",
    )
    compare_ranks_every: Count = Field(50, description="updates between checks that all ranks do the same work")

    @field_validator("shard_size", mode="before")
    @classmethod
    def _check_shard_size(cls, value: object) -> object:
        if value not in ("node", None) and not (type(value) is int and value >= 1):
            raise ValueError(f"{value} must be node or a whole number of at least 1")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _check_compile(cls, value: object) -> object:
        if value not in ("auto", True, False):
            raise ValueError(f"{value} is none of auto, true and false")
        return value

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.name != "fsdp" and (self.offload or self.shard_size is not None):
            setting = "offload=true" if self.offload else f"shard_size={self.shard_size}"
            hint = "; choose deepspeed_config=zero2_offload" if self.name == "deepspeed" and self.offload else ""
            raise ValueError(f"{setting} is for name=fsdp, not name={self.name}{hint}")
        return self


class PrecisionConfig(Section):
    """Master weights, optimizer state and accumulated gradients are always fp32."""

    compute: Literal["bf16", "fp32"] = Field("bf16", description="type of activations and matrix products")
    reduce: Literal["fp32", "bf16"] = Field(
        "fp32", description="type in which gradients are summed over ranks; bf16 sends half of the bytes"
    )

    @field_validator("compute", mode="before")
    @classmethod
    def _refuse_fp16(cls, value: object) -> object:
        if value in ("fp16", "float16", "half", "16-mixed"):
            raise ValueError(
                f"{value} is not available: its largest number is 65,504 and its smallest gradients become zero, so it "
                "needs loss scaling; use bf16, which has the range of fp32, or fp32 on GPUs without bf16 (V100, T4)"
            )
        return value


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Count = Field(1000, description="updates between checkpoints")
    asynchronous: bool = Field(True, description="write a copy from host memory while training goes on")
    grace_seconds: Positive = Field(
        120, description="after a stop signal, save a checkpoint and exit within this many seconds"
    )
    keep_last: Count = Field(2, description="number of newest checkpoints to keep")
    keep_every: CountOrZero = Field(0, description="also keep every checkpoint whose update is a multiple; 0: none")
    keep_best: CountOrZero = Field(0, description="also keep this many with the lowest trainer.best_metric; 0: none")
    store: Place | None = Field(
        None,
        description="URL of a folder for the checkpoints of this run, such as s3://BUCKET/RUN. They are uploaded in "
        "the background, and downloaded where the run folder lacks them; null: none",
    )

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: Path | Url | None) -> Path | Url | None:
        if isinstance(store, Path):
            raise ValueError(f"store={store}: is not a URL such as s3://BUCKET/RUN")
        return store


class WatchdogConfig(Section):
    """What ends a run that hangs, so that a restart can continue it."""

    seconds: NotNegative = Field(
        300,
        description="end the run, and report where each rank is, after this many seconds without progress (ten times "
        "as many in start-up, the first update and saving), or without a sign of life from a rank; 0: never",
    )


class HealthConfig(Section):
    """What counts as trouble in a log line, and what a run does about it (docs/health.md)."""

    action: Literal["warn", "stop", "roll_back"] = Field(
        "warn",
        description="what follows trouble that lasts. warn: nothing but the warning; stop: end the run; roll_back: go "
        "back to the newest checkpoint from before the trouble, and skip the data since then",
    )
    patience: Count = Field(
        5, description="log lines in a row that show the trouble before the run stops or rolls back"
    )
    min_codes: Fraction = Field(
        0.25,
        description="collapse: the code perplexity of a codebook is below entries^min_codes (4.2 of 320)",
    )
    chance_after: Fraction = Field(
        0.1,
        description="chance level: predictions are no better than chance after this share of the updates, and after "
        "update 300 (with objective.name=ctc: 1,000)",
    )
    loss_ratio: AboveOne = Field(1.2, description="spike: the loss is above this multiple of its running median")
    norm_ratio: AboveOne = Field(
        10.0,
        description="exploding gradient: its norm is above this multiple of its running median without a falling loss",
    )


class LoggingConfig(Section):
    """Where and how often metrics and samples are written (docs/logging.md)."""

    every: Count = Field(100, description="updates between log lines")
    tensorboard: bool = Field(True, description="also write TensorBoard files")
    wandb: Annotated[str, AfterValidator(_check_project)] | None = Field(
        None, description="also log to this project of Weights & Biases; null: no"
    )
    mlflow: str | None = Field(
        None,
        description="also log to this MLflow tracking server (http://HOST:PORT, databricks, sqlite:///FILE) or to a "
        "database in this folder; null: no",
        min_length=1,
    )
    samples_every: CountOrZero = Field(
        5000,
        description="updates between pictures and audio of validation utterances, made at the next validation and at "
        "the end; 0: none",
    )
    histograms_every: CountOrZero = Field(5000, description="updates between histograms of some weights; 0: none")
    attention_layers: list[int] = Field(
        [1, -1], description="transformer blocks whose attention is among the samples, from 1; -1: the last one"
    )


class TrainerConfig(Section):
    """The run as a whole."""

    updates: Count = Field(400_000, description="number of optimizer steps")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of all randomness")
    validate_every: Count = Field(5000, description="updates between validations")
    init_from: Place | None = Field(
        None,
        description="start a new run from the weights of this checkpoint (path or URL), Transformers folder, or .pt "
        "file of fairseq or fairseq2",
    )
    init_allow: Annotated[list[Pattern], BeforeValidator(as_list)] = Field(
        [], description="regular expressions of tensors and settings that may be missing or differ in init_from"
    )
    best_metric: str = Field(
        "loss",
        description="validation metric that ranks checkpoints (checkpoint.keep_best); lower is better. loss; with "
        "objective.name=ctc also wer or label_error_rate",
    )
    early_stopping: CountOrZero = Field(
        0, description="end the run after this many validations in a row without a lower best_metric; 0: never"
    )
    max_hours: Positive | None = Field(
        None,
        description="hours after the start of the command at which the run has saved and ends with code 75, so that a "
        "scheduler can start it again; null: no limit",
    )
    profile: Annotated[str, AfterValidator(_check_span)] | None = Field(
        None,
        description="FIRST:END, such as 100:110: write a Chrome trace of updates FIRST to END - 1, counted from 1, on "
        "rank 0",
    )
    max_skipped_in_a_row: Count = Field(20, description="stop after this many consecutive non-finite updates")

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        if self.profiled and self.profiled[0] > self.updates:
            raise ValueError(f"profile={self.profile} begins after the last update, updates={self.updates}")
        return self

    @property
    def profiled(self) -> range:
        """The updates to profile, counted from 1."""
        return range(*map(int, self.profile.split(":"))) if self.profile is not None else range(0)
