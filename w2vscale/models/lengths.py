"""How many frames the feature encoder makes of how many samples."""

from __future__ import annotations

import math

from w2vscale.config.tree import ModelConfig


def hop(config: ModelConfig) -> int:
    """Samples between the beginnings of consecutive frames."""
    return math.prod(stride for _, _, stride in config.conv_layers)


def output_frames(samples: int, config: ModelConfig) -> int:
    """Frames of an utterance of `samples` samples (0 if it is too short)."""
    for _, kernel, stride in config.conv_layers:
        samples = max((samples + 2 * conv_padding(kernel, config) - kernel) // stride + 1, 0)
    return samples


def input_samples(frames: int, config: ModelConfig) -> int:
    """Samples of the shortest utterance of `frames` frames, at least one."""
    samples = frames
    for _, kernel, stride in reversed(config.conv_layers):
        samples = max((samples - 1) * stride + kernel - 2 * conv_padding(kernel, config), 1)
    return samples


def conv_padding(kernel: int, config: ModelConfig) -> int:
    """Zeros before and after the input of one convolution of the feature encoder."""
    return (kernel - 1) // 2 if config.conv_padding else 0
