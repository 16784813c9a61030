"""DeepSpeed ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020, arXiv:1910.02054).

Moving state in and out uses names that DeepSpeed keeps to itself; pyproject.toml pins the version they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import CanonicalState, Criterion, EngineCaps, StateReader, StepResult, Sums
from w2vscale.engine.deepspeed.config import deepspeed_config, import_deepspeed, validate_zero
from w2vscale.engine.joining import joining
from w2vscale.engine.rows import Rows
from w2vscale.engine.window import accumulate
from w2vscale.models.layers import compute_dtype
from w2vscale.optim.adamw import allocate_state, make_adamw, parameter_groups, set_learning_rate
from w2vscale.optim.canonical import MOMENTS, expected_tensors


class DeepSpeedEngine:
    """ZeRO shards optimizer state (1), gradients too (2), parameters too (3)."""

    caps: EngineCaps

    def __init__(self, model: nn.Module, criterion: Criterion, config: Config, device: torch.device) -> None:
        document = deepspeed_config(config)
        deepspeed = import_deepspeed(device.type)
        validate_zero(document, config.engine.deepspeed_config)
        self.stage = int(document["zero_optimization"]["stage"])
        self.caps = EngineCaps(f"zero{self.stage}", sharded_parameters=self.stage == 3, sharded_optimizer=True)
        self.criterion, self.device, self.joining = criterion, device, joining(config.batch.concat)
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.expected = expected_tensors(model)
        if self.stage == 3:
            _partition(deepspeed, model, document, device, compute_dtype(config.precision))
        else:
            model.to_empty(device=device)
        self.parameters = dict(model.named_parameters())
        groups = parameter_groups(list(self.shapes.items()), config.optim)
        self.engine: Any = deepspeed.initialize(
            model=model,
            optimizer=make_adamw(self.parameters, groups, config.optim),
            config=document,
            dist_init_required=False,
        )[0]
        self.zero: Any = self.engine.optimizer
        allocate_state(self.zero.optimizer, self._partitions())
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        self.rows = Rows(device)

    def run_window(self, window: Sequence[MicroBatch], denominator: Tensor) -> Sums:
        """See `Engine.run_window`. DeepSpeed averages gradients, hence the factor of the world size."""
        self.engine.train()
        self._forget_gradients()
        scale = self.world_size / denominator

        def run(chunk: Sequence[MicroBatch], last: bool) -> Sums:
            sums = self.criterion(self.engine, chunk, device=self.device, training=True)
            self.engine.backward(sums.total * scale, scale_wrt_gas=False)
            return sums

        return accumulate(self.joining.chunks(window), run, self.device)

    def step(self, *, lr: float, max_norm: float | None) -> StepResult:
        """See `Engine.step`."""
        self.zero.clip_grad = max_norm or 0.0
        set_learning_rate(self.zero, lr)
        self.engine.step()
        return StepResult(float(self.engine.get_global_grad_norm()), skipped=bool(self.zero.overflow))

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Sums:
        """See `Engine.evaluate`."""
        self.engine.eval()
        return self.criterion(self.engine, [batch], device=self.device, training=False)

    def export_state(self) -> CanonicalState:
        """See `Engine.export_state`. Gathers one tensor at a time; each rank keeps its rows of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: CanonicalState = {}
        step = next(iter(self.zero.optimizer.state.values()))["step"]
        for name, parameter in self.parameters.items():
            shape = self.shapes[name]
            state[f"model.{name}"] = self.rows.copied(safe_get_full_fp32_param(parameter).view(shape))
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key).view(shape)
                state[f"optim.{name}.{key}"] = self.rows.copied(whole)
            state[f"optim.{name}.step"] = self.rows.copied(step)
        return state

    def import_state(self, reader: StateReader) -> None:
        """See `Engine.import_state`."""
        for name, whole in self.rows.read(reader, {name: spec.shape for name, spec in self.expected.items()}):
            kind, _, name = name.partition(".")
            if kind == "model":
                self._set(name, None, whole)
                continue
            name, _, key = name.rpartition(".")
            if key == "step":  # the same of all parameters
                for state in self.zero.optimizer.state.values():
                    state["step"].copy_(whole)
            else:
                self._set(name, key, whole)
        self._refresh_working_weights()

    def import_parameters(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.import_parameters`."""
        for name, whole in parameters:
            self._set(name, None, whole.to(self.device))
        self._refresh_working_weights()

    def named_full_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.named_full_parameters`."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            yield name, safe_get_full_fp32_param(parameter).view(self.shapes[name]).to(dtype)

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.destroy()

    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that this rank's optimizer steps."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # of the optimizer that it takes for stage 1 in bf16
            return list(self.zero.fp32_groups_flat_partition)
        return list(self.zero.single_partition_of_fp32_groups)

    def _set(self, name: str, key: str | None, whole: Tensor) -> None:
        """Replace this rank's part of a parameter, or of its moment `key`."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter: Any = self.parameters[name]
        if self.stage < 3:
            parameter.set_full_hp_param(whole, key)
            return
        size = parameter.ds_tensor.numel()  # of every rank's part: the last one is padded
        part = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        part = F.pad(part, (0, size - part.numel()))
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def _forget_gradients(self) -> None:
        """ZeRO-3, and any stage that offloads, would step the parameters of skipped layers by gradients of an earlier
        update; ZeRO-2 that offloads in bf16 would add to a gradient that is not finite for ever."""
        if self.stage == 3:
            self.zero.grad_partitions_flat_buffer.zero_()
        for partition in self._partitions():
            if partition.grad is not None:
                partition.grad.zero_()
        for kept in ("norm_for_param_grads", "averaged_gradients"):
            getattr(self.zero, kept, {}).clear()

    def _refresh_working_weights(self) -> None:
        """Give forward and backward what the masters now hold."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()


def _partition(
    deepspeed: Any, model: nn.Module, document: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model without memory the partitioned parameters of ZeRO-3, module by module; their values come later."""
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=document, dtype=dtype)
    for module in model.modules():
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters(module.parameters(recurse=False))
