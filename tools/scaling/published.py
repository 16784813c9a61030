"""Two published training times of BASE, beside what the model says."""

from __future__ import annotations

from typing import NamedTuple

from tools.scaling.growth import predict
from w2vscale.planning.links import CLUSTERS, EFFICIENCY, GIGABIT, INFINIBAND, NVLINK, Cluster, Link
from w2vscale.planning.prediction import Setting
from w2vscale.planning.rates import Rates
from w2vscale.planning.work import Model

ONE_A100, EIGHT_A100 = 1546.0, 1346.0
"""Seconds of audio per second and GPU that NVIDIA reports for one A100, and for each of eight (DeepLearningExamples,
bf16, with a shortened transformer: only the ratio can be compared)."""

V100 = Cluster(
    "8 × V100 32 GB, NVLink 2, 100 Gb/s InfiniBand per node",
    8,
    Link(150e9 * EFFICIENCY, NVLINK),
    Link(100 * GIGABIT * EFFICIENCY, INFINIBAND),
    flops=1e14,  # fp16; it has no bf16, so that w2vscale cannot use them
    memory=32e9,
)

FAIRSEQ_DAYS = 1.6
"""Of 400,000 updates on 64 V100 (Baevski et al. 2020)."""


class Comparison(NamedTuple):
    """A published figure and the predicted one."""

    what: str
    published: float
    predicted: float


def comparisons(base: Model, setting: Setting) -> list[Comparison]:
    """Of eight GPUs from the rate of one, and of days with the MFU that this project has in `setting`."""
    of_one = Rates(flops=ONE_A100 * base.flops, step=0.0, host=(0.0, 0.0))
    mfu = setting.rates.flops / setting.cluster.flops
    eight = predict(base, "ddp", 8, 8, Setting(CLUSTERS["a100"], "fastest", of_one))
    as_efficient = setting.rates._replace(flops=mfu * V100.flops)
    many = predict(base, "ddp", 64, 1, Setting(V100, "fastest", as_efficient))
    flops = base.micro_batch_seconds * base.flops / (FAIRSEQ_DAYS * 86400 / base.config.trainer.updates)
    return [
        Comparison(
            "NVIDIA, 8 A100: seconds of audio per second and GPU, from that of one", EIGHT_A100,
            eight.audio_per_second / 8,
        ),
        Comparison("fairseq, 64 V100: days", FAIRSEQ_DAYS, many.days),
        Comparison(
            "fairseq, 64 V100: MFU if nothing waits (the predicted one is assumed)",
            flops / V100.flops, mfu,
        ),
    ]  # fmt: skip
