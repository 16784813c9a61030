"""Tables of `w2vscale data stats`."""

from __future__ import annotations

import numpy as np
from rich.bar import Bar
from rich.markup import escape
from rich.table import Table

from w2vscale.cli.progress import console, counted
from w2vscale.config import Config
from w2vscale.corpora.stats import CorpusStats


def print_stats(stats: CorpusStats, config: Config) -> None:
    """Print totals, a histogram of durations, the buckets of the plan, and the shares of a mix."""
    plan, settings = stats.plan, config.data
    console.print(_totals(stats))
    console.print()
    console.print(_histogram(stats))
    console.print()
    console.print(_buckets(stats, config.model.sampling_rate))
    if stats.mix:
        console.print()
        console.print(_mix(stats, config.mix.by))
    console.print(
        f"plan: {counted(len(plan.buckets), 'bucket')}, {counted(plan.per_epoch, 'micro-batch')} of at most "
        f"{config.batch.max_seconds:g} s per epoch, {plan.padding():.2%} padding; utterances cropped to "
        f"{settings.max_seconds:g} s, {plan.left_out:,} shorter than {settings.min_seconds:g} s left out"
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _totals(stats: CorpusStats) -> Table:
    table = Table(box=None, show_header=False)
    seconds = stats.durations
    table.add_row("utterances", f"{seconds.size:,}")
    table.add_row("hours", f"{seconds.sum() / 3600:,.2f}")
    table.add_row("speakers", f"{stats.speakers:,}")
    table.add_row("transcribed", f"{stats.transcribed:,}")
    rates = sorted(stats.sampling_rates.items())
    table.add_row("sampling rates", ", ".join(f"{rate} Hz ({count:,})" for rate, count in rates))
    averages = f"{np.median(seconds):.2f} median, {seconds.mean():.2f} mean"
    table.add_row("seconds", f"{seconds.min():.2f} shortest, {averages}, {seconds.max():.2f} longest")
    return table


def _histogram(stats: CorpusStats) -> Table:
    table = _table("seconds", "utterances", "hours", "")
    rows = stats.histogram()
    most = max(count for _, _, count, _ in rows)
    for start, end, count, hours in rows:
        table.add_row(f"{start:.1f} - {end:.1f}", f"{count:,}", f"{hours:,.2f}", Bar(most, 0, count, width=40))
    return table


def _buckets(stats: CorpusStats, rate: int) -> Table:
    table = _table("bucket", "up to (s)", "utterances", "per micro-batch")
    shown = list(enumerate(stats.plan.buckets))
    for number, bucket in shown if len(shown) <= 12 else shown[:6] + shown[-6:]:
        longest = f"{bucket.longest / rate:.2f}"
        table.add_row(str(number), longest, f"{bucket.count:,}", str(bucket.per_micro_batch))
    return table


def _mix(stats: CorpusStats, by: str) -> Table:
    table = _table(by, "hours", "share of corpus", "share of epoch", "draws per epoch")
    table.columns[0].justify = "left"
    for name, hours, share, epoch_share, draws in stats.mix:
        table.add_row(escape(name), f"{hours:,.2f}", f"{share:.1%}", f"{epoch_share:.1%}", f"{draws:.2f}")
    return table
