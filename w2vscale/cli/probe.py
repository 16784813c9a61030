"""`w2vscale probe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Checkpoint


def probe(
    checkpoint: Checkpoint,
    train: Annotated[
        list[Path],
        typer.Option("--train", metavar="CUTS.jsonl", help="Manifest to train the probes on; repeatable."),
    ],
    test: Annotated[
        list[Path],
        typer.Option("--test", metavar="CUTS.jsonl", help="Manifest to measure the error rate on; repeatable."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder for probe.json and the plots.")
    ],
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer to probe; repeatable. 0: input of the first block; N: output of block N.", show_default="all"
        ),
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Number of updates that each probe is trained for.")] = 500,
    vocabulary: Annotated[
        str, typer.Option(help="letters (A to Z, apostrophe, space), or a file with one symbol per line.")
    ] = "letters",
) -> None:
    """Train a linear CTC probe on each layer and measure what the codes encode.

    Needs a pretrained checkpoint and manifests with transcripts. Writes the label error rate of each layer, and how
    much information the codes carry about letters and speakers.
    """
    from rich.table import Table

    from w2vscale.analysis import probing
    from w2vscale.analysis.probe_plots import draw_codes, draw_layers
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.files import write_text
    from w2vscale.inference.pretrained import load
    from w2vscale.objectives.ctc import CtcSettings, read_vocabulary

    symbols = read_vocabulary(CtcSettings(vocabulary=Path(vocabulary)))
    with progress_bar("updates of the probes") as progress:
        found = probing.probe(
            load(checkpoint),
            train,
            test,
            layers=layer,
            vocabulary=symbols,
            updates=updates,
            progress=progress,
            log=console.print,
        )
    table = Table(box=None)
    table.add_column("layer")
    table.add_column("label error rate", justify="right")
    for number, rate in found.error_rates.items():
        table.add_row(f"{number}", f"{rate:.2%}{' best' if number == found.best_layer else '     '}")
    console.print(table)
    for number, codebook in enumerate(found.codebooks):
        console.print(
            f"codebook {number}: normalised mutual information with letters {codebook.letters.information:.1%} "
            f"(by chance {codebook.letters_by_chance:.1%}), with speakers {codebook.speakers.information:.1%} "
            f"(by chance {codebook.speakers_by_chance:.1%})"
        )
    document = {"checkpoint": str(checkpoint), **found.metrics()}
    write_text(output / "probe.json", json.dumps(document, indent=2) + "\n")
    draw_layers(found.error_rates, output / "layers.png")
    draw_codes([codebook.letters for codebook in found.codebooks], output / "codes_letters.png", title="letter")
    draw_codes([codebook.speakers for codebook in found.codebooks], output / "codes_speakers.png", title="speaker")
    for bad in found.bad[:5]:
        console.print(f"skipped: {bad.utterance}: {bad.reason}", markup=False)
    console.print(
        f"{found.train_utterances:,} training utterances, {found.test_utterances:,} test utterances, "
        f"{len(found.bad):,} skipped; plots: {output}",
        markup=False,
    )
