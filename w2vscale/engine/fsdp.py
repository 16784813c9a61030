"""FSDP2: parameters, gradients and optimizer state sharded by `fully_shard` (Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine.base import CanonicalState, Criterion, EngineCaps, StateReader, Sums
from w2vscale.engine.native import NativeEngine
from w2vscale.engine.rows import block_of_rows
from w2vscale.errors import UserError
from w2vscale.models.build import Wav2Vec2
from w2vscale.models.layers import compute_dtype


class FSDPEngine(NativeEngine):
    """Every rank holds a share of everything; a block's parameters are gathered while it computes."""

    caps = EngineCaps(name="fsdp", sharded_parameters=True, sharded_optimizer=True)

    def __init__(self, model: Wav2Vec2, criterion: Criterion, config: Config, device: torch.device) -> None:
        self.mesh = _mesh(device.type, config.engine.shard_size)
        self.host_mesh = _mesh("cpu", config.engine.shard_size)
        # The model changes no tensor in place, a view or not.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        self.reduce_each = config.engine.reshard_after_forward
        shard(model, self.mesh, config)
        model.to_empty(device="cpu" if config.engine.offload else device)
        super().__init__(model, model, criterion, config, device)
        if not self.reduce_each:
            # What follows a backward without reduction expects every unit to have been gathered once; LayerDrop may
            # have left one out so far.
            for unit in self._units():
                unit.unshard()
                unit.reshard()

    def evaluate(self, batch: MicroBatch) -> Sums:
        """See `Engine.evaluate`."""
        sums = super().evaluate(batch)
        # No backward follows that would do it. Gathered weights take memory, and outlive an import.
        for unit in self._units():
            unit.reshard()
        return sums

    def reducing(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are sharded after each backward where memory is what counts, otherwise after the last."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self.reduce_each)
        return nullcontext()

    def export_state(self) -> CanonicalState:
        """See `Engine.export_state`."""
        return {name: self._on_host(tensor) for name, tensor in self.live_state().items()}

    def import_state(self, reader: StateReader) -> None:
        """See `Engine.import_state`."""
        state = self.live_state()
        on_host = {name: self._on_host(tensor) for name, tensor in state.items()}
        reader.read_into(on_host)
        if self.device.type != "cpu":
            for name, tensor in state.items():
                _local(tensor).copy_(_local(on_host[name]))

    @torch.no_grad()
    def import_parameters(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.import_parameters`."""
        rank, size = self.mesh.get_local_rank(-1), self.mesh.size(-1)
        for name, whole in parameters:
            _local(self.parameters[name]).copy_(block_of_rows(whole, rank, size))

    def named_full_parameters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.named_full_parameters`."""
        for name, parameter in self.parameters.items():
            sharded = parameter.detach()
            assert isinstance(sharded, DTensor)
            yield name, sharded.full_tensor().to(dtype)

    def _units(self) -> Iterator[FSDPModule]:
        """The modules whose parameters are gathered and resharded together."""
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def _on_host(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        return DTensor.from_local(
            tensor.to_local().to("cpu"),
            self.host_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )


def shard(model: Wav2Vec2, mesh: DeviceMesh, config: Config) -> None:
    """Shard each block, then what is left; gradients are summed over the ranks, in fp32.

    Activations have the model's own types. Feature encoder and positional convolution keep their parameters in fp32:
    they are small, and normalisation's scale and weight norm want it.
    """
    # Pinning host memory is for copies to a device.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if config.engine.offload else OffloadPolicy()
    reduced = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config.precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    whole = replace(reduced, param_dtype=torch.float32)
    transformer = model.encoder.transformer
    units: list[tuple[nn.Module, MixedPrecisionPolicy]] = [
        (model.encoder.feature_encoder, whole),
        (transformer.positional, whole),
        *((block, reduced) for block in transformer.blocks),
        (model, reduced),
    ]
    for module, policy in units:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=config.engine.reshard_after_forward and module is not model,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _mesh(device_type: str, shard_size: int | None) -> DeviceMesh:
    world_size = dist.get_world_size()
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,))
    if world_size % shard_size:
        raise UserError(f"engine.shard_size={shard_size} does not divide {world_size} processes")
    return init_device_mesh(device_type, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
