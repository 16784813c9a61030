"""Files of fairseq are read in every form, and refused in one line; nothing in a file is executed."""

from __future__ import annotations

import contextlib
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.helpers.converted import from_fairseq
from tests.helpers.fairseq import FORMS, SMALL, all_settings, fairseq_state, model_settings, modules, save_new, save_old
from tests.helpers.fairseq2 import fairseq2_ctc_state, fairseq2_state, our_settings, save_fairseq2
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.errors import UserError
from w2vscale.interop.fairseq_file import FairseqCheckpoint, load_fairseq, mapped, read_pickle
from w2vscale.interop.importing import form_of, import_checkpoint


@pytest.mark.parametrize("name", ["base", "large_lv60"])
@pytest.mark.parametrize("form", FORMS)
def test_settings_are_read_from_every_form_of_checkpoint(form: str, name: str, tmp_path: Path) -> None:
    state, cfg = fairseq_state(SMALL[name]), all_settings(SMALL[name])
    allowed_before = set(torch.serialization.get_safe_globals())
    expected = from_fairseq(load_fairseq(save_new(tmp_path / "plain.pt", state, cfg)))
    checkpoint = load_fairseq(FORMS[form](tmp_path / "model.pt", state, cfg))
    assert checkpoint.path == tmp_path / "model.pt"
    assert checkpoint.state.keys() == state.keys()
    assert checkpoint.settings["encoder_attention_heads"] == 4
    assert checkpoint.settings["normalize"] == (name == "large_lv60")
    assert checkpoint.settings["mask_selection"] == "static"
    again = from_fairseq(checkpoint)
    assert again[0] == expected[0]
    for tensor_name, tensor in expected[1].items():
        assert torch.equal(again[1][tensor_name], tensor)
    assert not {"fairseq", "omegaconf"} & sys.modules.keys()
    assert set(torch.serialization.get_safe_globals()) == allowed_before


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_subclasses_of_tensors_are_refused_by_name(mesh: DeviceMesh, tmp_path: Path) -> None:
    """A rank of FSDP2 holds DTensors, and saves its own part of them."""
    name = "encoder.layers.1.fc1.weight"
    state = fairseq_state(SMALL["base"])
    others = {
        "DTensor": distribute_tensor(state[name], mesh, [Shard(0)]),
        "NestedTensor": torch.nested.nested_tensor([state[name]], layout=torch.jagged),
    }
    for kind, tensor in others.items():
        path = save_new(tmp_path / "model.pt", {**state, name: tensor}, all_settings(SMALL["base"]))
        torch.save({**state, name: tensor}, tmp_path / "pytorch_model.bin")
        for message in (
            refusal(lambda path=path: import_checkpoint(path, tmp_path / "in")),
            refusal(lambda: mapped(read_pickle(tmp_path / "pytorch_model.bin"))),
        ):
            assert f"tensor {name} is a {kind}; save the model with ordinary tensors" in message
    assert not (tmp_path / "in").exists()


def test_parameters_and_views_are_ordinary_tensors(tmp_path: Path) -> None:
    state = fairseq_state(SMALL["base"])
    first, second = "encoder.layers.1.fc1.weight", "encoder.layers.1.fc2.weight"
    changed = {**state, first: torch.nn.Parameter(state[first]), second: torch._neg_view(-state[second])}
    path = save_new(tmp_path / "model.pt", changed, all_settings(SMALL["base"]))
    import_checkpoint(path, tmp_path / "in")
    found = whole(open_checkpoint(tmp_path / "in").model_tensors())
    block = "encoder.transformer.blocks.1.feed_forward"
    assert torch.equal(found[f"{block}.intermediate.weight"], state[first])
    assert torch.equal(found[f"{block}.output.weight"], state[second])


