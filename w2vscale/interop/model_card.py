"""The README.md of an exported model, written from the run that made it."""

from __future__ import annotations

from pathlib import Path

import yaml

from w2vscale import __version__
from w2vscale.checkpoint.reading import Checkpoint, TrainState
from w2vscale.config import Config
from w2vscale.evaluation.report import read_metrics


def model_card(checkpoint: Checkpoint, config: Config, run: Path | None) -> str:
    """Markdown with the metadata that the Hugging Face hub reads; `run` has the metrics, if it is there."""
    state, model = checkpoint.state, config.model
    header = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["speech", "audio", "wav2vec2", "pretraining", "w2vscale"]},
        sort_keys=False,
    )
    trained = state.update > 0
    rows = [
        ("blocks x dim x feed-forward x heads", f"{model.layers} x {model.dim} x {model.ffn_dim} x {model.heads}"),
        ("sampling rate", f"{model.sampling_rate} Hz"),
        ("audio is normalised", "yes" if model.normalize_waveform else "no"),
        *(_training_rows(state, config, run) if trained else [("origin", state.data or "not recorded")]),
    ]
    table = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows)
    return f"""---
{header}---

# wav2vec 2.0, {"pretrained" if trained else "converted"} with w2vscale {__version__}

A model that learned from audio without transcripts, by contrastive prediction of masked speech ([Baevski et al.
2020](https://arxiv.org/abs/2006.11477)). It has no output layer for text: fine-tune it, or use its hidden states.

| | |
| --- | --- |
{table}

```python
import torch
from transformers import AutoFeatureExtractor, Wav2Vec2Model

extractor = AutoFeatureExtractor.from_pretrained("PATH")
model = Wav2Vec2Model.from_pretrained("PATH").eval()
waveform = torch.zeros({model.sampling_rate}).numpy()
inputs = extractor(waveform, sampling_rate={model.sampling_rate}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state  # [1, frames, {model.dim}]
```

`Wav2Vec2ForPreTraining` has the quantizer and the projections, too.
"""


def _training_rows(state: TrainState, config: Config, run: Path | None) -> list[tuple[str, str]]:
    batch = config.batch
    seconds = batch.max_seconds * batch.micro_batches
    names = ", ".join(Path(path).name for path in config.data.train)
    started = config.trainer.init_from
    return [
        ("training data", f"{names or 'not recorded'}{f' ({state.data})' * bool(state.data)}"),
        ("started from", f"{started.parent.name}/{started.name}" if started else "random weights"),
        ("updates", f"{state.update:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.1f}"),
        (
            "audio per update, at most",
            f"{seconds:,.0f} s ({batch.micro_batches} micro-batches of {batch.max_seconds:g} s)",
        ),
        ("peak learning rate", f"{config.optim.lr:g}"),
        *_validation_rows(run, state.update),
    ]


def _validation_rows(run: Path | None, update: int) -> list[tuple[str, str]]:
    """Loss, accuracy and code perplexities of the last validation up to `update`."""
    records = read_metrics(run / "metrics.jsonl", "validation") if run is not None else []
    found = next((record for record in reversed(records) if record["update"] <= update), {})
    wanted = ["contrastive_bits", "accuracy", *(key for key in found if key.startswith("code_perplexity_"))]
    return [
        (f"validation {key.replace('_', ' ')}", f"{found[key]:.4g}") for key in wanted if found.get(key) is not None
    ]
