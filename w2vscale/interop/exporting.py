"""`w2vscale export`: convert a checkpoint to files that other libraries load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.config import Config
from w2vscale.errors import UserError
from w2vscale.interop.huggingface import huggingface_config, preprocessor_config, to_huggingface
from w2vscale.interop.model_card import model_card
from w2vscale.interop.torchaudio import to_torchaudio, torchaudio_arguments
from w2vscale.objectives import build_objective

FORMATS = ("huggingface", "torchaudio")


@dataclass(frozen=True)
class Exported:
    """The files written, and the update of the exported checkpoint."""

    files: list[Path]
    update: int


def export_checkpoint(
    path: Path, output: Path, *, form: str, log: Callable[[str], None] = lambda text: None
) -> Exported:
    """Export a checkpoint, or the newest usable one of a run, to the folder `output`.

    huggingface: `model.safetensors`, `config.json`, `preprocessor_config.json` and the model card `README.md`. A
    fine-tuned model also gets the tokenizer files `vocab.json` and `tokenizer_config.json`.
    torchaudio: `model.safetensors` with the `state_dict` of `torchaudio.models.wav2vec2_model`, its arguments in
    `model.json`, and `preprocessor_config.json` as above. The quantizer and the projections are left out.

    Raises:
        UserError: the checkpoint cannot be used, the format does not support the model, or a file already exists or
            cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(path, log)
    config = checkpoint.config
    state = checkpoint.model_tensors()
    texts: dict[str, str]
    if form == "huggingface":
        weights = to_huggingface(state, config)
        files = build_objective(config).transformers_head().files
        texts = {
            "config.json": _json(huggingface_config(config)),
            "preprocessor_config.json": _json(preprocessor_config(config.model, tokenizer=bool(files))),
            **{name: _json(document) for name, document in files.items()},
            "README.md": model_card(checkpoint, config, _run_folder(checkpoint)),
        }
    else:
        weights = to_torchaudio(state, config)
        texts = {
            "model.json": _json(torchaudio_arguments(config)),
            "preprocessor_config.json": _json(preprocessor_config(config.model)),
        }
    written = _write(output, weights, texts, checkpoint, config)
    return Exported(written, checkpoint.state.update)


def _write(
    output: Path, weights: dict[str, Tensor], texts: dict[str, str], checkpoint: CheckpointReader, config: Config
) -> list[Path]:
    files = [output / name for name in ("model.safetensors", *texts)]
    if existing := [file for file in files if file.exists()]:
        raise UserError(f"{existing[0]}: exists; choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=output) as folder:
            written = [Path(folder) / file.name for file in files]
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, written[0], {"format": "pt"})
            for path, text in zip(written[1:], texts.values(), strict=True):
                path.write_text(text, encoding="utf-8")
            shutil.copymode(written[1], written[0])  # safetensors creates files that only the owner can read
            for path, file in zip(written, files, strict=True):
                path.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return files


def _run_folder(checkpoint: CheckpointReader) -> Path | None:
    """Return the folder of the run, if the checkpoint is still in it."""
    folder = checkpoint.path.parent.parent
    return folder if (folder / "metrics.jsonl").is_file() else None


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
