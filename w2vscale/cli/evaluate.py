"""`w2vscale evaluate`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli.arguments import (
    Beam,
    Checkpoint,
    LanguageModel,
    Lexicon,
    LmWeight,
    Processes,
    WordScore,
    launch_if_asked,
)

if TYPE_CHECKING:
    from w2vscale.evaluation.checkpoint import Evaluation
    from w2vscale.evaluation.wer import Score
    from w2vscale.inference.decoding import BeamSearch


def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that override those of the checkpoint."),
    ] = None,
    cuts: Annotated[
        list[Path] | None,
        typer.Option("--cuts", metavar="CUTS.jsonl", help="Indexed manifest; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the metrics as JSON.")
    ] = None,
    wer: Annotated[
        bool, typer.Option("--wer", help="Compute word and character error rates of a fine-tuned model.")
    ] = False,
    beam: Beam = None,
    lm: LanguageModel = None,
    lexicon: Lexicon = None,
    lm_weight: LmWeight = 2.0,
    word_score: WordScore = -1.0,
    worst: Annotated[
        int, typer.Option(min=0, help="With --wer: print the N utterances with the highest WER.", metavar="N")
    ] = 5,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="With --wer: also write a page with speakers and alignments."),
    ] = None,
    nproc_per_node: Processes = 1,
) -> None:
    """Compute the validation metrics of a checkpoint, or its word error rate with --wer.

    With --wer, utterances are transcribed greedily or with a beam search (--beam, --lm, --lexicon), and compared with
    the transcripts of the manifests.
    """
    from w2vscale.errors import UserError

    if wer and overrides:
        raise UserError(f"{overrides[0]}: settings cannot be overridden with --wer")
    for option in ("beam", "lm", "lexicon", "lm_weight", "word_score", "worst", "html"):
        given = context.get_parameter_source(option)
        if not wer and given is not None and given.name == "COMMANDLINE":
            raise UserError(f"--{option.replace('_', '-')}: only applies to error rates; add --wer")
    launch_if_asked(context, nproc_per_node)
    if wer:
        from w2vscale.inference.decoding import BeamSearch

        search = BeamSearch.from_options(beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score)
        _evaluate_wer(checkpoint, cuts or [], search, output, html, worst=worst)
    else:
        _evaluate_loss(checkpoint, cuts or [], overrides or [], output)


def _evaluate_loss(checkpoint: Path, cuts: list[Path], overrides: list[str], output: Path | None) -> None:
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.evaluation.checkpoint import evaluate_checkpoint
    from w2vscale.files import write_text

    with progress_bar("evaluating") as progress:
        found = evaluate_checkpoint(checkpoint, cuts, overrides, progress=progress, log=console.print)
    if found is None:
        return
    _print_metrics(found)
    if output is not None:
        document = {"checkpoint": str(found.checkpoint), "update": found.update, **found.metrics, "table": found.table}
        write_text(output, json.dumps(document, indent=2) + "\n")


def _print_metrics(found: Evaluation) -> None:
    from rich.table import Table

    from w2vscale.cli.progress import console

    values = found.metrics
    table = Table(title=f"{found.checkpoint.name} on {int(values['utterances'])} utterances", box=None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found.table.items():
        table.add_row(name, value)
    if values["unusable_utterances"]:
        table.add_row("unusable utterances", f"{int(values['unusable_utterances'])}")
    console.print(table)


def _evaluate_wer(
    checkpoint: Path,
    cuts: list[Path],
    search: BeamSearch | None,
    output: Path | None,
    html: Path | None,
    *,
    worst: int,
) -> None:
    from dataclasses import asdict

    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.distributed.process_group import LONG_TIMEOUT, process_group
    from w2vscale.errors import UserError
    from w2vscale.evaluation.wer import html_page, score_checkpoint
    from w2vscale.files import write_text
    from w2vscale.inference.pretrained import load

    if not cuts:
        raise UserError("--cuts names no manifest: set --cuts CUTS.jsonl")
    with process_group(timeout=LONG_TIMEOUT) as (ranks, device), progress_bar("transcribing") as progress:
        found = score_checkpoint(
            load(checkpoint, device=device),
            cuts,
            search=search,
            ranks=ranks,
            progress=progress,
            log=partial(console.print, markup=False),
        )
    if not ranks.is_main:
        return
    _print_score(found, worst=worst)
    if output is not None:
        document = {
            "checkpoint": str(checkpoint),
            "cuts": [path.name.removesuffix(".jsonl").removeprefix("cuts_") for path in cuts],
            "decoding": search.description() if search is not None else "greedy",
            "wer": found.words.rate,
            "cer": found.characters.rate,
            **asdict(found),
        }
        write_text(output, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    if html is not None:
        write_text(html, html_page(found, f"{checkpoint} on {', '.join(path.name for path in cuts)}"))


def _print_score(found: Score, *, worst: int) -> None:
    from rich.table import Table

    from w2vscale.cli.progress import console
    from w2vscale.evaluation.wer import describe_rate

    for one in reversed(found.worst(worst)):
        console.print(f"{one.utterance} ({one.speaker}): {one.words.rate:.1%}\n{one.alignment}\n", markup=False)
    table = Table(box=None, header_style="bold")
    for column in ("speaker", "words", "WER"):
        table.add_column(column, justify="left" if column == "speaker" else "right")
    for speaker, counts in found.speakers.items():
        table.add_row(speaker, f"{counts.reference:,}", f"{counts.rate:.2%}")
    console.print(table, markup=False)
    console.print(f"{len(found.utterances):,} utterances, {len(found.bad)} skipped", markup=False)
    console.print(f"WER {describe_rate(found.words, found.word_interval, 'words')}", markup=False)
    console.print(f"CER {describe_rate(found.characters, found.character_interval, 'characters')}", markup=False)
