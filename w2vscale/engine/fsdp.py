"""The FSDP2 engine: `fully_shard` shards parameters, gradients and optimizer state.

Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from w2vscale.config import EngineConfig, OptimConfig, PrecisionConfig
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.nodes import processes_per_node
from w2vscale.engine.base import CanonicalState, ExportedState, StateReader
from w2vscale.engine.buffers import Buffers
from w2vscale.engine.native import NativeEngine
from w2vscale.engine.reduction import Bf16ReduceScatter, SumOverReplicas, reduces_in_bf16
from w2vscale.engine.rows import in_parts, moved, on_host
from w2vscale.errors import UserError
from w2vscale.models.layers import compute_dtype
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.objectives.details import Details
from w2vscale.optim.canonical import specs_of, stored
from w2vscale.optim.ema import start_average


class FSDPEngine(NativeEngine):
    """Every rank holds a shard of the state. The parameters of a block are gathered while it runs."""

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        precision: PrecisionConfig,
        device: torch.device,
    ) -> None:
        shard_size = _shard_size(engine)
        mesh, self.host_mesh = _mesh(device.type, shard_size), _mesh("cpu", shard_size)
        self.reduce_each = engine.reshard_after_forward
        self.over_replicas: list[SumOverReplicas] = []  # with hybrid sharding in bf16
        replicas = None
        if reduces_in_bf16(precision) and mesh.ndim == 2:
            replicas = mesh.get_group("replicate")
            mesh, self.host_mesh = mesh["shard"], self.host_mesh["shard"]
        dtype = compute_dtype(precision)
        super().__init__(model, engine, optim, device, lambda model: shard(model, mesh, engine, dtype))
        if reduces_in_bf16(precision):
            self._reduce_in_bf16(replicas)
        if not self.reduce_each:
            # After a backward without reduction, FSDP expects every unit to have been gathered at least once, but
            # LayerDrop may have skipped some.
            for unit in _units(self.model):
                unit.unshard()
                unit.reshard()

    def evaluate(self, batch: MicroBatch, objective: Objective, step: StepContext) -> Sums:
        sums = super().evaluate(batch, objective, step)
        self._reshard()
        return sums

    def inspect(
        self, batch: MicroBatch, objective: Objective, *, samples: int, blocks: Sequence[int]
    ) -> Details | None:
        details = super().inspect(batch, objective, samples=samples, blocks=blocks)
        self._reshard()
        return details

    def _reshard(self) -> None:
        """Normally the backward reshards. Without it, gathered weights would take memory and survive an import as stale
        copies."""
        for unit in _units(self.model):
            unit.reshard()

    def reduce_gradients(self, last: bool) -> None:
        """Reduce gradients after the last backward of a window or, to save memory, after each (`reduce_each`).

        With hybrid sharding the latter sums them over the shards only. The replicas follow after the last backward.
        """
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self.reduce_each)
        self.model.set_requires_all_reduce(last)
        for over_replicas in self.over_replicas:
            over_replicas.last = last

    def _reduce_in_bf16(self, replicas: dist.ProcessGroup | None) -> None:
        for unit in _units(self.model):
            unit.set_custom_reduce_scatter(Bf16ReduceScatter())  # type: ignore[arg-type]  # its base class is private
            if replicas is not None:
                self.over_replicas.append(SumOverReplicas(replicas))
                unit.set_all_reduce_hook(self.over_replicas[-1])

    def export_state(self) -> ExportedState:
        state = {name: stored(tensor) for name, tensor in self.live_state().items()}
        return {name: on_host(x, self.host_mesh) if isinstance(x, DTensor) else x for name, x in state.items()}

    @torch.no_grad()
    def _read(self, reader: StateReader, state: CanonicalState) -> None:
        for names in in_parts(specs_of(state)):
            on_host = {name: self._on_host(state[name]) for name in names}
            reader.read_into(on_host)
            for name, tensor in on_host.items():
                _local(state[name]).copy_(_local(tensor))

    @torch.no_grad()
    def import_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        state = self.live_state()
        for name, whole in values:
            own = state[f"model.{name}"]
            if isinstance(own, DTensor):
                whole = distribute_tensor(whole, self.host_mesh, own.placements, src_data_rank=None)
            _local(own).copy_(_local(whole))
        start_average(self.optimizer)

    def _on_host(self, tensor: Tensor) -> Tensor:
        return moved(tensor, self.host_mesh) if isinstance(tensor, DTensor) else tensor.cpu()


def shard(model: Any, mesh: DeviceMesh, config: EngineConfig, dtype: torch.dtype) -> None:
    """Shard each block of each encoder, then the remaining parameters. Gradients are summed over the ranks, in fp32.

    The model decides the dtype of activations. Parameters of blocks and heads are gathered as `dtype`; those of the
    feature encoder and the positional convolution stay in fp32, because they are small and normalisation and weight
    norm need it.
    """
    # Pinned host memory makes copies to a GPU faster.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if config.offload else OffloadPolicy()
    reduced = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = replace(reduced, param_dtype=torch.float32)
    units: list[tuple[nn.Module, MixedPrecisionPolicy]] = []
    for encoder in [module for module in model.modules() if isinstance(module, Wav2Vec2Encoder)]:
        units += [(encoder.feature_encoder, whole), (encoder.transformer.positional, whole)]
        units += [(block, reduced) for block in encoder.transformer.blocks]
    for module, policy in [*units, (model, reduced)]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=config.reshard_after_forward and module is not model,
        )
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def shard_for_evaluation(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Shard an empty model over all ranks for forwards alone. Its parameters have no values yet. Collective."""
    buffers = Buffers(model)
    shard(model, _mesh(device.type, dist.get_world_size()), EngineConfig(name="fsdp"), dtype)
    model.to_empty(device=device)
    buffers.lay_out(device)


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules whose parameters are gathered and resharded together."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _shard_size(config: EngineConfig) -> int:
    """Return the number of ranks that share one copy of the model. Collective."""
    world_size = dist.get_world_size()
    if config.shard_size == "node":
        return processes_per_node("engine.shard_size=node")
    size = world_size if config.shard_size is None else config.shard_size
    if world_size % size:
        raise UserError(f"engine.shard_size={size} does not divide the number of processes ({world_size})")
    return size


def _mesh(device_type: str, shard_size: int) -> DeviceMesh:
    """Return the ranks as a row, or one row for each copy of the model; the ranks of a row are consecutive."""
    copies = dist.get_world_size() // shard_size
    if copies == 1:
        return init_device_mesh(device_type, (shard_size,))
    return init_device_mesh(device_type, (copies, shard_size), mesh_dim_names=("replicate", "shard"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
