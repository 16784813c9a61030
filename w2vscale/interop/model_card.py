"""The model card (README.md) of an exported model."""

from __future__ import annotations

from pathlib import Path

from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.config import ModelConfig
from w2vscale.files import read_metrics
from w2vscale.objectives import Objective, TransformersHead, build_objective
from w2vscale.version import __version__


def model_card(checkpoint: CheckpointReader) -> str:
    """Return the model card as Markdown, with the metadata block that the Hugging Face Hub reads.

    It has the validation metrics of the run if the checkpoint is still in its folder.
    """
    state, model = checkpoint.state, checkpoint.config.model
    objective = build_objective(checkpoint.config)
    head = objective.transformers_head()
    rows = [
        ("objective", objective.settings.name),
        ("blocks x dim x feed-forward x heads", f"{model.layers} x {model.dim} x {model.ffn_dim} x {model.heads}"),
        ("sampling rate", f"{model.sampling_rate} Hz"),
        ("waveform normalisation", _normalisation(model)),
        *(_training_rows(checkpoint, objective) if state.update else [("origin", state.data or "not recorded")]),
    ]
    table = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows)
    title = "wav2vec 2.0" if head.tensors else "wav2vec 2.0 encoder"
    use = CTC_USE if head.architecture == CTC else ENCODER_USE
    return f"""---
library_name: transformers
tags:
- speech
- audio
- wav2vec2
- w2vscale
---

# {title}, {_origin(checkpoint, objective)} with w2vscale {__version__}

{head.summary}

| | |
| --- | --- |
{table}

```python
{EXAMPLE.format(rate=model.sampling_rate, **use)}
```
{_notes(head)}"""


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


def _training_rows(checkpoint: CheckpointReader, objective: Objective) -> list[tuple[str, str]]:
    state, config, batch = checkpoint.state, checkpoint.config, checkpoint.config.batch
    names = ", ".join(path.name for path in config.data.train)
    started = config.trainer.init_from
    audio = f"{batch.max_seconds * batch.micro_batches:,.0f} s"
    return [
        ("training data", f"{names or 'not recorded'}{f' ({state.data})' * bool(state.data)}"),
        ("started from", "/".join(str(started).rstrip("/").split("/")[-2:]) if started else "random weights"),
        ("updates", f"{state.update:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.1f}"),
        ("maximum audio per update", f"{audio} ({batch.micro_batches} micro-batches of {batch.max_seconds:g} s)"),
        ("peak learning rate", f"{config.optim.lr:g}"),
        *_validation_rows(checkpoint.path.parent.parent / "metrics.jsonl", state.update, objective),
    ]


def _validation_rows(log: Path, update: int, objective: Objective) -> list[tuple[str, str]]:
    """Return table rows with the metrics of the last validation up to `update`, if there is a log of the run."""
    validated = read_metrics(log, "validation") if log.is_file() else []
    found = next((record for record in reversed(validated) if record["update"] <= update), None)
    if found is None:
        return []
    try:
        table = objective.table({key: value for key, value in found.items() if value is not None})
    except KeyError:  # a metric is not finite, or the log is of a version that did not have it
        return []
    return [(f"validation {name}", text) for name, text in table.items()]
