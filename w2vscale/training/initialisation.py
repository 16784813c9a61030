"""What a new run's parameters start from: drawn values, or those of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import Tensor

from w2vscale.checkpoint.consolidation import whole_tensors
from w2vscale.checkpoint.reading import open_checkpoint
from w2vscale.checkpoint.shards import stored_tensors, tensor_files
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError

ARCHITECTURE = {
    "sampling_rate", "normalize_waveform", "conv_layers", "conv_norm", "conv_norm_groups", "conv_bias", "conv_padding",
    "layers", "dim", "ffn_dim", "heads", "norm_first", "embedding_norm", "positional_kernel", "positional_groups",
    "codebooks", "codebook_entries", "codevector_dim", "quantizer_input", "target_projection", "projection_dim",
}  # fmt: skip
"""Settings of the model that its weights were trained with, whether their shapes show it or not."""


def starting_values(
    config: Config, drawn: Iterator[tuple[str, Tensor]], log: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """Each of `drawn`, or in its place that of `trainer.init_from`, one whole tensor at a time.

    Raises:
        UserError: a tensor is missing there, has another shape, or the model is another, and `trainer.init_allow`
            does not name it.
    """
    if config.trainer.init_from is None:
        yield from drawn
        return
    checkpoint = open_checkpoint(config.trainer.init_from, log)
    allowed = [re.compile(pattern) for pattern in config.trainer.init_allow]

    def refuse(name: str, problem: str) -> None:
        if not any(pattern.search(name) for pattern in allowed):
            raise UserError(
                f"trainer.init_from={config.trainer.init_from}: {name} {problem}; if that is meant, name it in "
                "trainer.init_allow"
            )

    theirs = load_config(checkpoint.path / "config.yaml").model.model_dump(mode="json")
    for key, value in config.model.model_dump(mode="json").items():
        if key in ARCHITECTURE and theirs[key] != value:
            refuse(f"model.{key}", f"is {theirs[key]} there and {value} here")
    stored = stored_tensors(tensor_files(checkpoint.path))
    unused = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    anew: list[str] = []
    taken = 0
    for name, value in drawn:
        unused.discard(name)
        found = stored.get(f"model.{name}")
        if found is None:
            refuse(name, "is missing")
        elif tuple(found.shape) != tuple(value.shape):
            refuse(name, f"is {list(found.shape)} there and {list(value.shape)} here")
        else:
            taken += 1
            yield name, next(whole_tensors({f"model.{name}": found}))
            continue
        anew.append(name)
        yield name, value
    log(f"starting from {checkpoint.path}: {taken} tensors taken")
    for what, names in (("drawn anew", anew), ("not used", sorted(unused))):
        if names:
            log(f"  {len(names)} {what}: {', '.join(names)}")