def test_settings_are_empty_where_there_are_none(tmp_path: Path) -> None:
    torch.save({"model": fairseq_state(SMALL["base"])}, tmp_path / "model.pt")
    checkpoint = load_fairseq(tmp_path / "model.pt")
    assert checkpoint.settings == {}
    with pytest.raises(UserError, match="lack encoder_attention_heads"):
        from_fairseq(checkpoint)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantize_targets": False}, "quantize_targets=False"),
        ({"quantize_input": True}, "quantize_input=True"),
        ({"same_quantizer": True}, "same_quantizer=True"),
        ({"quantizer_depth": 2}, "quantizer_depth=2"),
        ({"target_glu": True}, "target_glu=True"),
        ({"negatives_from_everywhere": True}, "negatives_from_everywhere=True"),
        ({"cross_sample_negatives": 10}, "cross_sample_negatives=10"),
        ({"codebook_negatives": 10}, "codebook_negatives=10"),
        ({"layer_type": "conformer"}, "layer_type=conformer"),
        ({"pos_enc_type": "rope"}, "pos_enc_type=rope"),
        ({"activation_fn": "relu"}, "activation_fn=relu"),
        ({"pos_conv_depth": 5}, "pos_conv_depth=5"),
        ({"mask_selection": "uniform"}, "mask_selection=uniform"),
        ({"mask_channel_prob": 0.5}, "mask_channel_prob=0.5"),
        ({"latent_temp": "(2,0.5)"}, "latent_temp=(2, 0.5)"),
        ({"mask_prob": 0.0}, "objective.mask_probability=0.0"),
        ({"dropout": "${model.x}"}, "regularization.dropout='${model.x}'"),
        ({"encoder_attention_heads": 5}, "heads=5 does not divide dim=48"),
        ({"encoder_attention_heads": None}, "lack encoder_attention_heads"),
        ({"conv_feature_layers": None}, "lack conv_feature_layers"),
        ({"conv_feature_layers": "[(32, 10, 5)] * 4"}, "does not fit the weights"),
        ({"conv_feature_layers": "[(32, 10, 5)] * 10 ** 9"}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "[(32, 10, 5)] * 999 * 999"}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "__import__('os').getpid()"}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "(" * 900}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": 7}, "not a list of (channels, kernel, stride)"),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    shape = SMALL["base"]
    checkpoint = FairseqCheckpoint(Path("some.pt"), fairseq_state(shape), model_settings(shape, **changes))
    message = refusal(lambda: from_fairseq(checkpoint))
    assert message.startswith("some.pt: ") and named in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("post_extract_proj.weight"), "post_extract_proj.weight is missing (1 missing"),
        (lambda state: state.pop("quantizer.vars"), "quantizer.vars is missing"),
        (lambda state: state.pop("encoder.pos_conv.0.weight_v"), "encoder.pos_conv.0.weight_v is missing"),
        (lambda state: state.pop("encoder.layers.1.fc2.bias"), "encoder.layers.1.fc2.bias is missing"),
        (lambda state: state.pop("feature_extractor.conv_layers.2.0.weight"), "conv_layers.2.0.weight is missing"),
        (lambda state: state.clear(), "is missing"),
        (lambda state: state.update({"target_glu.0.bias": torch.ones(3)}), "target_glu.0.bias is unknown (1 unknown"),
        (lambda state: state.update({"layer_norm.bias": torch.ones(3)}), "layer_norm.bias has shape [3]"),
        (lambda state: state.update({"w2v_encoder.w2v_model.mask_emb": torch.ones(48)}), "mask_emb is there twice"),
        (
            lambda state: state.update({"mask_emb": torch.ones(48).int()}),
            "mask_emb is torch.int32, not floating point",
        ),
        (
            lambda state: state.update({"mask_emb": torch.ones(48).to_sparse()}),
            "mask_emb is torch.sparse_coo, not dense",
        ),
        (lambda state: state.update({"quantizer.vars": torch.ones(3)}), "quantizer.vars has 1 dimensions"),
        (lambda state: state.update({"quantizer.vars": torch.ones(1, 0, 0)}), "codebook_entries=0"),
        (lambda state: state.update({"w2v_encoder.proj.weight": torch.ones(3)}), "proj.weight has 1 dimensions"),
        (
            lambda state: state.update({"w2v_encoder.proj.weight": torch.ones(3, 4)}),
            "needs the file with its 3 symbols",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change: Callable[[dict[str, Tensor]], Any], named: str) -> None:
    shape = SMALL["base"]
    state = fairseq_state(shape)
    change(state)
    message = refusal(lambda: from_fairseq(FairseqCheckpoint(Path("some.pt"), state, model_settings(shape))))
    assert message.startswith("some.pt: ") and named in message


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert "No such file" in refusal(lambda: load_fairseq(path))
    assert "Is a directory" in refusal(lambda: load_fairseq(tmp_path))
    for contents in (b"", b"no checkpoint\n", b"PK\x03\x04 nothing", pickle.dumps({"model": {}}, protocol=2)):
        path.write_bytes(contents)
        assert "cut short or damaged" in refusal(lambda: load_fairseq(path))
    for found in ([1], {"args": None}, {"model": None}):
        torch.save(found, path)
        assert 'no entry "model"' in refusal(lambda: load_fairseq(path))
    for found in ({"model": {"weight": 3}}, {"model": {3: torch.ones(1)}}, {"model": [torch.ones(1)]}):
        torch.save(found, path)
        assert "is not a dictionary of tensors" in refusal(lambda: load_fairseq(path))
    state, cfg = fairseq_state(SMALL["base"]), all_settings(SMALL["base"])
    for zipped in (True, False):
        contents = save_old(path, state, cfg, zipped=zipped).read_bytes()
        for share in (0.01, 0.5, 0.9, 0.999):
            path.write_bytes(contents[: int(share * len(contents))])
            assert "cut short or damaged" in refusal(lambda: load_fairseq(path))


