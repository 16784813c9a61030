"""The DeepSpeed engine: ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020, arXiv:1910.02054).

Importing and exporting state uses private names of DeepSpeed, so its version is pinned in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import EngineConfig, OptimConfig, PrecisionConfig
from w2vscale.data.inputs import to_device
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.accumulation import Forward, accumulate, split
from w2vscale.engine.base import AfterStep, ExportedState, StateReader, StoredState
from w2vscale.engine.buffers import Buffers
from w2vscale.engine.deepspeed.config import (
    check_partition_size,
    deepspeed_config,
    environment_for,
    import_deepspeed,
    validate_zero,
)
from w2vscale.engine.reduction import reduces_in_bf16
from w2vscale.engine.rows import Rows
from w2vscale.engine.transforms import compiles, transform
from w2vscale.models.layers import compute_dtype
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.objectives.details import Details
from w2vscale.optim.adamw import allocate_state, make_adamw, parameter_groups, set_learning_rate
from w2vscale.optim.canonical import MOMENTS, Specs, expected_tensors, stored
from w2vscale.optim.ema import AVERAGE, exchange_average, start_average, update_average


class DeepSpeedEngine:
    """Stage 1 shards the optimizer state, stage 2 also gradients, stage 3 also parameters."""

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        precision: PrecisionConfig,
        device: torch.device,
    ) -> None:
        document = deepspeed_config(engine, optim, precision)
        deepspeed = import_deepspeed(device)
        validate_zero(document, engine.deepspeed_config)
        self.stage = int(document["zero_optimization"]["stage"])
        self.device = device
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        check_partition_size(document, engine.deepspeed_config, self.world_size)
        if not reduces_in_bf16(precision):  # a single process would round its gradients for nothing
            document["communication_data_type"] = "fp32"
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.ema_decay = optim.ema_decay
        self.expected = expected_tensors(model, average=self.ema_decay > 0)
        self.buffers = Buffers(model)
        self.compiled = compiles(engine, device) and self.stage < 3  # ZeRO-3 gathers parameters inside blocks
        transform(model, engine, compiled=self.compiled)
        with ExitStack() as environment:
            environment.enter_context(environment_for(device))
            environment.callback(_release_secondary_group)
            if self.stage == 3:
                _partition(deepspeed, model, document, device, compute_dtype(precision))
            else:
                model.to_empty(device=device)
            self.parameters = dict(model.named_parameters())
            self.trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
            groups = parameter_groups([(name, self.shapes[name]) for name in self.trained], optim)
            self.engine: Any = deepspeed.initialize(
                model=model,
                optimizer=make_adamw(self.trained, groups, optim),
                config=document,
                dist_init_required=False,
            )[0]
            # DeepSpeed has cast everything to the activation dtype. Buffers and frozen parameters become fp32 again:
            # they have no master copy.
            self.buffers.lay_out(device)
            for name, parameter in self.parameters.items():
                if name not in self.trained and self.stage < 3:
                    parameter.data = parameter.data.float()
            self.zero: Any = self.engine.optimizer
            allocate_state(self.zero.optimizer, self._partitions(), average=self.ema_decay > 0)
            if self.stage < 3:
                self.zero._lazy_init_hp_params_optimizer_state()
            self.rows = Rows(device)
            self.environment = environment.pop_all()  # until `close`: DeepSpeed reads it in every forward

    def run_window(
        self, window: Sequence[MicroBatch], objective: Objective, step: StepContext, *,
        per_forward: int, denominator: Tensor, between_forwards: Callable[[], None] | None = None,
    ) -> Sums:  # fmt: skip
        """DeepSpeed averages gradients, so the loss is multiplied by the world size."""
        self.engine.train()
        self._discard_gradients()
        scale = self.world_size / denominator

        def run(one: Forward) -> Sums:
            sums = objective.forward(self.engine, one.inputs, step=one.step, training=True)
            self.engine.backward(sums.total * scale, scale_wrt_gas=False)
            return sums

        return accumulate(split(window, per_forward), step, run, self.device, between_forwards)

    def step(self, *, lr: float, max_norm: float | None, after: AfterStep | None = None) -> Tensor:
        assert after is None, "see `build_engine`"
        self.zero.clip_grad = max_norm or 0.0
        set_learning_rate(self.zero, lr)
        self.engine.step()
        self.buffers.synchronize()
        # A tensor in some stages and a float in others; infinite if the step was skipped.
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        update_average(self.zero.optimizer, norm, self.ema_decay)
        return norm

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, objective: Objective, step: StepContext) -> Sums:
        self.engine.eval()
        run = lambda one: objective.forward(self.engine, one.inputs, step=one.step, training=False)  # noqa: E731
        return accumulate([[batch]], step, run, self.device)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.ema_decay:
            yield
            return
        exchange_average(self.zero.optimizer)
        self._refresh_working_weights()
        try:
            yield
        finally:
            exchange_average(self.zero.optimizer)
        # Not after an error, where other ranks may not come. The masters can still be exported.
        self._refresh_working_weights()

    @torch.no_grad()
    def inspect(
        self, batch: MicroBatch, objective: Objective, *, samples: int, blocks: Sequence[int]
    ) -> Details | None:
        self.engine.eval()
        inputs = to_device(batch.inputs, self.device)
        return objective.inspect(self.engine, inputs, samples=samples, blocks=blocks)

    def export_state(self) -> ExportedState:
        """Each tensor is gathered when it is made, and only the rows of this rank are kept."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: ExportedState = {}
        step = next(iter(self.zero.optimizer.state.values()))["step"]

        def defer(key: str, gather: Callable[[], Tensor]) -> None:
            spec = self.expected[key]
            state[key] = self.rows.gathered(spec, lambda: gather().view(spec.shape))

        for name, parameter in self.parameters.items():
            if name not in self.trained:
                defer(f"model.{name}", partial(self._gathered, parameter))
                continue
            defer(f"model.{name}", partial(safe_get_full_fp32_param, parameter))
            for key in MOMENTS:
                defer(f"optim.{name}.{key}", partial(safe_get_full_optimizer_state, parameter, key))
            if self.ema_decay:
                defer(f"ema.{name}", partial(safe_get_full_optimizer_state, parameter, AVERAGE))
            state[f"optim.{name}.step"] = step
        return state | {f"model.{name}": self.rows.own(stored(buffer)) for name, buffer in self.buffers.persistent()}

    def import_state(self, reader: StoredState) -> None:
        specs = self.expected.items()
        self._read(reader, {name: x for name, x in specs if reader.has_average or not name.startswith("ema.")})
        if not reader.has_average:
            start_average(self.zero.optimizer)

    def import_model(self, reader: StateReader, names: Iterable[str]) -> None:
        self._read(reader, {f"model.{name}": self.expected[f"model.{name}"] for name in names})
        start_average(self.zero.optimizer)

    def _read(self, reader: StateReader, specs: Specs) -> None:
        buffers = dict(self.buffers.persistent())
        for name, whole in self.rows.read(reader, specs):
            kind, _, name = name.partition(".")
            if kind == "model":
                self._set_value(name, whole, buffers)
                continue
            if kind == "ema":
                self._set(name, AVERAGE, whole)
                continue
            name, _, key = name.rpartition(".")
            if key == "step":  # equal for all parameters
                for state in self.zero.optimizer.state.values():
                    state["step"].copy_(whole)
            else:
                self._set(name, key, whole)
        self._refresh_working_weights()

    def import_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        buffers = dict(self.buffers.persistent())
        for name, whole in values:
            self._set_value(name, whole.to(self.device), buffers)
        self._refresh_working_weights()
        start_average(self.zero.optimizer)

    def close(self) -> None:
        self.engine.destroy()
        self.environment.close()

    def _partitions(self) -> list[Tensor]:
        """Return the flat fp32 tensors that the optimizer of this rank steps."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # stage 1 in bf16 uses another optimizer class
            return list(self.zero.fp32_groups_flat_partition)
        return list(self.zero.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _set_value(self, name: str, whole: Tensor, buffers: dict[str, Tensor]) -> None:
        """Set a buffer, or this rank's partition of a parameter, from a whole tensor."""
        if name in buffers:
            buffers[name].copy_(whole)
        elif name in self.trained:
            self._set(name, None, whole)
        elif self.stage < 3:
            self.parameters[name].copy_(whole)
        else:
            parameter: Any = self.parameters[name]
            parameter.ds_tensor.copy_(self._part(parameter, whole))

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole tensor of a frozen parameter."""
        if self.stage < 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _part(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return this rank's partition of a parameter under ZeRO-3."""
        size = parameter.ds_tensor.numel()  # equal on every rank; the last partition is padded
        part = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        return F.pad(part, (0, size - part.numel()))

    def _set(self, name: str, key: str | None, whole: Tensor) -> None:
        """Set this rank's partition of a trained parameter or, if `key` is given, of that optimizer state."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter: Any = self.parameters[name]
        if self.stage < 3:
            parameter.set_full_hp_param(whole, key)
            return
        part = self._part(parameter, whole)
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def _discard_gradients(self) -> None:
        """Discard the gradients of the previous update, which DeepSpeed does not always do itself.

        ZeRO-3, and every stage with offloading, would step the parameters of skipped layers with old gradients. ZeRO-2
        with offloading in bf16 would keep adding to a non-finite gradient.
        """
        if self.stage == 3:
            self.zero.grad_partitions_flat_buffer.zero_()
        for partition in self._partitions():
            if partition.grad is not None:
                partition.grad.zero_()
        for kept in ("norm_for_param_grads", "averaged_gradients"):
            getattr(self.zero, kept, {}).clear()

    def _refresh_working_weights(self) -> None:
        """Copy the fp32 master weights to the weights that forward and backward use."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        for parameter in self.parameters.values():  # the epilogue drops only those of trained parameters
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
        self.zero.checkpoint_event_epilogue()


def _release_secondary_group() -> None:
    """Destroy the process group of hpZ, which DeepSpeed keeps in a global and would not create a second time."""
    from deepspeed import comm
    from deepspeed.utils import groups

    if (group := groups._get_zero_param_intra_parallel_group()) is not None:
        comm.destroy_process_group(group)


def _partition(
    deepspeed: Any, model: nn.Module, document: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Allocate an empty model as ZeRO-3 partitions, module by module. The parameters have no values yet."""
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=document, dtype=dtype)
    for module in model.modules():
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters(module.parameters(recurse=False))
