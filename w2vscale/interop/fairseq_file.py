"""Read files written by `torch.save`, those of fairseq and fairseq2 included, without executing anything in them.

Early fairseq releases store settings as an `args` Namespace, later ones as an omegaconf `cfg`. Neither package is
needed to read them. fairseq2 stores none.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from w2vscale.checkpoint.lazy import LazyTensor, lazy
from w2vscale.errors import UserError
from w2vscale.files import nearest_path

INERT_NAMES = (
    "argparse.Namespace",
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "str", "tuple", "type")),
    *(f"typing.{kind}" for kind in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    "_operator.getitem",  # together with builtins.type, used to pickle typing.Optional[int]
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
)
"""Globals that a checkpoint may reference, besides tensors and `INERT_PACKAGES`. Each is replaced by a stand-in."""
INERT_PACKAGES = ("fairseq.", "omegaconf.")


class FairseqCheckpoint(NamedTuple):
    """Contents of a `.pt` file of fairseq or fairseq2."""

    path: Path
    state: dict[str, Tensor]
    settings: dict[str, Any]
    """Settings of criterion, task and model; on equal names the model takes precedence. May be empty."""
    own: str | None = None
    """Our settings as JSON, if w2vscale wrote the file."""


def load_fairseq(path: Path) -> FairseqCheckpoint:
    """Load a checkpoint to the CPU. Nothing in the file is executed. Values are read when they are needed.

    The weights-only unpickler of PyTorch builds tensors and containers. The classes of fairseq settings are on its
    allow-list, but each name is mapped to an inert class of ours that only stores its arguments.

    Raises UserError if `path` is not a checkpoint of either, is damaged, or references anything that could run code.
    """
    with _refusals(str(path)):
        found = _read(path, _stand_ins(path))
        entries = found if isinstance(found, dict) else {}
        state = entries.get("model", entries if entries and _is_state(entries) else None)
        settings = _settings(entries) if state is not None else {}
        own = entries.get("w2vscale")
    if state is None:
        raise UserError(f'{path}: not a checkpoint of fairseq or fairseq2: it has no entry "model"')
    if not _is_state(state):
        raise UserError(f'{path}: not a checkpoint of fairseq or fairseq2: "model" is not a dictionary of tensors')
    return FairseqCheckpoint(path, dict(state), settings, own if isinstance(own, str) else None)


def is_fairseq2(path: Path) -> bool:
    """Whether tensors in a file have names of fairseq2. Reads the names only. False if it cannot be read."""
    with suppress(Exception):  # of the reader of pickles, which a malformed file can cause
        return any(name.removeprefix("module.").startswith("encoder_frontend.") for name in _texts(path))
    return False


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Load a `state_dict` that `torch.save` wrote, without executing anything in it. UserError if it is not one."""
    with _refusals(path.name):
        found = _read(path, ())
    if not _is_state(found):
        raise UserError(f"{path.name} is not a dictionary of tensors")
    return found


def mapped(state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Read tensors when they are needed. UserError if one is not an ordinary dense tensor."""
    for name, tensor in state.items():
        if type(tensor) not in (Tensor, Parameter):  # such as a DTensor, of which this process has a part only
            raise UserError(f"tensor {name} is a {type(tensor).__name__}; save the model with ordinary tensors")
        if tensor.layout != torch.strided:
            raise UserError(f"tensor {name} is {tensor.layout}, not dense")
    return lazy({name: tensor.detach().resolve_neg() for name, tensor in state.items()})


def _read(path: Path, allowed: Iterable[Any]) -> Any:
    """Tensors stay in the file until their values are needed, if it is a zip file, as `torch.save` writes since 1.6."""
    memory_mapped = path.is_file() and zipfile.is_zipfile(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=memory_mapped)


def _is_state(found: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    )


@contextmanager
def _refusals(file: str) -> Iterator[None]:
    """Turn any error of the readers, which a malformed file can cause, into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}{nearest_path(file)}") from None
    except Exception as error:
        raise UserError(" ".join(f"{file} is refused: {_reason(error)}".split())) from None


def _reason(error: Exception) -> str:
    """Explain a load error. The PyTorch message is not shown, because it suggests settings that execute the file."""
    message = str(error)
    if refused := re.search(r"GLOBAL (\S+) w(?:as not|hose)", message):
        return f"it references {refused[1]}, which does not belong in a checkpoint and could run code"
    if "TorchScript" in message:
        return "it is a TorchScript program, not a checkpoint"
    if "Unsupported operand 149" in message:  # the first opcode that only protocols from 4 on have
        return "it was saved with pickle_protocol=4 or above, which cannot be read safely; save it with protocol 2"
    if isinstance(error, RecursionError):
        return "its settings are nested too deeply"
    detail = message.partition("WeightsUnpickler error: ")[2].strip().splitlines()
    reason = f" ({detail[0]})" if detail else ""
    return f"it is not a file that PyTorch can read safely, or it is cut short or damaged{reason}"


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    config, arguments = (_plain(found.get(key)) for key in ("cfg", "args"))
    if isinstance(config, dict):
        sections = [config.get(section) for section in ("criterion", "task", "model")]
        return {name: value for section in sections if isinstance(section, dict) for name, value in section.items()}
    return arguments if isinstance(arguments, dict) else {}


def _plain(value: Any) -> Any:
    """Convert stand-ins for Namespace, enums and omegaconf containers and nodes to dicts, lists and scalars."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, _StandIn):
        return value
    if isinstance(value.state, dict):
        for holder in ("_content", "_val"):
            if holder in value.state:
                return _plain(value.state[holder])
        return _plain(value.state)
    return _plain(value.args[0]) if len(value.args) == 1 else value


class _StandIn:
    """Replaces objects of the classes that a checkpoint references: stores arguments and state, and does nothing."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> _StandIn:
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Replaces defaultdict, because the weights-only unpickler fills only plain dicts."""
    return {}


def _stand_ins(path: Path) -> list[Any]:
    """Build the allow-list for one file."""
    names = {*INERT_NAMES, *(name for name in _named_globals(path) if name.startswith(INERT_PACKAGES))}
    return [(_empty_dict, "collections.defaultdict"), *((_StandIn, name) for name in sorted(names))]


def _named_globals(path: Path) -> Iterator[str]:
    """Yield every "module.name" that the pickles of a file reference."""
    return (str(argument).replace(" ", ".") for opcode, argument in _opcodes(path) if opcode == "GLOBAL")


def _texts(path: Path) -> Iterator[str]:
    """Yield every text in the pickles of a file."""
    return (argument for _, argument in _opcodes(path) if isinstance(argument, str))


def _opcodes(path: Path) -> Iterator[tuple[str, object]]:
    """Yield name and argument of what the pickles of a file do, by disassembling them, without running them.

    The zip files of PyTorch hold one pickle. Before version 1.6, a file held four: magic number, protocol, system
    information, and the data.
    """
    with path.open("rb") as file:
        pickles: list[IO[bytes]] = [file] * 4
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                pickles = [io.BytesIO(archive.read(n)) for n in archive.namelist() if n.endswith("/data.pkl")]
        else:
            file.seek(0)
        for stream in pickles:
            yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(stream))
