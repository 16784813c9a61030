"""The memory of tensors, counted one by one: the same on any device and in any allocator."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        for tensor in given:
            if tensor.untyped_storage()._cdata not in self.known:
                self._watch(tensor, counts=False)
        result = self.call(function, args, kwargs or {}, given)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self.known:
                self._watch(made, counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def call(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> Any:
        """Run an operation, with the tensors `given` among its arguments."""
        return function(*args, **kwargs)

    def _watch(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() if counts else 0
        self.known.add(storage._cdata)
        self.live += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size
