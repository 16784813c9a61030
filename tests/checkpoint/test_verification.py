"""What verification finds, on a checkpoint whose tensors are spread over files as several ranks write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import checkpoints
from tests.helpers.micro import MICRO_MODEL
from w2vscale.checkpoint.consolidation import consolidate
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState, file_facts
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.checkpoint.verification import verify
from w2vscale.config import dump_config, load_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError

CONFIG = load_config("base", MICRO_MODEL)
BIAS = "model.quantizer.projection.bias"
RANKS = 3


def content() -> dict[str, Tensor]:
    """A value for everything that a checkpoint of the micro model holds."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in expected_of(CONFIG).items()}


def spread(path: Path, tensors: dict[str, Tensor], *, ranks: int = 3) -> Path:
    """Write a checkpoint as `ranks` processes do that hold a slice of each tensor."""
    path.mkdir(parents=True)
    for rank in range(ranks):
        rows: dict[str, Tensor] = {}
        places: dict[str, dict[str, list[int]]] = {}
        for name, tensor in tensors.items():
            blocks = tensor.chunk(ranks) if tensor.dim() else (tensor,)
            if tensor.dim() == 0 and rank > 0:
                continue
            # Like torch, a rank without a part of the tensor writes an empty slice.
            rows[name] = blocks[rank].contiguous() if rank < len(blocks) else tensor[:0]
            start = sum(len(block) for block in blocks[:rank]) if tensor.dim() else 0
            places[name] = {"saved_offsets": [start, *[0] * (tensor.dim() - 1)][: tensor.dim()]}
        file = path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(rows, file, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    (path / "config.yaml").write_text(dump_config(CONFIG))
    seal(path)
    return path


def seal(path: Path) -> None:
    """Make train_state.json agree with the files as they are."""
    files = {file.name: file_facts(file) for file in path.iterdir() if file.name != "train_state.json"}
    numbers = {"update": 3, "audio_seconds": 7200.0, "skipped_updates": 0, "skipped_utterances": 1}
    (path / "train_state.json").write_text(json.dumps({"format": 2, **numbers, "ranks": RANKS, "files": files}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread(tmp_path_factory.mktemp("whole") / "update_00000003", content())


@pytest.fixture
def spoiled(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoints" / whole.name))


def shard(path: Path, number: int) -> Path:
    return path / f"shard-{number:05d}-model-00001-of-00001.safetensors"


def rewrite(path: Path, number: int, change: Callable[[dict[str, Tensor], dict[str, list[int]]], object]) -> None:
    """Change tensors and offsets of a shard as if they had been written so."""
    checkpoints.rewrite(shard(path, number), change)
    seal(path)


class TestVerify:
    def test_a_whole_one(self, whole: Path) -> None:
        seen: list[tuple[int, int]] = []
        found = verify(whole, progress=lambda done, total: seen.append((done, total)))
        assert found.problems == []
        assert len(found.checkpoint.tensors) == len(expected_of(CONFIG))
        assert found.checkpoint.state.update == 3
        assert seen[-1] == (found.checkpoint.bytes, found.checkpoint.bytes)

    def test_a_flipped_bit(self, spoiled: Path) -> None:
        content = bytearray(shard(spoiled, 2).read_bytes())
        content[-2] ^= 1
        shard(spoiled, 2).write_bytes(content)
        with pytest.raises(UserError, match=r"00002-.*: its content is not what was written"):
            open_checkpoint(spoiled)
        open_checkpoint(spoiled, hashed=False)  # does not read that far
        assert verify(spoiled).problems == [f"{shard(spoiled, 2).name}: its content is not what was written (SHA-256)"]

    def test_changed_settings(self, spoiled: Path) -> None:
        text = (spoiled / "config.yaml").read_text()
        (spoiled / "config.yaml").write_text(text.replace("1", "2", 1))
        assert verify(spoiled).problems == ["config.yaml: its content is not what was written (SHA-256)"]

    def test_a_truncated_and_a_missing_file(self, spoiled: Path) -> None:
        content = shard(spoiled, 1).read_bytes()
        shard(spoiled, 1).write_bytes(content[:-10])
        shard(spoiled, 3).unlink()
        assert verify(spoiled).problems == [
            f"{shard(spoiled, 1).name}: has {len(content) - 10} bytes, expected {len(content)}",
            f"{shard(spoiled, 3).name}: missing",
        ]

    def test_a_file_that_nobody_wrote(self, spoiled: Path) -> None:
        shutil.copy(shard(spoiled, 1), spoiled / "more.safetensors")
        assert verify(spoiled).problems == ["more.safetensors: not listed in train_state.json"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_not_finite(self, spoiled: Path, value: float) -> None:
        rewrite(spoiled, 2, lambda tensors, offsets: tensors[BIAS][3].fill_(value))
        assert verify(spoiled).problems == [f"{shard(spoiled, 2).name}: {BIAS}: 1 of 11 values are not finite"]

    @pytest.mark.parametrize("name", [BIAS, "optim.quantizer.projection.bias.exp_avg_sq"])
    def test_a_missing_tensor(self, spoiled: Path, name: str) -> None:
        for number in (1, 2, 3):
            rewrite(spoiled, number, lambda tensors, offsets: tensors.pop(name))
        assert verify(spoiled).problems == [f"{name}: missing"]

    def test_missing_rows_in_the_middle_and_at_the_end(self, spoiled: Path) -> None:
        weight = "model.quantizer.projection.weight"
        rewrite(spoiled, 2, lambda tensors, offsets: tensors.pop(BIAS))
        rewrite(spoiled, 3, lambda tensors, offsets: tensors.pop(weight))
        assert verify(spoiled).problems == [
            f"{BIAS}: its slices leave a gap",
            f"{weight}: has the shape [22, 16], expected [32, 16]",
        ]

    def test_slices_that_overlap(self, spoiled: Path) -> None:
        """As many values as there should be, one row of them twice."""
        rewrite(spoiled, 2, lambda tensors, offsets: offsets.update({BIAS: [10]}))
        assert verify(spoiled).problems == [f"{BIAS}: its slices overlap"]

    def test_another_type(self, spoiled: Path) -> None:
        rewrite(spoiled, 1, lambda tensors, offsets: tensors.update({BIAS: tensors[BIAS].bfloat16()}))
        assert verify(spoiled).problems == [f"{BIAS}: its slices have different types (bfloat16, float32)"]

    def test_of_a_run_the_newest_is_read_even_if_it_cannot_be_used(self, spoiled: Path) -> None:
        newest = Path(shutil.copytree(spoiled, spoiled.with_name("copy")))
        checkpoints.seal(newest, update=4)
        (newest / "config.yaml").unlink()
        newest.rename(spoiled.with_name("update_00000004"))
        assert open_checkpoint(spoiled.parent.parent).path == spoiled
        assert verify(spoiled.parent.parent).problems == ["config.yaml: missing"]

    def test_what_the_store_writes(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path, Ranks(), expected=expected_of(CONFIG))
        assert verify(store.save(content(), TrainState(update=1), dump_config(CONFIG))).problems == []

    def test_an_imported_model_has_no_optimizer_state(self, tmp_path: Path) -> None:
        model = {name: tensor for name, tensor in content().items() if name.startswith("model.")}
        store = CheckpointStore(tmp_path, Ranks(), expected=expected_of(CONFIG, optimizer=False))
        saved = store.save(model, TrainState(), dump_config(CONFIG))
        assert verify(saved).problems == []

    def test_a_pickle_in_place_of_tensors(self, spoiled: Path) -> None:
        torch.save({"a": torch.zeros(3)}, shard(spoiled, 2))
        seal(spoiled)
        (problem,) = verify(spoiled).problems
        assert problem.startswith(f"{shard(spoiled, 2).name}: damaged (")


def test_a_description_counts_whole_tensors(whole: Path) -> None:
    found = open_checkpoint(whole)
    sizes = {name: tensor.numel() for name, tensor in content().items()}
    assert {name: tensor.numel for name, tensor in found.tensors.items()} == sizes
    assert found.parameters == sum(size for name, size in sizes.items() if name.startswith("model."))
    assert found.ranks == RANKS


class TestConsolidate:
    def test_the_model_has_its_own_names(self, whole: Path, tmp_path: Path) -> None:
        done = consolidate(whole, tmp_path / "new" / "out")
        found = load_file(done.file)
        expected = {name.removeprefix("model."): t for name, t in content().items() if name.startswith("model.")}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert done.file == tmp_path / "new" / "out" / "model.safetensors"
        assert (done.update, done.tensors) == (3, len(expected))
        assert {file.name for file in done.file.parent.iterdir()} == {"model.safetensors", "config.yaml"}
        assert load_config(done.file.with_name("config.yaml")) == CONFIG

    def test_with_the_optimizer_the_names_are_the_checkpoints(self, whole: Path, tmp_path: Path) -> None:
        found = load_file(consolidate(whole, tmp_path, optimizer=True).file)
        read = {name: torch.empty_like(tensor) for name, tensor in content().items()}
        open_checkpoint(whole).read_into(read)
        assert found.keys() == read.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in read.items())

    def test_other_libraries_can_open_the_file(self, whole: Path, tmp_path: Path) -> None:
        file = consolidate(whole, tmp_path).file
        with safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt", "update": "3"}
            assert opened.get_tensor("quantizer.projection.bias").dtype == "float32"
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0

    @pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
    def test_nothing_is_replaced(self, whole: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            consolidate(whole, tmp_path)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]

    def test_an_incomplete_tensor_is_not_made_up(self, spoiled: Path, tmp_path: Path) -> None:
        rewrite(spoiled, 2, lambda tensors, offsets: tensors.pop(BIAS))
        with pytest.raises(UserError, match=f"{BIAS}: its slices leave a gap"):
            consolidate(spoiled, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_interruption_leaves_nothing(self, whole: Path, tmp_path: Path) -> None:
        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            consolidate(whole, tmp_path / "out", progress=interrupt)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "files": 3}'])
def test_a_damaged_train_state_is_one_line(spoiled: Path, text: str) -> None:
    (spoiled / "train_state.json").write_text(text)
    with pytest.raises(UserError, match=r"train_state.json: damaged") as caught:
        CheckpointReader(spoiled)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offsets", [[0, 0], []])
def test_offsets_that_do_not_fit_are_damage(spoiled: Path, offsets: list[int]) -> None:
    rewrite(spoiled, 1, lambda tensors, places: places.update({BIAS: offsets}))
    with pytest.raises(UserError, match=f"damaged .{BIAS} has 1 dimensions and {len(offsets)} offsets"):
        open_checkpoint(spoiled)


def test_a_tensor_with_a_hole_is_not_read(spoiled: Path) -> None:
    rewrite(spoiled, 2, lambda tensors, offsets: tensors.pop(BIAS))
    with pytest.raises(UserError, match=f"{BIAS}: its slices leave a gap"):
        open_checkpoint(spoiled).read_into({BIAS: torch.zeros(32)})
