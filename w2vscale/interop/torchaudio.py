"""The one gateway to torchaudio, which also works where its compiled extension cannot be loaded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from w2vscale.errors import UserError

EXTENSION = "torchaudio._extension"


def import_torchaudio() -> ModuleType:
    """torchaudio; without its compiled parts where their libraries are missing.

    The wheel on PyPI for Linux is built for CUDA: beside a CPU-only torch its import raises OSError. Its Python
    parts (models, resampling) need no extension, so they are imported with a stand-in for it. transformers and Lhotse
    import torchaudio if it is installed: call this before importing them.

    Raises:
        UserError: torchaudio is not installed.
    """
    try:
        return importlib.import_module("torchaudio")
    except ImportError as error:
        raise UserError(f"torchaudio cannot be imported ({error}): pip install 'w2vscale[torchaudio]'") from None
    except OSError:
        pass
    extension = _absent_extension()
    sys.modules[EXTENSION] = extension
    try:
        torchaudio = importlib.import_module("torchaudio")
    except BaseException:
        del sys.modules[EXTENSION]
        raise
    vars(torchaudio)["_extension"] = extension
    return torchaudio


def _absent_extension() -> ModuleType:
    """What `torchaudio._extension` is where torchaudio was built without it."""
    extension = ModuleType(EXTENSION, "Stands in for an extension that cannot be loaded.")
    vars(extension).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        _load_lib=lambda library: False,
        fail_if_no_align=_fail_when_called,
    )
    return extension


def _fail_when_called(function: Callable[..., Any]) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{function.__name__} needs torchaudio's compiled extension, which cannot be loaded here")

    return fail
