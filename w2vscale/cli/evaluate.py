"""`w2vscale evaluate` and `w2vscale results`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.checkpoint.format import folder_name
from w2vscale.cli import arguments
from w2vscale.cli.progress import console, print_table, progress_bar
from w2vscale.errors import UserError, counted
from w2vscale.files import write_text

if TYPE_CHECKING:
    from w2vscale.inference.decoding import BeamSearch
    from w2vscale.storage.urls import Url


def evaluate(
    context: typer.Context,
    checkpoint: arguments.CheckpointPlace,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that override those of the checkpoint."),
    ] = None,
    cuts: Annotated[
        list[Path] | None,
        typer.Option(metavar="CUTS.jsonl", help="Indexed manifest; repeatable.", callback=arguments.existing),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the metrics as JSON.")
    ] = None,
    wer: Annotated[
        bool, typer.Option("--wer", help="Compute word and character error rates of a fine-tuned model.")
    ] = False,
    beam: arguments.Beam = None,
    lm: arguments.LanguageModel = None,
    lexicon: arguments.Lexicon = None,
    lm_weight: arguments.LmWeight = 2.0,
    word_score: arguments.WordScore = -1.0,
    worst: Annotated[
        int, typer.Option(min=0, help="With --wer: print the N utterances with the highest WER.", metavar="N")
    ] = 5,
    weights: arguments.Weights = None,
    nproc_per_node: arguments.Processes = 1,
) -> None:
    """Compute the validation metrics of a checkpoint, or its word error rate with --wer.

    Several processes shard the model, unless the overrides contain engine.name=ddp; then each has a whole model.

    With --wer, utterances are transcribed greedily or with a beam search (--beam, --lm, --lexicon), and compared with
    the transcripts of the manifests. Each process has a whole model in fp32.
    """
    if wer and overrides:
        raise UserError(f"{overrides[0]}: settings cannot be overridden with --wer")
    for option in ("beam", "lm", "lexicon", "lm_weight", "word_score", "worst"):
        given = context.get_parameter_source(option)
        if not wer and given is not None and given.name == "COMMANDLINE":
            raise UserError(f"--{option.replace('_', '-')}: only applies to error rates; add --wer")
    if output is not None and output.is_dir():
        raise UserError(f"--output {output}: a folder; name a file")
    arguments.launch_if_asked(context, nproc_per_node)
    if wer:
        from w2vscale.inference.decoding import BeamSearch

        search = BeamSearch.from_options(beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score)
        _evaluate_wer(checkpoint, cuts or [], search, output, worst=worst, weights=weights)
    else:
        _evaluate_loss(checkpoint, cuts or [], overrides or [], output, weights)


def _evaluate_loss(
    checkpoint: Path | Url, cuts: list[Path], overrides: list[str], output: Path | None, weights: str | None
) -> None:
    from w2vscale.evaluation.validation import evaluate_checkpoint

    with progress_bar("evaluating") as progress:
        found = evaluate_checkpoint(checkpoint, cuts, overrides, weights=weights, progress=progress, log=console.print)
    if found is None:
        return
    rows = list(found.table.items())
    if unusable := int(found.metrics["unusable_utterances"]):
        rows.append(("unusable utterances", f"{unusable}"))
    title = f"{found.checkpoint.name} on {int(found.metrics['utterances'])} utterances"
    print_table(("metric", "value"), rows, title=title)
    if output is not None:
        of = {"checkpoint": str(found.checkpoint), "update": found.update, "weights": found.weights}
        document = {**of, **found.metrics, "table": found.table}
        write_text(output, json.dumps(document, indent=2) + "\n")


def _evaluate_wer(
    checkpoint: Path | Url,
    cuts: list[Path],
    search: BeamSearch | None,
    output: Path | None,
    *,
    worst: int,
    weights: str | None,
) -> None:
    from w2vscale.distributed.process_group import LONG_TIMEOUT, process_group
    from w2vscale.evaluation.edits import alignment_lines
    from w2vscale.evaluation.wer import describe_rate, score_checkpoint
    from w2vscale.inference.pretrained import load_on_all_ranks

    if not cuts:
        raise UserError("--cuts names no manifest: set --cuts CUTS.jsonl")
    with process_group(timeout=LONG_TIMEOUT) as (ranks, device), progress_bar("transcribing") as progress:
        pretrained = load_on_all_ranks(checkpoint, console.print, device=device, weights=weights)
        found = score_checkpoint(pretrained, cuts, search=search, ranks=ranks, progress=progress, log=console.print)
    if not ranks.is_main:
        return
    for one in reversed(found.worst(worst)):
        console.print(f"{one.utterance} ({one.speaker}): WER {one.words.rate:.1%}")
        console.print("\n".join(alignment_lines(one.reference, one.hypothesis, width=console.width)) + "\n")
    decay = f", averaged weights (optim.ema_decay={pretrained.config.optim.ema_decay:g})"
    average = decay if pretrained.weights == "ema" else ""
    title = f"{folder_name(pretrained.update)} on {counted(len(found.utterances), 'utterance')}{average}"
    print_table(
        ("speaker", "words", "substitutions", "deletions", "insertions", "WER"),
        [
            (speaker, *(f"{number:,}" for number in astuple(counts)), f"{counts.rate:.2%}")
            for speaker, counts in found.speakers.items()
        ],
        title=title,
    )
    console.print(f"{counted(len(found.utterances), 'utterance')}, {len(found.bad)} skipped as unusable")
    for kind, count in Counter(one.kind for one in found.bad).most_common():
        first = next(one for one in found.bad if one.kind == kind)
        console.print(f"skipped ({kind}): {count:,}, the first one: {first}")
    console.print(f"WER {describe_rate(found.words, found.word_interval, 'words')}")
    console.print(f"CER {describe_rate(found.characters, found.character_interval, 'characters')}")
    if output is not None:
        document = {
            "checkpoint": str(checkpoint),
            "update": pretrained.update,
            "weights": pretrained.weights,
            "cuts": [path.name.removesuffix(".jsonl").removeprefix("cuts_") for path in cuts],
            "decoding": search.description() if search is not None else "greedy",
            "wer": found.words.rate,
            "cer": found.characters.rate,
            **asdict(found),
        }
        write_text(output, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def results(
    metrics: Annotated[
        list[Path],
        typer.Argument(metavar="METRICS.json...", help="Files written by w2vscale evaluate --output, or probe.json."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.md", help="The Markdown file to write.")
    ] = Path("RESULTS.md"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Results",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compare the error rates of all other runs with those of this run; repeatable.",
            show_default="NAME_scratch and NAME_imported, for the run NAME",
        ),
    ] = None,
) -> None:
    """Write tables of several evaluations, and compare error rates with those of baselines by paired bootstrap.

    By default, the run NAME is compared with NAME_scratch, trained from random weights, and NAME_imported, fine-tuned
    from an imported model. Probes are compared with their own baselines, and with each other.
    """
    from w2vscale.evaluation.results import read_results, results_page

    found = read_results(metrics)
    for name in baseline or ():
        if name not in {result.run for result in found if "wer" in result.metrics}:
            raise UserError(f"--baseline {name}: none of the files has error rates of a run of this name")
    page = results_page(found, title, baseline or ())
    write_text(output, page)
    console.print(page)
