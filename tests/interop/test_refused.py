"""What cannot be converted is refused in one line, and leaves no files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from w2vscale.config import Config
from w2vscale.errors import UserError
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.importing import import_checkpoint


def changed(family: tuple[Config, Path, Path], folder: Path, **changes: object) -> Path:
    """The export with other settings."""
    _, _, export = family
    folder.mkdir()
    document = {**json.loads((export / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "hubert"}, r"model_type='hubert': only wav2vec2 can be imported"),
        ({"hidden_act": "relu"}, r"hidden_act='relu': w2vscale supports only 'gelu'"),
        ({"add_adapter": True}, r"add_adapter=true: w2vscale has no adapters"),
        (
            {"num_codevectors_per_group": 21},
            r"codevectors has shape \[1, 40, 12\], but the settings need \[1, 42, 12",
        ),
        ({"num_hidden_layers": 4}, r"layers\.3\.\S+ is missing"),
        ({"num_attention_heads": 7}, r"heads=7 does not divide dim=48"),
    ],
)
def test_what_w2vscale_does_not_have(
    family: tuple[Config, Path, Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(changed(family, tmp_path / "s", **change), tmp_path / "in", form="huggingface")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "in").exists()


def test_a_malicious_pickle_does_not_run(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    source = changed(family, tmp_path / "s")
    (source / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    with (source / "pytorch_model.bin").open("wb") as file:
        pickle.dump(_Touch(str(marker)), file)
    with pytest.raises(UserError, match="is refused") as caught:
        import_checkpoint(source, tmp_path / "in", form="huggingface")
    assert "\n" not in str(caught.value)
    torch.save({"weight": _Touch(str(marker))}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="is refused"):
        import_checkpoint(source, tmp_path / "in", form="huggingface")
    assert not marker.exists()


def test_files_in_place_of_folders(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    """Any file may be one of PyTorch, whatever its name, but not those that Transformers has in a folder."""
    _, _, export = family
    for form in ("auto", "huggingface"):
        with pytest.raises(UserError, match=r"model\.safetensors: a file, not a folder; name its folder, or give --fo"):
            import_checkpoint(export / "model.safetensors", tmp_path / "in", form=form)
    for name in ("model.pth", "model.ckpt", "model"):
        (tmp_path / name).write_text("no model")
        with pytest.raises(UserError, match=f"{name} is refused: it is not a file that PyTorch can read"):
            import_checkpoint(tmp_path / name, tmp_path / "in")
    with pytest.raises(UserError, match=r"gone\.pth: cannot be read: No such file"):
        import_checkpoint(tmp_path / "gone.pth", tmp_path / "in")


def test_missing_and_existing_files(family: tuple[Config, Path, Path], tmp_path: Path) -> None:
    _, checkpoint, export = family
    with pytest.raises(UserError, match="no such folder"):
        import_checkpoint(tmp_path / "none", tmp_path / "in", form="huggingface")
    with pytest.raises(UserError, match=r"no config\.json in it"):
        import_checkpoint(tmp_path, tmp_path / "in", form="huggingface")
    with pytest.raises(UserError, match=r"export: exists and is not an empty folder; choose another one"):
        export_checkpoint(checkpoint, export, form="huggingface")
    with pytest.raises(UserError, match="--format nemo: choose one of huggingface, fairseq2, torchaudio, onnx"):
        export_checkpoint(checkpoint, tmp_path / "x", form="nemo")
    with pytest.raises(UserError, match="--format espnet: choose one of auto, huggingface, fairseq, fairseq2"):
        import_checkpoint(export, tmp_path / "x", form="espnet")


class _Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")
