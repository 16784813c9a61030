"""`w2vscale finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from w2vscale.cli.arguments import Exp, Overrides, Processes, Resume, Source, launch_if_asked


def finetune(
    context: typer.Context,
    source: Source,
    overrides: Overrides = None,
    exp: Exp = None,
    resume: Resume = "auto",
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch",
            help="Train a baseline from random weights, with the architecture of trainer.init_from and nothing frozen.",
        ),
    ] = False,
    nproc_per_node: Processes = 1,
) -> None:
    """Fine-tune for speech recognition with CTC. The same command starts a run and resumes it.

    The model has the architecture of trainer.init_from.

    Example: w2vscale finetune ctc_1h trainer.init_from=exp/base data.train=cuts_1h.jsonl --exp exp/base_1h
    """
    from w2vscale import runtime
    from w2vscale.config import load_config

    config = load_config(source, overrides or [])
    launch_if_asked(context, nproc_per_node)
    from w2vscale.training.loop import train
    from w2vscale.training.run import stored_settings
    from w2vscale.training.warm_start import fine_tuning_config

    exp = exp or Path("exp") / Path(source).stem
    config = fine_tuning_config(config, scratch=scratch, stored=stored_settings(exp, resume))
    with runtime.training(compiled=config.engine.compile) as stop:
        code = train(
            config,
            exp,
            resume=resume,
            command=context.obj,
            stop=stop,
            around_updates=runtime.collected_between_steps,
        )
    sys.exit(code)
