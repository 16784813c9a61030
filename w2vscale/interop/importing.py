"""`w2vscale import`: another library's model as a canonical checkpoint to start from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from w2vscale.checkpoint.reading import TrainState
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, ModelConfig, dump_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.interop.fairseq import from_fairseq, load_fairseq
from w2vscale.interop.huggingface import from_huggingface, model_config
from w2vscale.models.wav2vec2 import Wav2Vec2ForPretraining

FORMATS = ("huggingface", "fairseq")


@dataclass(frozen=True)
class Imported:
    """The checkpoint that was written."""

    checkpoint: Path
    parameters: int


def import_checkpoint(
    source: Path, output: Path, *, form: str, log: Callable[[str], None] = lambda text: None
) -> Imported:
    """Write `output`/checkpoints/update_00000000 with the weights and settings of `source`, without optimizer state.

    huggingface: a folder with `config.json` and `model.safetensors` (or shards of it, or `pytorch_model.bin`).
    fairseq: a `.pt` file. Nothing in either is ever executed.

    Raises:
        UserError: the source cannot be read, or w2vscale has no such model.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    if (output / "checkpoints").exists():
        raise UserError(f"{output / 'checkpoints'}: exists; choose another folder")
    if form == "huggingface":
        model, state = read_huggingface(source)
    else:
        state, settings = from_fairseq(load_fairseq(source))
        model = ModelConfig.model_validate(settings)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in Wav2Vec2ForPretraining(model, torch.float32).named_parameters()}
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise UserError(f"{source}: {name} is {list(state[name].shape)}, its settings say {list(shape)}")
    store = CheckpointStore(output / "checkpoints", Ranks(), keep_last=1, keep_every=0, asynchronous=False, log=log)
    tensors = {f"model.{name}": state[name].float() for name in wanted}
    origin = TrainState(data=f"imported from {source.name} ({form})")
    path = store.save(tensors, origin, dump_config(Config(model=model)))
    return Imported(path, sum(tensor.numel() for tensor in tensors.values()))


def read_huggingface(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Settings and weights, by our names, of a folder that `save_pretrained` wrote."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; download the model first, e.g. with: hf download")
    document = _read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    try:
        model = model_config(document, _read_json(preprocessor) if preprocessor.is_file() else {})
        return model, from_huggingface(_read_weights(folder), model)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    state: dict[str, Tensor] = {}
    try:
        for name in names:
            if (folder / name).is_file():
                state |= load_file(folder / name)
            elif (folder / "pytorch_model.bin").is_file():
                return read_pickle(folder / "pytorch_model.bin")
            else:
                raise UserError(f"no {name} in it")
    except SafetensorError as error:
        raise UserError(f"{name} cannot be read: {error}") from None
    return state


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote; anything else in it is refused, not executed."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+) w(?:as not|hose)", str(error))
        reason = f"it names {refused[1]}, which could run code" if refused else "it is damaged, or no file of PyTorch's"
        raise UserError(f"{path.name} is refused: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path.name} does not hold tensors by name")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not an object")
    return document