def test_pytorchs_advice_to_execute_a_file_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(torch.nn.ReLU()).save(path)
    assert refusal(lambda: load_fairseq(path)) == f"{path} is refused: it is a TorchScript program, not a checkpoint"
    for zipped in (True, False):
        torch.save({"model": {}}, path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
        assert "was saved with pickle_protocol=4 or above" in refusal(lambda: load_fairseq(path))
    for contents in (
        b"no checkpoint\n",
        pickle.dumps(torch.ones(1), protocol=2),
        pickle.dumps(Call(print), protocol=2),
    ):
        path.write_bytes(contents)
        message = refusal(lambda: load_fairseq(path))
        assert "weights_only" not in message and "Re-running" not in message


class Call:
    """Pickled as a call, which plain unpickling executes."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    """Objects that make a file at `marker` when they are unpickled carelessly, and what their refusal names."""
    import builtins
    import operator
    import os
    import subprocess

    write = f"open({str(marker)!r}, 'w').close()"
    touch = f"touch {marker}"
    return {
        "os.system": (Call(os.system, touch), "posix.system"),
        "builtins.eval": (Call(eval, write), "eval"),
        "builtins.exec": (Call(exec, write), "exec"),
        "subprocess": (Call(subprocess.check_call, ["touch", str(marker)]), ".check_call"),
        "getattr": (Call(getattr, Call(builtins.__import__, "os"), "system"), "getattr"),
        "operator.methodcaller": (Call(operator.methodcaller, "system", touch), "operator.methodcaller"),
        "torch.load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "torch.storage": (Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, touch))), "torch.storage"),
        "torch.hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "a file": (Call(open, str(marker), "w"), "open"),
    }


@pytest.mark.parametrize("form", ["fairseq", "fairseq2"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", attacks(Path()))
def test_malicious_files_are_refused_and_not_executed(attack: str, zipped: bool, form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    payload, named = attacks(marker)[attack]
    state = fairseq_state(SMALL["base"])
    state = state if form == "fairseq" else fairseq2_state(state, SMALL["base"])
    torch.save({"model": state, "cfg": payload}, path, _use_new_zipfile_serialization=zipped)
    assert form_of(path) == form
    message = refusal(lambda: import_checkpoint(path, tmp_path / "in"))
    assert named in message and "could run code" in message
    assert not marker.exists() and not (tmp_path / "in").exists()


@pytest.mark.parametrize("attack", attacks(Path()))
def test_malicious_tensors_of_fairseq2_are_refused_and_not_executed(attack: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    payload, named = attacks(marker)[attack]
    state = {**fairseq2_state(fairseq_state(SMALL["base"]), SMALL["base"]), "masker.temporal_mask_embed": payload}
    for content in ({"model": state}, state, {"model": state, "w2vscale": payload}):
        torch.save(content, path)
        assert named in refusal(lambda: import_checkpoint(path, tmp_path / "in"))
        assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cannot be read: JSONDecodeError"),
        ("[]", "cannot be read: TypeError"),
        ("{}", "cannot be read: KeyError: 'model'"),
        ("[" * 100_000, "cannot be read: RecursionError"),
        ('{"model": 3, "regularization": {}, "objective": {}}', "cannot be read: TypeError"),
        ('{"model": {}, "regularization": {}, "objective": {"name": "ctc"}}', "objective.name='ctc' does not fit"),
        ('{"model": {}, "regularization": {}, "objective": {"name": "os:system"}}', "objective.name='os:system' does"),
        ('{"model": {"layers": 0}, "regularization": {}, "objective": {"name": "wav2vec2"}}', "model.layers=0"),
        ('{"model": {"layer": 3}, "regularization": {}, "objective": {"name": "wav2vec2"}}', "model.layer: unknown"),
        ('{"model": {}, "regularization": {}, "objective": {"name": "wav2vec2", "x": 3}}', "objective.x: unknown"),
        ('{"model": {}, "regularization": {}, "objective": {"name": "wav2vec2"}}', "is missing ("),
    ],
)
def test_settings_in_a_file_that_a_stranger_changed_are_refused(text: str, named: str, tmp_path: Path) -> None:
    state = fairseq2_state(fairseq_state(SMALL["base"]), SMALL["base"])
    path = save_fairseq2(tmp_path / "model.pt", state, w2vscale=text)
    message = refusal(lambda: import_checkpoint(path, tmp_path / "in"))
    assert message.startswith(f"{path}: ") and named in message


def test_settings_in_a_file_cannot_name_other_files(tmp_path: Path) -> None:
    state, path = fairseq2_ctc_state(fairseq_state(SMALL["base"]), SMALL["base"], 3), tmp_path / "model.pt"
    for objective in ({"vocabulary": "/etc/passwd"}, {"vocabulary": ["<s>", "a", "▁"], "sentencepiece": "/etc/passwd"}):
        settings = our_settings(SMALL["base"], name="ctc", **objective)
        save_fairseq2(path, state, w2vscale=settings)
        message = refusal(lambda: import_checkpoint(path, tmp_path / "in"))
        assert "does not fit the tensors, or names files" in message


def test_files_of_fairseq2_that_are_cut_or_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = fairseq2_state(fairseq_state(SMALL["base"]), SMALL["base"])
    content = save_fairseq2(path, state, w2vscale=our_settings(SMALL["base"])).read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        assert "cut short or damaged" in refusal(lambda: import_checkpoint(path, tmp_path / "in"))
    for name, change, named in (
        ("encoder.layers.1.ffn.inner_proj.bias", None, "encoder.layers.1.ffn.inner_proj.bias is missing (1 missing"),
        ("encoder.layers.1.lora.weight", torch.ones(3), "encoder.layers.1.lora.weight is unknown (1 unknown"),
        ("final_proj.weight", torch.ones(3), "final_proj.weight has shape [3]"),
        ("module.final_proj.bias", torch.ones(20), "final_proj.bias is there twice, once as module.final_proj.bias"),
        ("final_proj.bias", torch.ones(20).int(), "final_proj.bias is torch.int32, not floating point"),
        ("final_proj.bias", torch.ones(20).to_sparse(), "final_proj.bias is torch.sparse_coo, not dense"),
        ("encoder_frontend.pos_encoder.conv.weight_v", None, "pos_encoder.conv.weight_v is missing (1 missing"),
    ):
        changed = {key: tensor for key, tensor in {**state, name: change}.items() if tensor is not None}
        save_fairseq2(path, changed, w2vscale=our_settings(SMALL["base"]))
        assert named in refusal(lambda: import_checkpoint(path, tmp_path / "in"))
    save_fairseq2(path, {name: tensor for name, tensor in state.items() if "pos_encoder" not in name})
    assert "pos_encoder.conv.weight_v is missing: is this" in refusal(lambda: import_checkpoint(path, tmp_path / "in"))


def test_names_of_tensors_show_the_format_of_a_file(tmp_path: Path) -> None:
    fairseq, path = fairseq_state(SMALL["base"]), tmp_path / "model.pt"
    fairseq2 = fairseq2_state(fairseq, SMALL["base"])
    for state, form in (
        (fairseq, "fairseq"),
        (fairseq2, "fairseq2"),
        ({f"module.{name}": tensor for name, tensor in fairseq2.items()}, "fairseq2"),
        ({}, "fairseq"),
    ):
        for zipped in (True, False):
            torch.save({"model": state}, path, _use_new_zipfile_serialization=zipped)
            assert form_of(path) == form
    path.write_bytes(b"no file of PyTorch")
    assert form_of(path) == "fairseq"
    assert form_of(tmp_path / "none.pt") is None and form_of(tmp_path) is None
    assert "No such file" in refusal(lambda: import_checkpoint(tmp_path / "none.pt", tmp_path / "in"))


def test_the_attacks_would_work_where_files_are_trusted(tmp_path: Path) -> None:
    for number, name in enumerate(("os.system", "builtins.eval", "torch.storage")):
        marker = tmp_path / str(number)
        payload, _ = attacks(marker)[name]
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(payload))
        assert marker.exists(), name


def test_a_bare_pickle_with_a_call_is_not_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    for payload, _ in attacks(marker).values():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps({"model": payload}, protocol=protocol))
            refusal(lambda: load_fairseq(path))
            assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_allowed_names_are_inert_even_where_such_a_class_exists(zipped: bool, tmp_path: Path) -> None:
    """A class of fairseq's or omegaconf's that acts when it is made, called or filled is never reached."""
    marker, path = tmp_path / "executed", tmp_path / "model.pt"

    class DictConfig:
        def __new__(cls, *args: Any) -> Any:
            if args:
                marker.touch()
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            marker.touch()

    class Evil:
        pass

    payload = {
        "called": Call(DictConfig, "touch", state={"_content": {"dropout": 0.3}}),
        "filled": Call(DictConfig, state=({"__class__": 3}, {"__class__": Evil})),
        "called with a class": Call(Evil, DictConfig, list),
        "Namespace": Call(Namespace, state={"__class__": Evil}),
    }
    state, model = fairseq_state(SMALL["base"]), model_settings(SMALL["base"])
    with modules(omegaconf__dictconfig={"DictConfig": DictConfig}, fairseq__utils={"Evil": Evil}):
        marker.unlink(missing_ok=True)
        torch.save(
            {"model": state, "cfg": {"model": {**model, "dropout": payload}}, "task_state": payload},
            path,
            _use_new_zipfile_serialization=zipped,
        )
        checkpoint = load_fairseq(path)
        assert not marker.exists()
    assert checkpoint.settings["dropout"]["called"] == {"dropout": 0.3}
    assert "regularization.dropout=" in refusal(lambda: from_fairseq(checkpoint))


def test_a_stand_in_does_not_take_the_place_of_a_tensor(tmp_path: Path) -> None:
    class Tensor:
        pass

    with modules(fairseq__tensor={"Tensor": Tensor}):
        torch.save({"model": {"mask_emb": Tensor()}}, tmp_path / "model.pt")
    assert "is not a dictionary of tensors" in refusal(lambda: load_fairseq(tmp_path / "model.pt"))


def test_settings_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    cfg: dict[str, Any] = {"model": {}}
    cfg["model"]["again"] = cfg
    torch.save({"model": {"mask_emb": torch.ones(1)}, "cfg": cfg}, tmp_path / "model.pt")
    assert "settings are nested too deeply" in refusal(lambda: load_fairseq(tmp_path / "model.pt"))
