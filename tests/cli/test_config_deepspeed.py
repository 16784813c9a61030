"""`w2vscale config show --deepspeed`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.engine.deepspeed.config import deepspeed_config
from w2vscale.errors import UserError

SHOW = ["config", "show", "base", "--deepspeed"]


@pytest.mark.parametrize("settings", [["engine.deepspeed_config=zero3"], ["engine.name=deepspeed", "optim.max_norm=3"]])
def test_prints_nothing_but_the_merged_json(settings: list[str]) -> None:
    result = CliRunner().invoke(app, [*SHOW, *settings])
    assert result.exit_code == 0
    config = load_config("base", settings)
    assert json.loads(result.stdout) == deepspeed_config(config.engine, config.optim, config.precision)
    assert result.stdout.startswith('{\n  "zero_optimization": {\n    "stage": ')


def test_without_deepspeed_our_own_checks_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what Python keeps for a module that cannot be imported
    result = CliRunner().invoke(app, SHOW)
    assert json.loads(result.stdout)["zero_optimization"]["stage"] == 2
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}')
    result = CliRunner().invoke(app, [*SHOW, f"engine.deepspeed_config={path}"])
    assert isinstance(result.exception, UserError)
    assert "gradient_clipping=0.5 contradicts optim.max_norm=1.0" in str(result.exception)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_checks_it_too(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    result = CliRunner().invoke(app, [*SHOW, f"engine.deepspeed_config={path}"])
    assert isinstance(result.exception, UserError)
    assert "zero_optimization.overlap_com: unknown key; did you mean overlap_comm?" in str(result.exception)
