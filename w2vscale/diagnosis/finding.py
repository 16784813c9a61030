"""What a check finds, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from w2vscale.errors import counted

Verdict = Literal["ok", "warn", "fail"]
"""ok: nothing to do. warn: runs work, but slower or without some feature. fail: a run that needs this will not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found there, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Finding:
    """A finding that needs no action."""
    return Finding(name, "ok", found)


def warn(name: str, found: str, advice: str) -> Finding:
    """A finding that makes runs slower, or a feature unusable."""
    return Finding(name, "warn", found, advice)


def fail(name: str, found: str, advice: str) -> Finding:
    """A finding that makes runs fail."""
    return Finding(name, "fail", found, advice)


def failed(findings: Iterable[Finding]) -> bool:
    """Whether a check has failed."""
    return any(finding.verdict == "fail" for finding in findings)


def summary(findings: Iterable[Finding]) -> str:
    """The last line of the report, such as "2 warnings, 1 failure"."""
    verdicts = [finding.verdict for finding in findings]
    counts = (("warning", verdicts.count("warn")), ("failure", verdicts.count("fail")))
    return ", ".join(counted(count, noun) for noun, count in counts if count) or "no problems found"


def listed(items: Iterable[object], most: int = 8) -> str:
    """The first items, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def gigabytes(size: float) -> str:
    """A number of bytes in GB (10^9 bytes), or in MB if it is below one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
