"""`w2vscale import`: convert a model of another library to a checkpoint to start from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import LazyTensor, counted_reads
from w2vscale.checkpoint.lock import locked
from w2vscale.checkpoint.new_folder import folder_for_one
from w2vscale.checkpoint.safetensors_file import DTYPES
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, ObjectiveConfig, dump_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, new_file
from w2vscale.interop.fairseq import from_fairseq
from w2vscale.interop.fairseq2 import from_fairseq2
from w2vscale.interop.fairseq_file import is_fairseq2, load_fairseq, mapped, read_pickle
from w2vscale.interop.huggingface import ctc_config, from_huggingface, pretraining_config
from w2vscale.interop.names import errors_naming
from w2vscale.objectives import build_objective
from w2vscale.objectives.ctc import PHONE_TOKENIZER

FORMATS = ("auto", "huggingface", "fairseq", "fairseq2")
TOKENIZER = "tokenizer.model"  # in the folder of an import: the SentencePiece model of its symbols


class Imported(NamedTuple):
    """The checkpoint written, and its number of parameters."""

    checkpoint: Path
    parameters: int


def import_checkpoint(
    source: Path,
    output: Path,
    *,
    form: str = "auto",
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Imported:
    """Write `output`/checkpoints/update_00000000 with the weights and settings of `source`, without optimizer state.

    huggingface: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, sharded or not.
    fairseq, fairseq2: a `.pt` file. The symbols of a CTC model are in the file `tokenizer`, by default the one beside
    it: a dictionary of fairseq, or a SentencePiece model, which is copied to `output`. auto: see `form_of`. No code in
    these files is executed.

    Holds one tensor at a time. If it is killed, repeat it: what it had written is replaced.
    Raises UserError if the source cannot be read, or w2vscale does not support the model.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    folder = folder_for_one(output)
    if form == "auto":
        form = form_of(source) or ("fairseq" if source.suffix in (".pt", ".pth") else "huggingface")
    config, state = read_model(source, form, log, tokenizer=tokenizer)
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    origin = TrainState(data=f"imported from {source.name} ({form})")
    pieces, copy = config.objective.model_dump().get("sentencepiece"), output.absolute() / TOKENIZER
    if pieces is not None:
        objective = ObjectiveConfig(**config.objective.model_dump() | {"sentencepiece": copy})
        config = config.model_copy(update={"objective": objective})
    expected = expected_of(config, optimizer=False)
    with locked(output, log, of_a_run=False):
        folder = folder_for_one(output)  # another process may have written one
        store = CheckpointStore(folder, Ranks(), expected=expected, log=log)
        try:
            with _copied(pieces, copy):
                path = store.save(counted_reads(tensors, progress), origin, dump_config(config))
        except UserError:
            with suppress(OSError):  # it is deleted only if it is empty
                folder.rmdir()
            raise
    return Imported(path, sum(math.prod(tensor.shape) for tensor in tensors.values()))


def form_of(path: Path) -> str | None:
    """Guess the format of a model from its path and the names of its tensors; None if it looks like none of them."""
    if (path / "config.json").is_file():
        return "huggingface"
    if path.is_file() and path.suffix not in (".bin", ".safetensors"):  # those are in folders of Transformers
        return "fairseq2" if is_fairseq2(path) else "fairseq"
    return None


def read_model(
    source: Path, form: str, log: Callable[[str], None] = lambda text: None, *, tokenizer: Path | None = None
) -> tuple[Config, dict[str, LazyTensor]]:
    """Open a model of another library: its settings, and its weights by our names in fp32; see `import_checkpoint`.

    Reading a weight raises UserError if it has values that are not finite.
    """
    if form == "huggingface":
        config, state = _read_huggingface(source, log)
    elif form == "fairseq2":
        config, state = from_fairseq2(load_fairseq(source), tokenizer, log)
    else:
        config, state = from_fairseq(load_fairseq(source), tokenizer)
    if tokenizer is not None and (form == "huggingface" or not build_objective(config).vocabulary):
        raise UserError(
            f"--tokenizer={tokenizer}: {source} is not a CTC model of fairseq or fairseq2; leave out --tokenizer"
        )

    def checked(name: str) -> Callable[[Tensor], Tensor]:
        def check(rows: Tensor) -> Tensor:
            if rows.is_meta or not rows.isfinite().all():
                raise UserError(f"{source}: {name} has no values, or values that are not finite")
            return rows

        return check

    return config, {name: tensor.map(checked(name)) for name, tensor in state.items()}


