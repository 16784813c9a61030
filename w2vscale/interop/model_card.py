"""The model card (README.md) of an exported model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.config import ModelConfig
from w2vscale.config.yaml_1_2 import dump_yaml
from w2vscale.errors import UserError, counted
from w2vscale.files import read_metrics
from w2vscale.objectives import Objective, TransformersHead, build_objective
from w2vscale.version import __version__


class ErrorRates(NamedTuple):
    """The error rates of the model on a test set, as fractions with their 95 % confidence intervals."""

    dataset: str
    decoding: str  # in a few words, such as "greedy"
    utterances: int
    wer: float
    cer: float
    word_interval: tuple[float, float]
    character_interval: tuple[float, float]


@dataclass(frozen=True)
class CardDetails:
    """What a card says and a checkpoint does not know. Raises UserError if a value is not an identifier."""

    license: str | None = None  # an identifier of the Hub, such as apache-2.0 or other
    languages: Sequence[str] = ()  # codes of ISO 639, such as de

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise UserError(
                f"--license {self.license}: not an identifier of a licence on the Hugging Face Hub; write it in lower "
                "case, as in apache-2.0, or use other"
            )
        for language in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", language):
                raise UserError(f"--language {language}: not a code of ISO 639, such as de or deu")


def model_card(
    checkpoint: CheckpointReader,
    details: CardDetails | None = None,
    error_rates: Sequence[ErrorRates] = (),
    *,
    weights: str | None = None,
    onnx: bool = False,
) -> str:
    """Return the model card as Markdown, with the metadata block that the Hugging Face Hub reads.

    It has the validation metrics of the run if the checkpoint is still in its folder and they are of these weights:
    "ema" or "raw", see `CheckpointReader.stored_names`. `onnx`: the files are those of the format onnx, not of
    Transformers.
    """
    state, model = checkpoint.state, checkpoint.config.model
    objective = build_objective(checkpoint.config)
    # A graph has no head but an output layer for text, and may be of a model that Transformers does not have.
    head = TransformersHead() if onnx and not objective.vocabulary else objective.transformers_head()
    rows = [
        ("objective", objective.settings.name),
        ("blocks x dim x feed-forward x heads", f"{model.layers} x {model.dim} x {model.ffn_dim} x {model.heads}"),
        ("sampling rate", f"{model.sampling_rate} Hz"),
        ("waveform normalisation", "by the graph" if onnx and model.normalize_waveform else _normalisation(model)),
        *(_training_rows(checkpoint, objective, weights) if state.update else [_origin_row(state)]),
    ]
    title = "wav2vec 2.0" if head.tensors else "wav2vec 2.0 encoder"
    metadata = _metadata(checkpoint, objective, details or CardDetails(), error_rates, onnx=onnx)
    return f"""---
{dump_yaml(metadata, sort_keys=False, allow_unicode=True)}---

# {title}, {_origin(checkpoint, objective)} with w2vscale {__version__}

{head.summary}

{_table(("", ""), rows)}
{_results(error_rates)}
```python
{_example(model, objective, onnx=onnx)}
```
{"" if onnx else _notes(head)}"""


def _metadata(
    checkpoint: CheckpointReader,
    objective: Objective,
    details: CardDetails,
    error_rates: Sequence[ErrorRates],
    *,
    onnx: bool,
) -> dict[str, Any]:
    """Return what the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    metadata: dict[str, Any] = {}
    if details.languages:
        metadata["language"] = list(details.languages)
    if details.license is not None:
        metadata["license"] = details.license
    metadata["library_name"] = "onnx" if onnx else "transformers"
    if objective.vocabulary:
        metadata["pipeline_tag"] = RECOGNITION
    metadata["tags"] = ["speech", "audio", "wav2vec2", "w2vscale"]
    if error_rates:
        by_dataset = groupby(sorted(error_rates, key=lambda one: one.dataset), key=lambda one: one.dataset)
        results = [_result(dataset, list(found)) for dataset, found in by_dataset]
        metadata["model-index"] = [{"name": checkpoint.path.parent.parent.name or "model", "results": results}]
    return metadata


def _result(dataset: str, found: Sequence[ErrorRates]) -> dict[str, Any]:
    """Return the results on one dataset, as entry of a model index, in percent."""
    return {
        "task": {"type": RECOGNITION, "name": "Automatic Speech Recognition"},
        "dataset": {"type": dataset, "name": dataset},
        "metrics": [
            {"type": kind, "value": round(100.0 * rate, 2), "name": f"{kind.upper()} (%), {one.decoding}"}
            for one in found
            for kind, rate in (("wer", one.wer), ("cer", one.cer))
        ],
    }


