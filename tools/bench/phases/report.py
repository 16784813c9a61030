"""What the rows of all phases say together: the headline keys, the main figures, and the choices on this GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Document = Mapping[str, Any]


def headline(document: Document) -> dict[str, Any]:
    """The keys that others read; None is what was not measured."""
    agreement = _rows(document, "correctness").get("engines_agree")
    syncs = _rows(document, "synchronisations").get("compiled/syncs_per_update")
    found: dict[str, Any] = {"engines_agree": agreement, "syncs_per_update": syncs}
    for name in ("base", "large"):
        ours = best(_rows(document, f"rates_{name}"))
        theirs = best(_rows(document, f"transformers_{name}"))
        matrices = _rows(document, f"rates_{name}").get("matrix_flops")
        pair = same_work(_rows(document, f"rates_{name}"), _rows(document, f"transformers_{name}"))
        found[name] = {
            "audio_per_second": ours and ours[1]["audio_per_second"],
            "mfu": ours and ours[1]["mfu"],
            "mfu_of_measured": ours[1]["flops_per_second"] / matrices if ours and matrices else None,
            "best": ours and ours[0],
            "transformers_audio_per_second": theirs and theirs[1]["audio_per_second"],
            "ratio": pair and pair[1],
            "ratio_of": pair and pair[0],
            "ratio_of_bests": ours[1]["audio_per_second"] / theirs[1]["audio_per_second"] if ours and theirs else None,
        }
    return found


def best(rows: Document, prefix: str = "") -> tuple[str, Mapping[str, Any]] | None:
    """The row with the highest rate, and its key."""
    rates = {
        key: row
        for key, row in rows.items()
        if key.startswith(prefix) and isinstance(row, Mapping) and "audio_per_second" in row
    }
    return max(rates.items(), key=lambda item: float(item[1]["audio_per_second"]), default=None)


def same_work(ours: Document, theirs: Document) -> tuple[str, float] | None:
    """The forward at which Transformers is fastest, and our rate over theirs there, both with a step per forward.

    Each side is compiled or eager, whichever is faster.
    """
    best_theirs = best(theirs)
    if best_theirs is None:
        return None
    forward = best_theirs[0].partition("/")[2]
    rates = [
        float(row["audio_per_second_stepping"])
        for key, row in ours.items()
        if key.partition("/")[2] == forward and isinstance(row, Mapping) and "audio_per_second_stepping" in row
    ]
    return (forward, max(rates) / float(best_theirs[1]["audio_per_second"])) if rates else None


def main_figures(document: Document) -> Iterator[tuple[str, str, str]]:
    """(phase, figure, value) of what a person wants to see first."""
    for phase, rows in document["phases"].items():
        for key, value in rows.items():
            if text := _text(key, value):
                yield phase, key, text
        if reason := document["failed"].get(phase):
            yield phase, "not finished", str(reason)


def _text(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and "error" in value:
        return value["error"][:80]
    if isinstance(value, Mapping) and "audio_per_second" in value:
        mfu = f", MFU {value['mfu']:.1%}" if value.get("mfu") is not None else ""
        window = f", window {value['window_ms']:.0f} ms, host {value['host_ms']:.0f} ms" if "host_ms" in value else ""
        memory = value.get("peak_memory_bytes")
        return f"{value['audio_per_second']:,.0f} s/s{mfu}{window}" + (f", {memory / 2**30:.1f} GiB" if memory else "")
    if isinstance(value, Mapping) and "first_ms" in value:
        return (
            f"new {value['first_ms']:.2f} ms (worst {value['first_ms_worst']:.1f}), again {value['second_ms']:.2f} ms, "
            f"{value['shapes']} shapes cost {value['extra_seconds']:.2f} s"
        )
    if isinstance(value, Mapping) and "wall_ms" in value:
        if value["busy_ms"] is None:
            return f"{value['wall_ms']:.0f} ms"
        return f"{value['wall_ms']:.1f} ms, busy {value['busy_ms']:.1f} ms, {value['launches']:,} launches"
    if isinstance(value, Mapping) and key.endswith("matrix_flops"):
        return ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in value.items()) + " TFLOP/s"
    if key == "matrix_flops":
        return f"{value / 1e12:.3g} TFLOP/s"
    if isinstance(value, Mapping) and "bare_decoding" in value:
        return f"{value['audio_seconds_per_second']:,.0f} s/s, bare decoding {value['bare_decoding']:,.0f} s/s"
    if isinstance(value, Mapping) and value and all(isinstance(each, float) for each in value.values()):
        return ", ".join(f"{name} {each:.2g}" for name, each in value.items())
    if key == "graphs" and value:
        return f"{max(value.values())} after {len(value)} forwards"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if key.startswith(("ddp_", "fsdp_", "zero")):
        return ""
    return str(value)[:160]


def choices(document: Document) -> dict[str, str]:
    """What to choose on this device, with the figures that say so. Only from phases that were measured."""
    found: dict[str, str] = {}
    rows = _rows(document, "operations")
    for name in ("base", "large"):
        for operation in ("positional", "convolution 0", "convolution 1", "convolution 5", "attention"):
            if ranking := _ranking(rows, f"{name}/{operation}/"):
                found[f"{operation} of {name}"] = ranking
    changes = _rows(document, "changes")
    for change in dict.fromkeys(key.rpartition("/")[0] for key in changes):
        if ranking := _ranking(changes, f"{change}/"):
            name, _, operation = change.partition("/")
            found[f"{operation} of {name}"] = ranking
    new = _rows(document, "new_shapes")
    for kind in ("attention", "positional", "second layer"):
        costs = {
            key.partition("/")[2]: row["extra_seconds"] / row["shapes"]
            for key, row in new.items()
            if key.startswith(f"{kind}/") and "extra_seconds" in row
        }
        if costs:
            ordered = sorted(costs.items(), key=lambda item: item[1])
            found[f"a new shape, {kind}"] = ", ".join(f"{form} {1000 * cost:.1f} ms" for form, cost in ordered)
    for name in ("base", "large"):
        rates = _rows(document, f"rates_{name}")
        for kind in ("eager", "compiled"):
            if (equal := best(rates, f"{kind}/")) and equal[0].endswith("/equal"):
                padded = rates.get(f"{equal[0].removesuffix('/equal')}/bucket", {})
                if "audio_per_second" in padded:
                    loss = 1 - padded["audio_per_second"] / equal[1]["audio_per_second"]
                    found[f"padding of {name}, {kind}"] = f"costs {loss:.1%} of the rate at {equal[0]}"
    return found


def _ranking(rows: Document, prefix: str) -> str:
    times = {
        key.removeprefix(prefix): value
        for key, value in rows.items()
        if key.startswith(prefix) and isinstance(value, int | float)
    }
    return ", ".join(f"{form} {time:.2f} ms" for form, time in sorted(times.items(), key=lambda item: item[1]))


def _rows(document: Document, phase: str) -> Document:
    rows: Document = document["phases"].get(phase, {})
    return rows
