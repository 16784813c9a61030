"""Model FLOPs utilisation (MFU, Chowdhery et al. 2022): the model's operations as a share of the peak of the GPUs."""

from __future__ import annotations

from w2vscale.errors import UserError
from w2vscale.hardware import device_name, peak_flops
from w2vscale.planning.work import flops_per_second_of_audio
from w2vscale.training.run import Run


def mfu_per_rate(run: Run) -> float | None:
    """Return the MFU of a run at one second of audio per second; multiply it by the rate of all ranks.

    Operations are those of forward and backward, without padding and recomputation. Returns None on other ranks than
    0, on a CPU, for fp32, for a GPU whose peak is not known, and for an objective whose operations cannot be counted.
    """
    if not run.ranks.is_main or run.device.type != "cuda" or run.config.precision.compute != "bf16":
        return None
    if (peak := peak_flops(device_name(run.device))) is None:
        return None
    try:
        return flops_per_second_of_audio(run.config) / (peak * run.ranks.world_size)
    except UserError:
        return None
