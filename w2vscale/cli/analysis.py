"""`w2vscale probe` and `w2vscale report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli.arguments import Checkpoint, Layers, Weights, existing
from w2vscale.cli.progress import console, print_table, progress_bar
from w2vscale.errors import UserError

if TYPE_CHECKING:
    from w2vscale.analysis.probing import ProbeResult
    from w2vscale.analysis.report.reading import Run


def probe(
    checkpoint: Checkpoint,
    train: Annotated[
        list[Path],
        typer.Option(metavar="CUTS.jsonl", help="Manifest to train the probes on; repeatable.", callback=existing),
    ],
    test: Annotated[
        list[Path],
        typer.Option(
            metavar="CUTS.jsonl", help="Manifest to measure the error rate on; repeatable.", callback=existing
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder for probe.json and the plots.")
    ],
    layer: Layers = None,
    updates: Annotated[int, typer.Option(min=1, help="Number of updates that each probe is trained for.")] = 1000,
    vocabulary: Annotated[
        str, typer.Option(help="letters (A to Z, apostrophe, space), or a file with one symbol per line.")
    ] = "letters",
    weights: Weights = None,
    baselines: Annotated[
        bool, typer.Option(help="Also probe log-mel features, and the same layers with random weights.")
    ] = True,
) -> None:
    """Train a linear CTC probe on each layer and measure what the codes encode.

    Needs manifests with transcripts. Writes the label error rate of each layer and, if the model has discrete codes,
    how much information they carry about letters and speakers.
    """
    from w2vscale.analysis import probing
    from w2vscale.analysis.figures import draw_codes, draw_layers
    from w2vscale.data.vocabulary import read_vocabulary
    from w2vscale.files import write_text
    from w2vscale.inference.pretrained import load

    symbols = read_vocabulary(Path(vocabulary))
    with progress_bar("updates of the probes") as progress:
        found = probing.probe(
            load(checkpoint, weights=weights),
            train,
            test,
            layers=layer,
            baselines=baselines,
            vocabulary=symbols,
            updates=updates,
            progress=progress,
            log=console.print,
        )
    rates, log_mel = _print_probes(found)
    document = {"checkpoint": str(checkpoint), **found.metrics()}
    write_text(output / "probe.json", json.dumps(document, indent=2) + "\n")
    draw_layers(rates, output / "layers.png", log_mel=log_mel)
    for codebooks, title in ((found.letters, "letter"), (found.speakers, "speaker")):
        if codebooks:
            draw_codes(codebooks, output / f"codes_{title}s.png", title=title)
    for bad in found.bad[:5]:
        console.print(f"skipped: {bad.utterance}: {bad.reason}")
    console.print(
        f"{found.train_utterances:,} training utterances, {found.test_utterances:,} test utterances, "
        f"{len(found.bad):,} skipped; plots: {output}"
    )


def _print_probes(found: ProbeResult) -> tuple[dict[str, dict[int, float]], float | None]:
    """Print the error rates of all probes; return those of the layers, and that of log-mel features."""
    from w2vscale.evaluation.bootstrap import describe_reduction

    rates = {"trained": {layer: one.rate for layer, one in found.layers.items()}}
    log_mel = None
    if found.baselines is not None:
        rates["random weights"] = {layer: one.rate for layer, one in found.baselines.random.items()}
        log_mel = found.baselines.log_mel.rate
    rows = [
        (f"{layer}", *(_marked(of_layers, layer) for of_layers in rates.values()), f"{one.loss:.3f}")
        for layer, one in found.layers.items()
    ]
    print_table(("layer", *(f"label error rate, {name}" for name in rates), "CTC loss (nats per label), trained"), rows)
    if found.baselines is not None:
        mel = found.baselines.log_mel
        console.print(f"log-mel features: label error rate {mel.rate:.2%}, CTC loss {mel.loss:.3f} nats per label")
    ours = found.layers[found.best_layer].counts
    for name, other in found.compared().items():
        against = {"log_mel": "log-mel features", "random": "the best layer with random weights"}[name]
        reduction = describe_reduction("label errors", ours, other.counts)
        console.print(f"layer {found.best_layer} against {against}: {reduction}")
    for number, (letters, speakers) in enumerate(zip(found.letters, found.speakers, strict=True)):
        console.print(
            f"codebook {number}: normalised mutual information with letters {letters.information:.1%} "
            f"(by chance {letters.by_chance:.1%}), with speakers {speakers.information:.1%} "
            f"(by chance {speakers.by_chance:.1%})"
        )
    return rates, log_mel


def _marked(rates: dict[int, float], layer: int) -> str:
    return f"{rates[layer]:.2%}{' best' if layer == min(rates, key=rates.__getitem__) else '     '}"


def report(
    exps: Annotated[list[Path], typer.Argument(metavar="EXP...", help="Run folders to compare in one report.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html",
            help="The file to write.",
            show_default="EXP/report.html; of several runs, report.html in the nearest folder that holds them all",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="published", help="Also draw published curves of the same objective, with their source."),
    ] = None,
) -> None:
    """Write a report of one or several runs as one HTML file, and print their latest metrics.

    It has the curves, settings, data, hardware, health events, samples and error rates, and needs no network.
    """
    if reference not in (None, "published"):
        raise UserError(f"--reference {reference}: the only reference is: published; give another run as EXP")
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: the report is an HTML file; choose a name that ends with .html")
    from w2vscale.analysis.report.folders import report_path, run_folders

    exps = run_folders(exps, console.print)
    path = output or report_path(exps)
    from w2vscale.analysis.report.page import write_report

    with progress_bar("report") as progress:
        runs = write_report(exps, path, published=reference is not None, progress=progress)
    for titles in dict.fromkeys(_titles(run) for run in runs):
        loss, telling, other = titles
        metrics = (f"training {loss}", telling, f"validation {loss}", telling, other)
        print_table(("run", "updates", "hours seen", *metrics), [_row(run) for run in runs if _titles(run) == titles])
    console.print(f"report: {path}")


def _titles(run: Run) -> tuple[str, ...]:
    return tuple(panel.title for panel in run.panels)


def _row(run: Run) -> tuple[str, ...]:
    from w2vscale.analysis.report.scales import metric, significant

    training, validation = run.latest()
    last = validation[2] if any(value is not None for value in validation[2]) else training[2]
    loss, telling, other = run.panels
    shown = zip((loss, telling, loss, telling, other), (*training[:2], *validation[:2], last), strict=True)
    values = ("/".join(metric(value, percent=panel.percent) for value in values) for panel, values in shown)
    return (run.name, f"{run.update:,}", significant(run.train[-1]["hours_seen"]), *values)
