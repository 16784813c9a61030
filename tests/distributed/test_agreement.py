"""Ranks that are about to compute different things stop, all of them, and say what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro
from w2vscale.config import load_config
from w2vscale.distributed.process_group import refuse_shared_gpus
from w2vscale.errors import UserError
from w2vscale.objectives import StepContext
from w2vscale.training.agreement import common_ground, compare_ranks

pytestmark = pytest.mark.distributed


def compare(*of_ranks: dict[str, str]) -> str | None:
    try:
        compare_ranks(of_ranks[dist.get_rank()])
    except UserError as error:
        return str(error)
    return None


def train_with(corpus: str, exp: str, *of_ranks: str) -> str | None:
    """Train; every rank has an override of its own."""
    try:
        train_micro(corpus, f"{exp}/{dist.get_rank()}", (of_ranks[dist.get_rank()],))
    except UserError as error:
        return str(error)
    return None


def share(*gpus: tuple[str, str]) -> str | None:
    try:
        refuse_shared_gpus(*gpus[dist.get_rank()])
    except UserError as error:
        return str(error)
    return None


def test_two_ranks_that_would_share_a_gpu_are_named_on_every_rank(pool: Callable[[int], Pool]) -> None:
    error = "ranks 0, 2 would share one GPU of node1 (GPU-a): start one process per GPU"
    assert pool(3).run(share, ("node1", "GPU-a"), ("node2", "GPU-b"), ("node1", "GPU-a")) == [error] * 3
    assert pool(2).run(share, ("node1", "GPU-a"), ("node1", "GPU-b")) == [None] * 2


def test_ranks_that_agree_go_on(pool: Callable[[int], Pool]) -> None:
    work = {"the update": "3", "the layers to compute": "110"}
    assert pool(2).run(compare, work, work) == [None, None]


def test_the_difference_is_named_on_every_rank(pool: Callable[[int], Pool]) -> None:
    errors = pool(2).run(
        compare, {"a": "1", "the layers to compute": "111"}, {"a": "1", "the layers to compute": "101"}
    )
    assert errors[0] == errors[1]
    assert errors[0].startswith("the ranks disagree on the layers to compute: rank 0 has 111, rank 1 has 101; ")


def test_another_seed_on_one_rank_stops_the_run_before_its_first_update(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    config = load_config("base", list(MICRO_RUN))

    def layers(seed: int) -> list[bool] | None:
        return StepContext(seed, 0).active_layers(config.model.layers, config.regularization.layerdrop)

    seed = next(seed for seed in range(1, 99) if layers(seed) != layers(0))
    errors = pool(2).run(
        train_with, str(small_corpus.train), str(tmp_path), "trainer.seed=0", f"trainer.seed={seed}", timeout=60
    )
    assert errors[0] == errors[1]
    assert errors[0].startswith("the ranks disagree on the layers to compute")
    assert not list(tmp_path.glob("*/checkpoints/update_*"))


def test_nodes_may_have_their_data_in_different_places() -> None:
    def ground(place: str, noises: int = 1) -> dict[str, str]:
        noise = [f"{place}/noise{n}.jsonl" for n in range(noises)]
        mixed = ["mix.by=corpus", f"mix.weights={json.dumps({f'{place}/cuts.jsonl': 2.0})}"]
        data = f"data.train={place}/cuts.jsonl"
        return common_ground(load_config("base", [*MICRO_RUN, data, f"augment.noise={json.dumps(noise)}", *mixed]), "")

    assert ground("/here") == ground("/there")
    assert ground("/here") != ground("/here", noises=2)


def test_deepspeeds_json_of_one_name_and_another_content_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    config = load_config("base", [*MICRO_RUN, "engine.name=deepspeed", f"engine.deepspeed_config={path}"])
    grounds = []
    for stage in (2, 3):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        grounds.append(common_ground(config, "8 utterances"))
    differing = [fact for fact in grounds[0] if grounds[0][fact] != grounds[1][fact]]
    assert differing == ["the JSON for DeepSpeed"]