@contextmanager
def _copied(pieces: Path | None, copy: Path) -> Iterator[None]:
    """Copy a SentencePiece model, if there is one. The copy is deleted if the block fails."""
    if pieces is None:
        yield
        return
    try:
        content = pieces.read_bytes()
        there = copy.is_file() and copy.read_bytes() == content
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if there:
        yield
        return
    if copy.exists():
        raise UserError(f"{copy}: exists and is another file than {pieces}; choose another folder")
    for left in copy.parent.glob(f".{copy.name}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    with new_file(copy, "wb", durable=True) as file:
        file.write(content)
    try:
        yield
    except BaseException:
        copy.unlink()
        raise


def _read_huggingface(folder: Path, log: Callable[[str], None]) -> tuple[Config, dict[str, LazyTensor]]:
    """Read a folder that `save_pretrained` wrote."""
    if folder.is_file():
        raise UserError(f"{folder}: a file, not a folder; name its folder, or give --format fairseq or fairseq2")
    if not folder.is_dir():
        hint = nearest_path(folder) or "; download the model first, e.g. with: hf download"
        raise UserError(f"{folder}: no such folder{hint}")
    with errors_naming(folder):
        preprocessor = _feature_extractor(folder)
        document = _read_json(folder / "config.json")
        config = pretraining_config(document, preprocessor)
        state = _read_weights(folder)
        if "lm_head.weight" in state:
            vocabulary, tokenizer = _read_json(folder / "vocab.json"), folder / "tokenizer_config.json"
            kind = _read_json(tokenizer).get("tokenizer_class") if tokenizer.is_file() else None
            config = ctc_config(config, document, vocabulary, phones=kind == PHONE_TOKENIZER["tokenizer_class"])
        else:
            _refuse_other_kinds({name.partition(".")[0] for name in state})
        ours = from_huggingface(state, config)
    if preprocessor is None:
        log(
            f"{folder}: no preprocessor_config.json or processor_config.json in it: "
            f"using model.normalize_waveform={str(config.model.normalize_waveform).lower()}"
        )
    return config, ours


def _feature_extractor(folder: Path) -> dict[str, Any] | None:
    """Read the config of the feature extractor, from the newer or the older Transformers file; None without either."""
    newer, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    nested = _read_json(newer).get("feature_extractor") if newer.is_file() else None
    if isinstance(nested, dict):
        return nested
    return _read_json(older) if older.is_file() else None


def _read_weights(folder: Path) -> dict[str, LazyTensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        files = [name] if (folder / name).is_file() else _shards(index) if index.is_file() else []
        if files:
            found: dict[str, LazyTensor] = {}
            for file in files:
                tensors = _read_file(folder / file)
                if twice := sorted(tensors.keys() & found.keys()):
                    raise UserError(f"{file}: tensor {twice[0]} is in another shard, too")
                found.update(tensors)
            return found
    raise UserError("no model.safetensors and no pytorch_model.bin in it")


def _shards(index: Path) -> list[str]:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index.name}: weight_map does not name a file for each tensor")
    for tensor, name in files.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(f"{index.name}: weight_map: {tensor!r}: {name!r} is not a file name")
    return sorted(set(files.values()))


def _read_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".bin":
        return mapped(read_pickle(path))
    try:
        opened: Any = safe_open(path, framework="pt")
        return {name: _lazy_slice(opened, name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from None


def _lazy_slice(opened: Any, name: str) -> LazyTensor:
    stored = opened.get_slice(name)
    shape = tuple(stored.get_shape())

    def read(first: int, last: int) -> Tensor:
        rows: Tensor = opened.get_slice(name)[first:last] if shape else opened.get_tensor(name)
        return rows

    if (dtype := DTYPES.get(stored.get_dtype())) is None:
        raise UserError(f"tensor {name} is {stored.get_dtype()}, not floating point of 16, 32 or 64 bits")
    return LazyTensor(shape, dtype, read)


def _refuse_other_kinds(modules: set[str]) -> None:
    """Raise UserError with the kind of model, if it is one of Transformers that cannot be imported."""
    if "quantizer" in modules or not modules & {"feature_extractor", "wav2vec2"}:
        return
    alone = "feature_extractor" in modules
    kind = "an encoder alone (Wav2Vec2Model)" if alone else "an encoder with an output layer of another task"
    raise UserError(f"{kind}: only Wav2Vec2ForPreTraining and Wav2Vec2ForCTC can be imported")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path.name} in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return document
