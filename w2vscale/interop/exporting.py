"""`w2vscale export`: convert a checkpoint to files that other libraries load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from w2vscale.checkpoint.lazy import LazyTensor, counted_reads
from w2vscale.checkpoint.new_folder import new_folder
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.checkpoint.safetensors_file import write_safetensors
from w2vscale.data.sentence_pieces import label_of_first, open_pieces
from w2vscale.errors import UserError
from w2vscale.interop.fairseq2 import to_fairseq2
from w2vscale.interop.fairseq2_card import MODEL, asset_card
from w2vscale.interop.huggingface import huggingface_config, preprocessor_config, to_huggingface
from w2vscale.interop.model_card import CardDetails, ErrorRates, model_card
from w2vscale.interop.names import own_settings
from w2vscale.interop.onnx import describe, require_onnx, write_onnx
from w2vscale.interop.torch_zip import write_torch_zip
from w2vscale.interop.torchaudio import to_torchaudio, torchaudio_arguments
from w2vscale.objectives import Objective, build_objective
from w2vscale.optim.canonical import specs_of

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
SHARD_BYTES = 5 * 10**9  # the largest file of weights for Transformers, as `save_pretrained` had it for years

Progress = Callable[[int, int], None]
Log = Callable[[str], None]
ErrorRatesOf = Callable[[CheckpointReader, str], Sequence[ErrorRates]]
"""Of a checkpoint and its weights, "ema" or "raw"."""


class Exported(NamedTuple):
    """The files written, and the update of the exported checkpoint."""

    files: list[Path]
    update: int


class Export(NamedTuple):
    """An export in progress."""

    checkpoint: CheckpointReader
    state: Mapping[str, LazyTensor]  # the tensors of the model
    folder: Path  # to write to
    card: str  # the model card, for formats that have one
    log: Log


def export_checkpoint(
    path: Path,
    output: Path,
    *,
    form: str,
    weights: str | None = None,
    details: CardDetails | None = None,
    error_rates: ErrorRatesOf = lambda checkpoint, weights: (),
    progress: Progress = lambda done, total: None,
    log: Log = lambda text: None,
) -> Exported:
    """Export a checkpoint, or the newest usable one of a run, to the folder `output`.

    huggingface: `model.safetensors` (above 5 GB in several files with an index), `config.json`,
    `preprocessor_config.json` and the model card `README.md`. A fine-tuned model also gets the tokenizer files
    `vocab.json` and `tokenizer_config.json`.
    fairseq2: `model.pt` and its asset card `card.yaml`. A fine-tuned model also gets its SentencePiece model
    `tokenizer.model`, or, without one, its symbols in `vocabulary.txt`.
    torchaudio: `model.safetensors` with the `state_dict` of `torchaudio.models.wav2vec2_model`, its arguments in
    `model.json`, and `preprocessor_config.json` as above. Of the heads, only a CTC output layer is kept.
    onnx: `model.onnx` (above 2 GB with its weights in `model.onnx.data`), its description `model.json`, the symbols of
    an output layer in `vocabulary.txt`, and the model card.

    `weights` is "ema" or "raw": see `CheckpointReader.stored_names`.
    Holds one tensor at a time, except for onnx. The folder appears when it is complete. The model card has `details`
    and `error_rates` of the checkpoint. `progress` is called with the bytes that were read so far and those of all
    tensors.

    Raises UserError if the checkpoint cannot be used, the format does not support the model or has no card for the
    details, or `output` cannot be written or is not an empty folder.
    """
    if form not in WRITERS:
        raise UserError(f"--format {form}: choose one of {', '.join(WRITERS)}")
    if details is not None and form not in WITH_CARD:
        raise UserError(f"--format {form}: has no model card for --license and --language; {CHOOSE}")
    if form == "onnx":
        require_onnx()
    checkpoint = open_checkpoint(path, log)
    state = checkpoint.model_tensors(weights)
    if checkpoint.has_average:
        log(f"exporting the {checkpoint.describe_weights(weights)}")
    size = sum(tensor.bytes for tensor in state.values())
    card = ""
    if form in WITH_CARD:
        rates = error_rates(checkpoint, checkpoint.weights_read(weights))
        card = model_card(checkpoint, details, rates, weights=weights, onnx=form == "onnx")
    with new_folder(output, size=size, log=log) as folder:
        WRITERS[form](Export(checkpoint, counted_reads(state, progress), folder, card, log))
        names = sorted(file.name for file in folder.iterdir())
    return Exported([output / name for name in names], checkpoint.state.update)


def _write_huggingface(export: Export) -> None:
    config, folder = export.checkpoint.config, export.folder
    tokenizer = build_objective(config).transformers_head().files
    weights = to_huggingface(export.state, config)
    _write_json(folder / "config.json", huggingface_config(config))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(config.model, tokenizer=bool(tokenizer)))
    for name, document in tokenizer.items():
        _write_json(folder / name, document)
    (folder / "README.md").write_text(export.card, encoding="utf-8")
    shards = list(_sharded(weights))
    if len(shards) == 1:
        _write_weights(folder / WEIGHTS, weights)
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_weights(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensor in weights.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    _write_json(folder / f"{WEIGHTS}.index.json", index)


def _write_torchaudio(export: Export) -> None:
    config, folder = export.checkpoint.config, export.folder
    _write_json(folder / "model.json", torchaudio_arguments(config))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(config.model))
    _write_weights(folder / WEIGHTS, to_torchaudio(export.state, config))


def _write_onnx(export: Export) -> None:
    config, folder = export.checkpoint.config, export.folder
    write_onnx(folder, export.state, config, export.log)
    _write_json(folder / "model.json", describe(config))
    if vocabulary := build_objective(config).vocabulary:
        _write_vocabulary(vocabulary, folder)
    (folder / "README.md").write_text(export.card, encoding="utf-8")


def _write_fairseq2(export: Export) -> None:
    checkpoint, folder = export.checkpoint, export.folder
    config = checkpoint.config
    weights = to_fairseq2(export.state, config, update=checkpoint.state.update)
    tokenizer = None
    if (objective := build_objective(config)).vocabulary:
        tokenizer = _write_symbols(objective, folder, export.log)
    card = asset_card(config, name=checkpoint.path.parent.parent.name, tokenizer=tokenizer)
    (folder / "card.yaml").write_text(card, encoding="utf-8")
    write_torch_zip(folder / MODEL, weights, w2vscale=json.dumps(own_settings(config)))


def _write_symbols(objective: Objective, folder: Path, log: Log) -> str | None:
    """Write the symbols of an output layer. Returns the name of the SentencePiece model for fairseq2, or None.

    Labels of fairseq2 are the ids of its SentencePiece model. A model with other labels gets a list of its symbols.
    """
    pieces: Path | None = getattr(objective.settings, "sentencepiece", None)
    content = None
    try:
        if pieces is not None and label_of_first(open_pieces(pieces), objective.vocabulary) == 0:
            content = pieces.read_bytes()
    except (UserError, OSError) as error:
        log(f"without {TOKENIZER}: {error}")
    if content is not None:
        (folder / TOKENIZER).write_bytes(content)
        return TOKENIZER
    _write_vocabulary(objective.vocabulary, folder)
    return None


def _write_vocabulary(symbols: Sequence[str], folder: Path) -> None:
    (folder / "vocabulary.txt").write_text("\n".join(symbols) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Export], None]] = {
    "huggingface": _write_huggingface,
    "fairseq2": _write_fairseq2,
    "torchaudio": _write_torchaudio,
    "onnx": _write_onnx,
}
WITH_CARD = ("huggingface", "onnx")
"""The formats with a model card, which the Hugging Face Hub shows."""
CHOOSE = f"choose {' or '.join(WITH_CARD)}"


def _sharded(weights: Mapping[str, LazyTensor]) -> Iterator[dict[str, LazyTensor]]:
    """Split weights, in their order, into parts of at most SHARD_BYTES, or of one tensor."""
    shard: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        if shard and sum(each.bytes for each in shard.values()) + tensor.bytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _write_weights(path: Path, weights: Mapping[str, LazyTensor]) -> None:
    with path.open("wb") as file:
        write_safetensors(file, specs_of(weights), (tensor.whole() for tensor in weights.values()))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
