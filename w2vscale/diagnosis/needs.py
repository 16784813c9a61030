"""What training with the default settings needs, in numbers that the checks compare a machine with."""

from __future__ import annotations

from w2vscale.config import Config, load_config

CHECKPOINTS = {"base": 1.14e9, "large": 3.8e9, "xlsr_300m": 3.8e9, "xlsr_1b": 11.6e9, "xlsr_2b": 26e9}
"""Bytes of a checkpoint: weights and two moments in fp32, 12 bytes per parameter."""

AUDIO_RATE = 6_077
"""Seconds of audio that an H100 trains on per second, with `base` (docs/performance.md)."""

LOADER_RATE = 1_500
"""Seconds of FLAC that a loader process decodes per second (docs/performance.md)."""

FLAC_BYTES = 17_000
"""Bytes of a second of FLAC with 16 kHz, as in LibriSpeech: 960 hours in 59 GB."""

UTTERANCE = 12.3
"""Mean seconds of an utterance of LibriSpeech."""

GRADIENTS = 380e6
"""Bytes of the gradients of `base` in fp32."""


def micro_batches_in_flight(config: Config, world_size: int) -> int:
    """How many micro-batches the loader processes of a rank keep ready: see `w2vscale.data.loading.Loader`."""
    workers = config.data.workers
    return workers * max(config.data.prefetch, -(-_per_rank(config, world_size) // max(workers, 1)))


def shared_memory(preset: str, ranks: int, world_size: int, *, gpus: int) -> int:
    """Bytes in /dev/shm when the loader processes of a machine with `ranks` ranks have loaded all that they may."""
    config = load_config(preset)
    count = micro_batches_in_flight(config, world_size)
    if not gpus:  # otherwise the window of the current update is in pinned memory
        count += _per_rank(config, world_size)
    samples = config.batch.max_seconds * config.model.sampling_rate
    return int(ranks * count * samples * 4)


def open_files(world_size: int) -> int:
    """File descriptors of a rank, about: libraries and logs, loaders and their micro-batches, links to other ranks.

    A rank on two cores with the loader of `base` had 114 open; libraries for GPUs have more.
    """
    config = load_config("base")
    return 128 + 4 * config.data.workers + micro_batches_in_flight(config, world_size) + 2 * world_size


def _per_rank(config: Config, world_size: int) -> int:
    """Micro-batches of an update that a rank runs."""
    return -(-config.batch.micro_batches // world_size)


def update_seconds(world_size: int) -> float:
    """Seconds in which `world_size` H100 compute an update of `base`."""
    batch = load_config("base").batch
    return batch.micro_batches * batch.max_seconds / (AUDIO_RATE * world_size)
