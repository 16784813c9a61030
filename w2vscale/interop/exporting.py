"""`w2vscale export`: convert a checkpoint to files that other libraries load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from w2vscale.checkpoint.format import write_safetensors
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.errors import UserError
from w2vscale.files import new_file
from w2vscale.interop.huggingface import huggingface_config, preprocessor_config, to_huggingface
from w2vscale.interop.model_card import model_card
from w2vscale.interop.torchaudio import to_torchaudio, torchaudio_arguments
from w2vscale.objectives import build_objective
from w2vscale.optim.canonical import specs_of

FORMATS = ("huggingface", "torchaudio")


class Exported(NamedTuple):
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
    `model.json`, and `preprocessor_config.json` as above. Of the heads, only a CTC output layer is kept.

    Raises UserError if the checkpoint cannot be used, the format does not support the model, or a file already exists
    or cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(path, log)
    config = checkpoint.config
    state = checkpoint.model_tensors()
    documents: dict[str, Mapping[str, Any]]
    if form == "huggingface":
        weights = to_huggingface(state, config)
        tokenizer = build_objective(config).transformers_head().files
        preprocessor = preprocessor_config(config.model, tokenizer=bool(tokenizer))
        documents = {"config.json": huggingface_config(config), "preprocessor_config.json": preprocessor, **tokenizer}
    else:
        weights = to_torchaudio(state, config)
        preprocessor = preprocessor_config(config.model)
        documents = {"model.json": torchaudio_arguments(config), "preprocessor_config.json": preprocessor}
    texts = {output / name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
    if form == "huggingface":
        texts[output / "README.md"] = model_card(checkpoint)
    files = [output / "model.safetensors", *texts]
    if existing := [file for file in files if file.exists()]:
        raise UserError(f"{existing[0]}: exists; choose another folder")
    with ExitStack() as together:
        for file, text in texts.items():
            together.enter_context(new_file(file)).write(text)
        write_safetensors(together.enter_context(new_file(files[0], "wb")), specs_of(weights), weights.values())
    return Exported(files, checkpoint.state.update)
