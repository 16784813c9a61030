"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a preset.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace CONFIG's.")
]
Exp = Annotated[Path | None, typer.Option(help="The run's folder.", show_default="exp/CONFIG", metavar="DIR")]
Resume = Annotated[
    str, typer.Option(help="auto: continue from DIR's newest checkpoint; never; or a checkpoint's PATH.")
]
Processes = Annotated[
    int,
    typer.Option("--nproc-per-node", help="Processes to start on this machine; under torchrun or srun leave it out."),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's folder: its newest.")]
Audio = Annotated[
    list[Path],
    typer.Argument(metavar="AUDIO...", help="Audio files, folders of them, or Lhotse cut manifests (*.jsonl)."),
]
Beam = Annotated[
    int | None,
    typer.Option(
        "--beam", min=1, help="Hypotheses kept in a beam search.", show_default="greedy; 50 with --lm or --lexicon"
    ),
]
LanguageModel = Annotated[
    Path | None, typer.Option("--lm", metavar="FILE", help="A word n-gram model: ARPA, .arpa.gz, or KenLM's binary.")
]
Lexicon = Annotated[
    Path | None,
    typer.Option(
        "--lexicon", metavar="FILE", help="One word a line; nothing else is written.", show_default="the ARPA's words"
    ),
]
LmWeight = Annotated[float, typer.Option("--lm-weight", help="Of the language model's log10 probabilities.")]
WordScore = Annotated[float, typer.Option("--word-score", help="Added for each word; with --lm or --lexicon.")]
BatchSeconds = Annotated[float, typer.Option(help="Padded audio that is computed at once.")]