def _results(error_rates: Sequence[ErrorRates]) -> str:
    """Return a section with a table of the error rates, if there are any."""
    if not error_rates:
        return ""
    rows = [
        (
            one.dataset,
            one.decoding,
            f"{one.utterances:,}",
            f"{one.wer:.2%} ({one.word_interval[0]:.2%} to {one.word_interval[1]:.2%})",
            f"{one.cer:.2%} ({one.character_interval[0]:.2%} to {one.character_interval[1]:.2%})",
        )
        for one in error_rates
    ]
    return f"\n## Error rates\n\n{_table(('test set', 'decoding', 'utterances', 'WER (95 %)', 'CER (95 %)'), rows)}\n"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(heading)
    lines = [heading, rule, *([cell.replace("|", "&#124;") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


EXAMPLE = """# pip install transformers torch soundfile
import soundfile
import torch
from transformers import {processor}, {model}

folder = "."  # this folder, or its name on the Hugging Face Hub
processor = {processor}.from_pretrained(folder)
model = {model}.from_pretrained(folder).eval()
waveform, rate = soundfile.read("speech.wav", dtype="float32")  # your audio: mono, {rate} Hz
inputs = processor(waveform, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
{result}"""

ONNX_EXAMPLE = """# pip install onnxruntime soundfile
import numpy
import onnxruntime
import soundfile

session = onnxruntime.InferenceSession("model.onnx")
waveform, rate = soundfile.read("speech.wav", dtype="float32")  # your audio: mono, {rate} Hz
inputs = {{"waveforms": waveform[None], "lengths": numpy.array([len(waveform)])}}
{result}"""
ONNX_ENCODER = """hidden, frames = session.run(None, inputs)
print(hidden.shape)  # (1, frames, width of the transformer)"""
ONNX_CTC = """hidden, frames, logits = session.run(None, inputs)
symbols = open("vocabulary.txt", encoding="utf-8").read().split("\\n")
best = logits[0].argmax(axis=1)
changes = best[numpy.diff(best, prepend=-1) != 0]  # without repetitions
print({space!r}.join(symbols[label] for label in changes if label != 0).replace("|", " ").replace("▁", " "))"""

RECOGNITION = "automatic-speech-recognition"
ENCODER = "Wav2Vec2Model"
CTC = "Wav2Vec2ForCTC"
ENCODER_USE = {
    "processor": "AutoFeatureExtractor",
    "model": ENCODER,
    "result": "print(outputs.last_hidden_state.shape)  # [1, frames, width of the transformer]",
}
CTC_USE = {
    "processor": "AutoProcessor",
    "model": CTC,
    "result": "print(processor.batch_decode(outputs.logits.argmax(dim=-1))[0])",
}


def _example(model: ModelConfig, objective: Objective, *, onnx: bool) -> str:
    if not onnx:
        use = CTC_USE if objective.transformers_head().architecture == CTC else ENCODER_USE
        return EXAMPLE.format(rate=model.sampling_rate, **use)
    result = ONNX_CTC.format(space=" " * objective.spaced) if objective.vocabulary else ONNX_ENCODER
    return ONNX_EXAMPLE.format(rate=model.sampling_rate, result=result)


def _normalisation(model: ModelConfig) -> str:
    if not model.normalize_waveform:
        return "no"
    differs = model.waveform_eps != ModelConfig().waveform_eps
    return "yes" + differs * f"; {model.waveform_eps:g} was added to the variance, and Transformers adds 1e-07"


def _origin(checkpoint: CheckpointReader, objective: Objective) -> str:
    if checkpoint.state.update == 0:
        return "converted"
    if not objective.vocabulary:
        return "pretrained"
    return "fine-tuned" if checkpoint.config.trainer.init_from else "trained"


def _notes(head: TransformersHead) -> str:
    """Return what a user of the example has to know besides."""
    if head.architecture == CTC:
        return head.note and f"\n{head.note}\n"
    if head.architecture == ENCODER:
        return ""
    modules = dict.fromkeys(f"`{name.partition('.')[0]}`" for name in head.tensors.values())
    return f"\nTo load the heads as well ({', '.join(modules)}), use `{head.architecture}`.\n"


def _origin_row(state: TrainState) -> tuple[str, str]:
    return "origin", state.data or "not recorded"


def _training_rows(checkpoint: CheckpointReader, objective: Objective, weights: str | None) -> list[tuple[str, str]]:
    state, config, batch = checkpoint.state, checkpoint.config, checkpoint.config.batch
    names = ", ".join(path.name for path in config.data.train)
    started = config.trainer.init_from
    validated = checkpoint.weights_read()  # by the run
    audio = f"{batch.max_seconds * batch.micro_batches:,.0f} s"
    return [
        ("training data", f"{names or 'not recorded'}{f' ({state.data})' * bool(state.data)}"),
        ("started from", "/".join(str(started).rstrip("/").split("/")[-2:]) if started else "random weights"),
        ("updates", f"{state.update:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.1f}"),
        (
            "maximum audio per update",
            f"{audio} ({counted(batch.micro_batches, 'micro-batch')} of {batch.max_seconds:g} s)",
        ),
        ("peak learning rate", f"{config.optim.lr:g}"),
        *([("weights", checkpoint.describe_weights(weights))] if checkpoint.has_average else []),
        *(_validation_rows(checkpoint, objective) if checkpoint.weights_read(weights) == validated else []),
    ]


def _validation_rows(checkpoint: CheckpointReader, objective: Objective) -> list[tuple[str, str]]:
    """Return table rows with the metrics of the last validation up to the checkpoint, if there is a log of the run."""
    log, update = checkpoint.path.parent.parent / "metrics.jsonl", checkpoint.state.update
    validated = read_metrics(log, "validation") if log.is_file() else []
    found = next((record for record in reversed(validated) if record["update"] <= update), None)
    if found is None:
        return []
    try:
        table = objective.table({key: value for key, value in found.items() if value is not None})
    except KeyError:  # a metric is not finite, or the log is of a version that did not have it
        return []
    return [(f"validation {name}", text) for name, text in table.items()]
