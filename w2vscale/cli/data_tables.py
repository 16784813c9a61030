"""Tables of `w2vscale data stats`."""

from __future__ import annotations

from rich.bar import Bar
from rich.table import Table

from w2vscale.cli.progress import console, counted
from w2vscale.config import Config
from w2vscale.corpora.stats import CorpusStats


def print_stats(stats: CorpusStats, config: Config) -> None:
    """Print totals, a histogram of durations, and the buckets of the plan."""
    console.print(_totals(stats))
    console.print()
    console.print(_histogram(stats))
    console.print()
    console.print(_buckets(stats))
    if stats.mix:
        console.print()
        console.print(_mix(stats, config))
    console.print(
        f"plan: {counted(len(stats.buckets), 'bucket')}, {counted(stats.micro_batches, 'micro-batch')} of at most "
        f"{config.batch.max_seconds:g} s per epoch, {stats.padding:.2%} padding; utterances cropped to "
        f"{config.data.max_seconds:g} s, {stats.left_out:,} shorter than {config.data.min_seconds:g} s left out"
    )


def _totals(stats: CorpusStats) -> Table:
    table = Table(box=None, show_header=False)
    rates = ", ".join(f"{rate} Hz ({count:,})" for rate, count in sorted(stats.sampling_rates.items()))
    for name, value in (
        ("utterances", f"{stats.utterances:,}"),
        ("hours", f"{stats.hours:,.2f}"),
        ("speakers", f"{stats.speakers:,}"),
        ("transcribed", f"{stats.transcribed:,}"),
        ("sampling rates", rates),
        (
            "seconds",
            f"{stats.shortest:.2f} shortest, {stats.median:.2f} median, {stats.mean:.2f} mean, "
            f"{stats.longest:.2f} longest",
        ),
    ):
        table.add_row(name, value)
    return table


def _histogram(stats: CorpusStats) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("seconds", justify="right")
    table.add_column("utterances", justify="right")
    table.add_column("hours", justify="right")
    table.add_column("")
    most = max(count for _, _, count, _ in stats.histogram)
    for start, end, count, hours in stats.histogram:
        table.add_row(f"{start:.1f} - {end:.1f}", f"{count:,}", f"{hours:,.2f}", Bar(most, 0, count, width=40))
    return table


def _buckets(stats: CorpusStats) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("bucket", "up to (s)", "utterances", "per micro-batch"):
        table.add_column(column, justify="right")
    shown = list(enumerate(stats.buckets))
    for number, bucket in shown if len(shown) <= 12 else shown[:6] + shown[-6:]:
        table.add_row(
            str(number),
            f"{bucket.longest_seconds:.2f}",
            f"{bucket.utterances:,}",
            str(bucket.per_micro_batch),
        )
    return table


def _mix(stats: CorpusStats, config: Config) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column(config.mix.by)
    for column in ("hours", "share of corpus", "share of epoch", "draws per epoch"):
        table.add_column(column, justify="right")
    for group in stats.mix:
        shares = (f"{share:.1%}" for share in (group.share, group.epoch_share))
        table.add_row(group.name, f"{group.hours:,.2f}", *shares, f"{group.draws:.2f}")
    return table
