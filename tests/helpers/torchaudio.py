"""torchaudio for tests and benches, also where its wheel does not load: the package itself never imports it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

FOLDER = Path(sys.prefix) / "oracles"
"""Where tools/setup.sh installs torchaudio if it does not load in the environment."""

EXTENSION = "torchaudio._extension"


def import_torchaudio() -> ModuleType:
    """Import torchaudio, without its compiled extension where that cannot be loaded.

    torchaudio's wheel for Linux is built for CUDA: beside a CPU build of torch its import raises OSError. Its models
    and its resampling are Python and need no extension, so they are imported with a stand-in for it.

    Raises:
        ImportError: torchaudio is neither in the environment nor in `FOLDER`.
    """
    sys.path.append(str(FOLDER))
    try:
        return _import()
    finally:
        # Transformers and Lhotse look for torchaudio on the path, and one that does not load would break them.
        sys.path.remove(str(FOLDER))


def _import() -> ModuleType:
    try:
        return importlib.import_module("torchaudio")
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
