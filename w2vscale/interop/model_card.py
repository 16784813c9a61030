"""The README.md of an exported model, written from the run that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from w2vscale import __version__
from w2vscale.checkpoint.reading import Checkpoint
from w2vscale.config import Config


def model_card(checkpoint: Checkpoint, config: Config, run: Path | None) -> str:
    """Markdown with the metadata that the Hugging Face hub reads; `run` has the metrics, if it is there."""
    state, model, batch = checkpoint.state, config.model, config.batch
    header = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["speech", "audio", "wav2vec2", "pretraining", "w2vscale"]},
        sort_keys=False,
    )
    seconds = batch.max_seconds * batch.micro_batches
    rows = [
        ("updates", f"{state.update:,}"),
        ("hours seen", f"{state.audio_seconds / 3600:,.1f}"),
        (
            "audio per update, at most",
            f"{seconds:,.0f} s ({batch.micro_batches} micro-batches of {batch.max_seconds:g} s)",
        ),
        ("blocks x dim x feed-forward x heads", f"{model.layers} x {model.dim} x {model.ffn_dim} x {model.heads}"),
        ("sampling rate", f"{model.sampling_rate} Hz"),
        ("audio is normalised", "yes" if model.normalize_waveform else "no"),
        ("peak learning rate", f"{config.optim.lr:g}"),
        ("data", ", ".join(Path(path).name for path in config.data.train) or "not recorded"),
    ]
    rows += [(f"validation {key}", f"{value:.4g}") for key, value in _validation(run, state.update).items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{header}---

# wav2vec 2.0, pretrained with w2vscale {__version__}

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


def _validation(run: Path | None, update: int) -> dict[str, float]:
    """Loss, accuracy and code perplexities of the last validation up to `update`."""
    if run is None:
        return {}
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["split"] == "validation" and record["update"] <= update:
            found = record
    wanted = ["contrastive_bits", "accuracy", *(key for key in found if key.startswith("code_perplexity_"))]
    return {key.replace("_", " "): found[key] for key in wanted if found.get(key) is not None}
