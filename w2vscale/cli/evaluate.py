"""`w2vscale evaluate`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli.arguments import Beam, Checkpoint, LanguageModel, Lexicon, LmWeight, Processes, WordScore

if TYPE_CHECKING:
    from w2vscale.inference.decoding import BeamSearch


def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the checkpoint's."),
    ] = None,
    cuts: Annotated[
        list[Path] | None,
        typer.Option("--cuts", metavar="CUTS.jsonl", help="An indexed manifest; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the figures as JSON.")
    ] = None,
    wer: Annotated[bool, typer.Option("--wer", help="Of a fine-tuned model: word and character error rates.")] = False,
    beam: Beam = None,
    lm: LanguageModel = None,
    lexicon: Lexicon = None,
    lm_weight: LmWeight = 2.0,
    word_score: WordScore = -1.0,
    worst: Annotated[int, typer.Option(min=0, help="With --wer: utterances to show, those with most errors.")] = 5,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="With --wer: also write all of it as a page.")
    ] = None,
    nproc_per_node: Processes = 1,
) -> None:
    """Loss, accuracy and use of codebooks of a pretrained checkpoint; loss and errors of a fine-tuned one.

    With --wer, text is written greedily or by a beam search (--beam, --lm, --lexicon), and compared with the
    manifests' transcripts.
    """
    from w2vscale.distributed.launch import launch, launched
    from w2vscale.errors import UserError

    if wer and overrides:
        raise UserError(f"{overrides[0]}: --wer takes no settings")
    for option in ("beam", "lm", "lexicon", "lm_weight", "word_score", "worst", "page"):
        given = context.get_parameter_source(option)
        if not wer and given is not None and given.name == "COMMANDLINE":
            name = "html" if option == "page" else option.replace("_", "-")
            raise UserError(f"--{name}: is for error rates: add --wer")
    if nproc_per_node != 1 and not launched():
        sys.exit(launch(["evaluate", *sys.argv[sys.argv.index("evaluate") + 1 :]], nproc_per_node))
    if wer:
        from w2vscale.inference.decoding import beam_search

        search = beam_search(beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score)
        _word_errors(checkpoint, cuts or [], search, output, page, worst=worst)
    else:
        _losses(checkpoint, cuts or [], overrides or [], output)


def _losses(checkpoint: Path, cuts: list[Path], overrides: list[str], output: Path | None) -> None:
    from rich.table import Table

    from w2vscale.cli.files import write_text
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.evaluation.checkpoint import evaluate_checkpoint

    with progress_bar("evaluating") as progress:
        found = evaluate_checkpoint(checkpoint, cuts, overrides, progress=progress, log=console.print)
    if found is None:
        return
    values = found.metrics
    table = Table(title=f"{found.checkpoint.name} on {int(values['utterances'])} utterances", box=None)
    table.add_column("figure")
    table.add_column("value", justify="right")
    if "labels" in values:
        table.add_row("loss of a label", f"{values['loss']:.4f} nats")
        table.add_row("label error rate, greedy", f"{values['label_error_rate']:.2%}")
        table.add_row("labels", f"{int(values['labels']):,}")
    else:
        table.add_row("contrastive loss", f"{values['contrastive']:.4f} nats = {values['contrastive_bits']:.4f} bits")
        table.add_row("contrastive accuracy", f"{values['accuracy']:.4f}")
        table.add_row("diversity loss", f"{values['diversity']:.4f}")
        table.add_row("masked frames", f"{int(values['masked_frames']):,}")
    for codebook, used in enumerate(found.used_entries):
        table.add_row(
            f"codebook {codebook}",
            f"{used} of {found.codebook_entries} entries used, "
            f"code perplexity {values[f'code_perplexity_{codebook}']:.1f}",
        )
    if values["unusable_utterances"]:
        table.add_row("unusable utterances", f"{int(values['unusable_utterances'])}")
    console.print(table)
    if output is not None:
        document = {"checkpoint": str(found.checkpoint), "update": found.update, **values}
        document |= {f"used_entries_{codebook}": used for codebook, used in enumerate(found.used_entries)}
        write_text(output, json.dumps(document, indent=2) + "\n")


def _word_errors(
    checkpoint: Path,
    cuts: list[Path],
    search: BeamSearch | None,
    output: Path | None,
    page: Path | None,
    *,
    worst: int,
) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from w2vscale.cli.files import write_text
    from w2vscale.cli.progress import console, progress_bar
    from w2vscale.distributed.process_group import LONG_TIMEOUT, process_group
    from w2vscale.errors import UserError
    from w2vscale.evaluation import wer
    from w2vscale.inference.pretrained import load

    if not cuts:
        raise UserError("--cuts names no manifest: set --cuts CUTS.jsonl")
    with process_group(timeout=LONG_TIMEOUT) as (ranks, device), progress_bar("transcribing") as progress:
        found = wer.score_checkpoint(
            load(checkpoint, device=device),
            cuts,
            search=search,
            ranks=ranks,
            progress=progress,
            log=partial(console.print, markup=False),
        )
    if not ranks.is_main:
        return
    for one in reversed(found.worst(worst)):
        console.print(f"{one.utterance} ({one.speaker}): {one.words.rate:.1%}\n{one.alignment}\n", markup=False)
    table = Table(box=None, header_style="bold")
    for column in ("speaker", "words", "WER"):
        table.add_column(column, justify="left" if column == "speaker" else "right")
    for speaker, errors in found.speakers.items():
        table.add_row(speaker, f"{errors.reference:,}", f"{errors.rate:.2%}")
    console.print(table, markup=False)
    console.print(f"{len(found.utterances):,} utterances; left out: {len(found.bad)}", markup=False)
    console.print(f"WER {wer.told(found.words, found.word_interval, 'words')}", markup=False)
    console.print(f"CER {wer.told(found.characters, found.character_interval, 'characters')}", markup=False)
    if output is not None:
        decoding = search.told() if search is not None else "greedy"
        rates = {"wer": found.words.rate, "cer": found.characters.rate}
        names = [path.name.removesuffix(".jsonl").removeprefix("cuts_") for path in cuts]
        document = {"checkpoint": str(checkpoint), "cuts": names, "decoding": decoding, **rates, **asdict(found)}
        write_text(output, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    if page is not None:
        write_text(page, wer.page(found, f"{checkpoint} on {', '.join(path.name for path in cuts)}"))
