"""Reading files that `torch.save` wrote, fairseq's among them, without executing anything in them.

Settings come in an `args` Namespace, as in fairseq's first release, or in a `cfg` that omegaconf wrote, as in its last.
Neither fairseq nor omegaconf is needed.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from w2vscale.errors import UserError

INERT_NAMES = (
    "argparse.Namespace",
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "str", "tuple", "type")),
    *(f"typing.{kind}" for kind in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    "_operator.getitem",  # with builtins.type, how typing.Optional[int] is pickled
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
)
"""What a checkpoint may name beside tensors and classes of `INERT_PACKAGES`. A stand-in takes the place of each."""
INERT_PACKAGES = ("fairseq.", "omegaconf.")


@dataclass(frozen=True)
class FairseqCheckpoint:
    """What a `.pt` file of fairseq says about a model."""

    path: Path
    state: dict[str, Tensor]
    settings: dict[str, Any]
    """Of the model, with those of task and criterion that no setting of the model is called like; may be empty."""


def load_fairseq(path: Path) -> FairseqCheckpoint:
    """Read a checkpoint, on the CPU. Nothing in the file is executed.

    PyTorch's weights-only reader builds tensors and containers; the classes of fairseq's settings are on its list of
    allowed names, but each name stands for an empty class of ours that keeps what it is given.

    Raises:
        UserError: `path` is no checkpoint of fairseq, is damaged, or names anything that could run code.
    """
    with _refusals(str(path)):
        found = _read(path, _stand_ins(path))
        state = found.get("model") if isinstance(found, dict) else None
        settings = _settings(found) if state is not None else {}
    if state is None:
        raise UserError(f'{path}: no checkpoint of fairseq: it has no entry "model"')
    if not _is_state(state):
        raise UserError(f'{path}: no checkpoint of fairseq: its entry "model" does not hold tensors by name')
    return FairseqCheckpoint(path, dict(state), settings)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote; anything else in it is refused, not executed."""
    with _refusals(path.name):
        found = _read(path)
    if not _is_state(found):
        raise UserError(f"{path.name} does not hold tensors by name")
    return found


def _read(path: Path, allowed: Iterable[Any] = ()) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_state(found: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    )


@contextmanager
def _refusals(file: str) -> Iterator[None]:
    """One line for whatever a hand-made file makes the readers stumble over."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise UserError(" ".join(f"{file} is refused: {_reason(error)}".split())) from None


def _reason(error: Exception) -> str:
    """In our words: PyTorch's own advise reading the file in a way that executes what it holds."""
    message = str(error)
    if refused := re.search(r"GLOBAL (\S+) w(?:as not|hose)", message):
        return f"it names {refused[1]}, which is no part of such a file and could run code"
    if "TorchScript" in message:
        return "it is a TorchScript program, not a checkpoint"
    if "Unsupported operand 149" in message:  # how protocols from 4 on begin
        return "it was saved with pickle_protocol=4 or above, which cannot be read safely; save it with protocol 2"
    if isinstance(error, RecursionError):
        return "its settings are nested too deeply"
    told = message.partition("WeightsUnpickler error: ")[2].strip().splitlines()
    return f"it is no file that PyTorch can read safely, or cut short or damaged{f' ({told[0]})' if told else ''}"


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    config, arguments = (_plain(found.get(key)) for key in ("cfg", "args"))
    if isinstance(config, dict):
        sections = [config.get(section) for section in ("criterion", "task", "model")]
        return {name: value for section in sections if isinstance(section, dict) for name, value in section.items()}
    return arguments if isinstance(arguments, dict) else {}


def _plain(value: Any) -> Any:
    """Dicts, lists and scalars out of stand-ins for Namespace, enums and omegaconf's containers and nodes."""
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
    """An object of any class that a checkpoint may name: keeps what it was made of, and does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Stands in for defaultdict: the reader fills plain dicts only."""
    return {}


def _stand_ins(path: Path) -> list[Any]:
    """The allow-list of one file."""
    named = {name for name in _named_globals(path) if name.startswith(INERT_PACKAGES)}
    return [(_empty_dict, "collections.defaultdict"), *((_StandIn, name) for name in sorted({*INERT_NAMES, *named}))]


def _named_globals(path: Path) -> Iterator[str]:
    """Every "module.name" in the pickles of a file, which are disassembled and not run.

    PyTorch's zip files hold one pickle; before 1.6 it wrote three short ones (magic number, protocol, system), then it.
    """
    with path.open("rb") as file:
        pickles: list[io.BufferedReader | io.BytesIO] = [file] * 4
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                records = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                pickles = [io.BytesIO(archive.read(name)) for name in records]
        else:
            file.seek(0)
        for stream in pickles:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
