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
        list[Path], typer.Option("--train", metavar="CUTS.jsonl", help="Transcribed utterances; repeatable.")
    ],
    test: Annotated[
        list[Path], typer.Option("--test", metavar="CUTS.jsonl", help="Others, to measure on; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For probe.json and the pictures.")],
    layer: Annotated[
        list[int] | None,
        typer.Option(help="0: the first block's input; N: block N's output; repeatable; default: all."),
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Of the probes.")] = 500,
    vocabulary: Annotated[str, typer.Option(help="`letters` (English capitals), or a file of symbols.")] = "letters",
) -> None:
    """What a pretrained model knows: a linear CTC probe of each layer, and what letters and speakers its codes tell."""
    from rich.table import Table

    from w2vscale.analysis import probing
    from w2vscale.analysis.probe_plots import draw_codes, draw_layers
    from w2vscale.cli.files import write_text
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.config.load import load_config
    from w2vscale.inference.pretrained import load

    symbols = load_config("base", [f"ctc.vocabulary={vocabulary}"]).ctc.vocabulary
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
            f"codebook {number}: its codes tell {codebook.letters.information:.1%} of the letters' information "
            f"(by chance {codebook.letters_by_chance:.1%}), {codebook.speakers.information:.1%} of the speakers' "
            f"(by chance {codebook.speakers_by_chance:.1%})"
        )
    document = {"checkpoint": str(checkpoint), **found.document()}
    write_text(output / "probe.json", json.dumps(document, indent=2) + "\n")
    draw_layers(found.error_rates, output / "layers.png")
    draw_codes([codebook.letters for codebook in found.codebooks], output / "codes_letters.png", title="letter")
    draw_codes([codebook.speakers for codebook in found.codebooks], output / "codes_speakers.png", title="speaker")
    for bad in found.bad[:5]:
        console.print(f"left out: {bad.utterance}: {bad.reason}", markup=False)
    console.print(
        f"{found.train_utterances:,} utterances learned from, {found.test_utterances:,} measured; left out: "
        f"{len(found.bad):,}; pictures: {output}",
        markup=False,
    )
