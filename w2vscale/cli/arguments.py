"""Arguments and options that several commands share."""

from __future__ import annotations

import math
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from w2vscale.cli import completion
from w2vscale.errors import UserError
from w2vscale.files import nearest_path

OTHER_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"  # word processors write them for `-`

Source = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A preset, a YAML file, or the folder of a run.", autocompletion=completion.sources
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Settings that override CONFIG.",
        autocompletion=completion.settings,
    ),
]
Exp = Annotated[Path | None, typer.Option(help="The run folder.", show_default="exp/CONFIG", metavar="DIR")]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|PATH",
        help="auto: resume from the newest checkpoint in DIR; never: do not resume; PATH: resume from this checkpoint, "
        "which may be a URL.",
    ),
]
Processes = Annotated[
    int,
    typer.Option("--nproc-per-node", help="Number of processes to start on this machine. Omit under torchrun or srun."),
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only warnings and errors; the log has everything.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show details, such as each checkpoint.")]


def _place(named: str) -> Any:
    """A path or URL. Raises UserError if nothing has this path."""
    from w2vscale.storage.urls import place

    found = place(named)
    if isinstance(found, Path) and not found.exists():
        raise UserError(f"{found}: no such checkpoint{nearest_path(found)}")
    return found


def _local(named: str) -> Path:
    """A path, or a copy on this machine of the checkpoint or model at a URL."""
    if isinstance(found := _place(named), Path):
        return found
    from w2vscale.checkpoint.remote import local_model

    return local_model(found, lambda text: print(text, file=sys.stderr))


CHECKPOINT = "A checkpoint folder, or a run folder (its newest checkpoint); or the URL of one in a store."
# The parser: a Path would change the slashes of a URL.
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help=CHECKPOINT, parser=str, callback=_local, autocompletion=completion.checkpoints
    ),
]
CheckpointPlace = Annotated[
    Any,
    typer.Argument(
        metavar="CHECKPOINT", help=CHECKPOINT, parser=str, callback=_place, autocompletion=completion.checkpoints
    ),
]
"""For commands of several processes, which use copies of the same checkpoint: see `model_on_all_ranks`."""
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="ema|raw",
        help="ema: averaged weights (optim.ema_decay); raw: weights of the last update.",
        show_default="ema if the checkpoint has them",
    ),
]
Beam = Annotated[
    int | None,
    typer.Option(
        min=1, help="Beam size: number of hypotheses to keep.", show_default="greedy; 50 with --lm or --lexicon"
    ),
]
LanguageModel = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Word n-gram model: ARPA, .arpa.gz or KenLM binary.")
]
Lexicon = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Limit the output to these words, one per line.", show_default="the words of an ARPA model"
    ),
]
LmWeight = Annotated[float, typer.Option(help="Language-model weight (applied to log10 probabilities).")]
WordScore = Annotated[float, typer.Option(help="Score added per word (applies with --lm or --lexicon).")]
Manifests = Annotated[list[str], typer.Argument(metavar="CUTS.jsonl...", help="Lhotse cut manifests: paths or URLs.")]
UrlSchemes = Annotated[
    list[str] | None,
    typer.Option(
        "--url-scheme",
        metavar="SCHEME",
        help="The manifests may name audio by URLs of this scheme, such as s3, as with data.url_schemes; repeatable.",
    ),
]


def existing(manifests: list[Path] | None) -> list[Path] | None:
    """Callback of options that name manifests. Raises UserError if one does not exist, before anything slow."""
    from w2vscale.data.manifest import check_manifest

    for manifest in manifests or ():
        check_manifest(manifest)
    return manifests


Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of parallel processes.")]
PartOption = Annotated[
    str,
    typer.Option(
        "--part", metavar="K/N", help="Do only part K of N, in an array job; all parts together do the whole."
    ),
]
Channel = Annotated[
    str,
    typer.Option(
        metavar="mean|first|N",
        help="For audio files with several channels: their mean, the first, or number N, from 0.",
    ),
]
Layers = Annotated[
    list[int] | None,
    typer.Option(help="Layer; repeatable. 0: input of the first block; N: output of block N.", show_default="all"),
]
BatchSeconds = Annotated[float, typer.Option(help="Padded audio per forward pass, in seconds.")]


LARGEST = 1e9
"""Any number of an option is smaller."""


def finite(option: typer.CallbackParam, value: float | None) -> float | None:
    """Callback of an option that takes a number, since Typer lets nan and inf pass. Raises UserError."""
    if value is not None and not (math.isfinite(value) and value <= LARGEST):
        raise UserError(f"{option.opts[0]} {value:g}: must be a finite number of at most {LARGEST:g}")
    return value


def channel_number(name: str) -> int | None:
    """The number of the channel that `--channel` names; None for the mean of all. Raises UserError if it is neither."""
    if name == "mean":
        return None
    if name == "first":
        return 0
    if not name.isdecimal():
        raise UserError(f"--channel {name}: choose mean, first, or the number of a channel, counted from 0")
    return int(name)


def launch_if_asked(context: typer.Context, nproc_per_node: int, *, grace: float | None = None) -> None:
    """Run this command line (`context.obj`) in several processes and exit, unless a launcher has started this one.

    `grace`: seconds that the processes have to exit after a stop signal. Raises UserError if a launcher has started
    another number of processes on this machine.
    """
    from w2vscale.distributed.launch import FAILURE_GRACE, launch, launched, local_processes

    if nproc_per_node == 1:
        return
    if not launched():
        sys.exit(launch(context.obj, nproc_per_node, grace=FAILURE_GRACE if grace is None else grace))
    if (here := local_processes(os.environ)) != nproc_per_node:
        started = "" if here is None else f", {here} on each machine"
        raise UserError(
            f"--nproc-per-node {nproc_per_node}: torchrun, DeepSpeed, SLURM or Kubernetes has started the processes "
            f"already{started} (RANK or SLURM_STEP_NUM_TASKS is set); leave out this option"
        )


def check_dashes(arguments: Sequence[str]) -> None:
    """Check what comes before `--` on a command line, for all commands.

    Raises UserError if a setting has dashes, as if it were an option, an option has dashes of a word processor, or an
    argument is empty.
    """
    if "" in arguments:
        before = " ".join(arguments[: arguments.index("")])
        raise UserError(f"the argument after `{before}` is empty: is a variable of the shell not set?")
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for argument, following in zip(options, [*options[1:], ""], strict=False):
        given, sign, value = argument.partition("=")
        name = given.lstrip("-" + OTHER_DASHES)
        if name == given or not name:
            continue
        if _is_setting(name):
            value = value if sign else following if following and following[0] != "-" else "VALUE"
            raise UserError(f"{argument}: settings are given without dashes: {name}={value}")
        if (other := re.search(f"[{OTHER_DASHES}]", given)) and not os.path.lexists(argument):
            dashes = "-" if len(name) == 1 or name[0].isdecimal() else "--"
            meant = dashes + re.sub(f"[{OTHER_DASHES}]", "-", name) + sign + value
            raise UserError(
                f"{argument}: has {unicodedata.name(other[0])} (U+{ord(other[0]):04X}) where an option has '-'; "
                f"write {meant}, or ./{argument} if it is a file"
            )


def _is_setting(name: str) -> bool:
    """Whether it has the form of a setting: the name of a section, a point and more."""
    if "." not in name:
        return False
    from w2vscale.config import Config

    return name.partition(".")[0] in Config.model_fields
