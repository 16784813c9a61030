"""The model card (README.md) of an exported model."""

from __future__ import annotations

from pathlib import Path

from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.data.transcripts import PIECE_SPACE
from w2vscale.errors import UserError
from w2vscale.files import read_records
from w2vscale.objectives import build_objective
from w2vscale.version import __version__


def model_card(checkpoint: CheckpointReader) -> str:
    """Return the model card as Markdown, with the metadata block that the Hugging Face Hub reads.

    It has the validation metrics of the run if the checkpoint is still in its folder.
    """
    state, config, model = checkpoint.state, checkpoint.config, checkpoint.config.model
    trained = state.update > 0
    rows = [
        ("blocks x dim x feed-forward x heads", f"{model.layers} x {model.dim} x {model.ffn_dim} x {model.heads}"),
        ("sampling rate", f"{model.sampling_rate} Hz"),
        ("waveform normalisation", "yes" if model.normalize_waveform else "no"),
        *(_training_rows(checkpoint) if trained else [("origin", state.data or "not recorded")]),
    ]
    table = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows)
    vocabulary = build_objective(config).vocabulary
    fine_tuned = bool(vocabulary)
    of_pieces = any(PIECE_SPACE in symbol for symbol in vocabulary)
    made = ("fine-tuned" if fine_tuned else "pretrained") if trained else "converted"
    return f"""---
library_name: transformers
tags:
- speech
- audio
- wav2vec2
- w2vscale
---

# wav2vec 2.0, {made} with w2vscale {__version__}

{CTC_SUMMARY if fine_tuned else PRETRAINING_SUMMARY}

| | |
| --- | --- |
{table}

```python
{EXAMPLE.format(rate=model.sampling_rate, **(CTC_USE if fine_tuned else ENCODER_USE))}
```
{PIECES if of_pieces else "" if fine_tuned else MORE}"""


PRETRAINING_SUMMARY = """A speech model pretrained on audio without transcripts, by contrastive prediction of masked
speech ([Baevski et al. 2020](https://arxiv.org/abs/2006.11477)). It has no output layer for text: fine-tune it, or use
its hidden states."""

CTC_SUMMARY = """A speech recognition model: pretrained on audio by contrastive prediction of masked speech
([Baevski et al. 2020](https://arxiv.org/abs/2006.11477)), then fine-tuned on transcripts with connectionist temporal
classification (CTC)."""

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

ENCODER_USE = {
    "processor": "AutoFeatureExtractor",
    "model": "Wav2Vec2Model",
    "result": "print(outputs.last_hidden_state.shape)  # [1, frames, width of the transformer]",
}
CTC_USE = {
    "processor": "AutoProcessor",
    "model": "Wav2Vec2ForCTC",
    "result": "print(processor.batch_decode(outputs.logits.argmax(dim=-1))[0])",
}

MORE = """
To load the quantizer and the projections as well, use `Wav2Vec2ForPreTraining`.
"""

PIECES = """
The tokenizer converts labels to text, but not text to labels. A label is the id in the SentencePiece model + 1.
"""


def _training_rows(checkpoint: CheckpointReader) -> list[tuple[str, str]]:
    state, config, batch = checkpoint.state, checkpoint.config, checkpoint.config.batch
    names = ", ".join(Path(path).name for path in config.data.train)
    started = config.trainer.init_from
    audio = f"{batch.max_seconds * batch.micro_batches:,.0f} s"
    return [
        ("training data", f"{names or 'not recorded'}{f' ({state.data})' * bool(state.data)}"),
        ("started from", f"{started.parent.name}/{started.name}" if started else "random weights"),
        ("updates", f"{state.update:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.1f}"),
        ("maximum audio per update", f"{audio} ({batch.micro_batches} micro-batches of {batch.max_seconds:g} s)"),
        ("peak learning rate", f"{config.optim.lr:g}"),
        *_validation_rows(checkpoint.path.parent.parent / "metrics.jsonl", state.update),
    ]


def _validation_rows(log: Path, update: int) -> list[tuple[str, str]]:
    """Return table rows with the metrics of the last validation up to `update`, if there is a log of the run."""
    try:
        records = read_records(log) if log.is_file() else []
    except OSError as error:
        raise UserError(f"{log}: cannot be read: {error.strerror}") from None
    validated = (record for record in reversed(records) if record.get("split") == "validation")
    found = next((record for record in validated if record["update"] <= update), dict[str, float]())
    perplexities = [key for key in found if key.startswith("code_perplexity_")]
    keys = ["label_error_rate", "contrastive_bits", "accuracy", *perplexities]
    return [(f"validation {key.replace('_', ' ')}", f"{found[key]:.4g}") for key in keys if found.get(key) is not None]
