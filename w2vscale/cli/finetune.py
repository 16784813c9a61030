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
        typer.Option("--scratch", help="The baseline: the architecture of trainer.init_from, but none of its weights."),
    ] = False,
    nproc_per_node: Processes = 1,
) -> None:
    """Teach a pretrained model to write what is said (CTC): the same command starts a run and continues it.

    The model's architecture is that of trainer.init_from; without it, training is from scratch. With --scratch the
    weights are drawn and nothing is frozen (ctc.freeze_encoder_updates=0, model.feature_grad_mult=1).

    Example: w2vscale finetune ctc_1h trainer.init_from=exp/base data.train=cuts_1h.jsonl --exp exp/base_1h
    """
    from w2vscale.config import load_config
    from w2vscale.errors import UserError

    config = load_config(source, overrides or [])
    if not config.ctc.vocabulary:
        raise UserError(f"{source}: no ctc.vocabulary to write in; start from a preset such as ctc_1h")
    if scratch and config.trainer.init_from is None:
        raise UserError("--scratch: name the checkpoint whose architecture is meant (trainer.init_from)")
    if config.trainer.init_from is None and (config.ctc.freeze_encoder_updates or config.model.feature_grad_mult == 0):
        raise UserError(
            f"{source}: would freeze random weights: name a checkpoint (trainer.init_from), or train from scratch with "
            "ctc.freeze_encoder_updates=0 model.feature_grad_mult=1"
        )
    launch_if_asked(context, nproc_per_node)
    from w2vscale.training.initialisation import as_baseline, with_architecture_of_source
    from w2vscale.training.loop import train
    from w2vscale.training.run import stored_settings

    exp = exp or Path("exp") / Path(source).stem
    config = with_architecture_of_source(config, stored_settings(exp, resume))
    if scratch:
        config = as_baseline(config)
    sys.exit(train(config, exp, resume=resume))
