"""`w2vscale config`."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from w2vscale.cli.arguments import Overrides, Source
from w2vscale.cli.completion import sources
from w2vscale.cli.progress import print_table

EITHER = "Preset, YAML file, or folder of a run or checkpoint."

app = typer.Typer(no_args_is_help=True, help="Show settings and presets.")


@app.command()
def show(
    source: Source,
    overrides: Overrides = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Print the merged DeepSpeed JSON configuration instead.")
    ] = False,
) -> None:
    """Print the resolved settings as YAML."""
    from w2vscale.config import dump_config
    from w2vscale.objectives.settings import load_settings

    config = load_settings(source, overrides or [])
    if not deepspeed:
        typer.echo(dump_config(config), nl=False)
        return
    from w2vscale.engine.deepspeed.config import deepspeed_config, import_deepspeed, validate_zero

    document = deepspeed_config(config.engine, config.optim, config.precision)
    if importlib.util.find_spec("deepspeed") is not None:
        import torch

        with redirect_stdout(sys.stderr):  # DeepSpeed logs to sys.stdout
            import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            validate_zero(document, config.engine.deepspeed_config)
    typer.echo(json.dumps(document, indent=2))


@app.command()
def presets() -> None:
    """List the presets with model size and main settings (shape: layers x dim x ffn_dim x heads).

    Presets for fine-tuning take the model from trainer.init_from.
    """
    import torch

    from w2vscale.config import preset_names
    from w2vscale.models.initialisation import NoDraws
    from w2vscale.objectives import load

    rows = []
    for name in preset_names():
        config, objective = load(name)
        parameters, shape = "of init_from", ""
        if not objective.vocabulary:
            with torch.device("meta"), NoDraws():
                model = objective.build_model()
            parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
            shape = f"{config.model.layers}x{config.model.dim}x{config.model.ffn_dim}x{config.model.heads}"
        seconds = config.batch.max_seconds * config.batch.micro_batches
        audio = f"{seconds:.0f} s" if seconds < 3600 else f"{seconds / 3600:.2f} h"
        rows.append((name, parameters, shape, audio, f"{config.trainer.updates:,}", f"{config.optim.lr:g}"))
    print_table(("preset", "parameters", "shape", "audio/update", "updates", "peak lr"), rows)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help=EITHER, autocompletion=sources)],
    other: Annotated[str, typer.Argument(metavar="B", help=EITHER, autocompletion=sources)],
) -> None:
    """List the settings in which two presets, files or runs differ, e.g. w2vscale config diff base exp/mine.

    Defaults count. A value is empty if an objective does not have the setting.
    """
    from w2vscale.objectives import differences

    rows = differences(one, other)
    if not rows:
        typer.echo(f"{one} and {other} have the same settings")
        return
    print_table(("setting", one, other, "meaning"), rows, right=False)


@app.command()
def keys() -> None:
    """List every setting with its type, default and meaning."""
    from w2vscale.objectives import all_settings

    for title, rows in all_settings().items():
        print_table(("setting", "type", "default", "meaning"), rows, title=title, right=False)
