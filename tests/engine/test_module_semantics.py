"""Buffers, frozen parameters and a teacher in one process; tests/distributed has two processes and every engine."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.audio import SmallCorpus
from tests.helpers.semantics import (
    DECAY,
    Extras,
    Updates,
    WithExtras,
    WithTeacher,
    buffers_of,
    built,
    updates_with,
    whole_state,
)
from w2vscale.engine.buffers import Buffers
from w2vscale.objectives.base import empty_model
from w2vscale.optim.canonical import expected_tensors, specs_of


class TestBuffers:
    def test_they_survive_a_cast_and_lost_memory_in_their_own_types(self) -> None:
        model, expected = nn.Sequential(Extras(4), Extras(6)), nn.Sequential(Extras(4), Extras(6))
        buffers = Buffers(model)
        model.bfloat16().to_empty(device="cpu")
        buffers.lay_out(torch.device("cpu"))
        found = dict(model.named_buffers())
        assert found.keys() == dict(expected.named_buffers()).keys()
        for name, buffer in expected.named_buffers():
            assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), name

    def test_values_are_copies(self) -> None:
        model = Extras(4)
        original = model.scale
        buffers = Buffers(model)
        original.zero_()
        buffers.lay_out(torch.device("cpu"))
        assert model.scale.all()

    def test_one_with_two_names_stays_one(self) -> None:
        model = nn.Sequential(Extras(4), Extras(4))
        model[1]._buffers["scale"] = model[0].scale
        buffers, value = Buffers(model), model[0].scale.clone()
        model.to_empty(device="cpu")
        buffers.lay_out(torch.device("cpu"))
        assert model[1].scale is model[0].scale and torch.equal(model[0].scale, value)
        names = [name for name, _ in buffers.persistent()]
        assert "0.scale" in names and "1.scale" not in names
        assert {f"model.{name}" for name in names} < expected_tensors(model).keys()

    def test_a_block_may_leave_them_unchanged(self) -> None:
        model = nn.BatchNorm1d(3)
        with Buffers(model).unchanged():
            model(torch.randn(5, 3))
            assert model.running_mean is not None and model.running_mean.any()
        assert not model.running_mean.any() and int(model.num_batches_tracked) == 0  # type: ignore[arg-type]

    def test_the_persistent_ones_are_those_of_a_state_dict(self) -> None:
        model = nn.Sequential(Extras(4), nn.Linear(2, 2), nn.BatchNorm1d(3, affine=False))
        names = [name for name, _ in Buffers(model).persistent()]
        parameters = dict(model.named_parameters())
        assert sorted(names) == sorted(name for name in model.state_dict() if name not in parameters)
        assert "0.offset" not in names and "2.running_mean" in names


def test_the_exported_state_is_what_a_checkpoint_expects(small_corpus: SmallCorpus) -> None:
    with built(WithExtras, str(small_corpus.train), ()) as setup:
        expected = expected_tensors(empty_model(setup.objective))
        assert specs_of(setup.engine.export_state()) == expected
        assert "model.extras.frozen" in expected and "optim.extras.frozen.step" not in expected


def test_values_of_buffers_are_imported(small_corpus: SmallCorpus) -> None:
    with built(WithExtras, str(small_corpus.train), ()) as setup:
        values = [(name, torch.ones_like(value)) for name, value in setup.initial_values()]
        setup.engine.import_values(values)
        assert all(bool((tensor == 1).all()) for name, tensor in whole_state(setup).items() if name.startswith("model"))
        offset = buffers_of(setup)["extras.offset"]
    assert torch.equal(offset, Extras(16).offset)


def test_a_skipped_update_changes_no_parameter_and_calls_nothing_after_it(small_corpus: SmallCorpus) -> None:
    with built(WithTeacher, str(small_corpus.train), ()) as setup:
        before = whole_state(setup)
        setup.window([setup.training_set.largest()], float("nan"))
        assert not setup.step(1e-2).isfinite()
        assert all(torch.equal(tensor, before[name]) for name, tensor in whole_state(setup).items())


def test_the_teacher_follows_the_student(small_corpus: SmallCorpus) -> None:
    found = Updates.unpacked(updates_with(WithTeacher, str(small_corpus.train), (), 2))
    name = "feature_projection.weight"
    expected = found.states[0][f"model.teacher.{name}"].double()
    for state in found.states[1:]:
        expected = DECAY * expected + (1.0 - DECAY) * state[f"model.encoder.{name}"].double()
    torch.testing.assert_close(found.states[-1][f"model.teacher.{name}"].double(), expected, rtol=1e-6, atol=1e-8)


def test_parameters_that_regularization_freezes_stay(small_corpus: SmallCorpus) -> None:
    """regularization.feature_grad_mult=0."""
    overrides = ("regularization.feature_grad_mult=0",)
    found = Updates.unpacked(updates_with(WithExtras, str(small_corpus.train), overrides, 2))
    first, *_, last = found.states
    frozen = [name for name in first if name.startswith("model.encoder.feature_encoder.")]
    assert len(frozen) == 9 and all(torch.equal(first[name], last[name]) for name in frozen)
    assert not any("encoder.feature_encoder" in name for name in first if name.startswith("optim."))


def test_statistics_change_and_constants_do_not(small_corpus: SmallCorpus) -> None:
    found = Updates.unpacked(updates_with(WithExtras, str(small_corpus.train), (), 2))
    first, last = found.buffers[0], found.buffers[-1]
    assert int(last["extras.norm.num_batches_tracked"]) == 2 * 4
    assert not torch.equal(first["extras.norm.running_var"], last["extras.norm.running_var"])
    for name in ("extras.scale", "extras.order", "extras.offset"):
        assert torch.equal(first[name], last[name])
