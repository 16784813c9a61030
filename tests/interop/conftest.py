from pathlib import Path

import pytest

from tests.helpers.exported import FAMILIES, random_model, save_model
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.config import Config, load_config
from w2vscale.interop.exporting import export_checkpoint


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    """A preset's small sibling with random weights: its settings, its checkpoint, and its export to Transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    config = load_config(request.param, [*SMALL, "precision.compute=fp32", "data.train=cuts_train.jsonl"])
    state = TrainState(update=700, audio_seconds=90_000.0, data="960.0 hours")
    weights = random_model(config, seed=11, biases_only=True).state_dict()
    checkpoint = save_model(folder, config, weights, state)
    export_checkpoint(checkpoint, folder / "export", form="huggingface")
    return config, checkpoint, folder / "export"
