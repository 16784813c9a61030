"""Synthesise a small corpus of English speech in the folder layout of mini LibriSpeech.

python recipes/demo/local/synthesise.py OUT --train-minutes 12
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sentences import Text
from speech_corpus import synthesise_corpus
from w2vscale.cli.progress import console, progress_bar
from w2vscale.errors import UserError


def synthesise(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder in which LibriSpeech/ is created.")],
    train_minutes: Annotated[float, typer.Option(help="Speech in train-clean-5, in minutes.")] = 12.0,
    validation_minutes: Annotated[
        float, typer.Option(help="Speech in dev-clean-2, in minutes, by other speakers.")
    ] = 2.0,
    speakers: Annotated[
        int | None, typer.Option(min=1, help="Speakers in each part.", show_default="one per minute, 4 to 64")
    ] = None,
    text: Annotated[Text, typer.Option(help="What the speakers say; digits are learned fastest.")] = "sentences",
    hum: Annotated[bool, typer.Option(help="Add mains hum to all speech, as in amateur recordings.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of voices, text and noise.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Speakers to synthesise in parallel.")] = 1,
) -> None:
    """Synthesise a small corpus of English speech in the folder layout of mini LibriSpeech."""
    with progress_bar("synthesising") as progress:
        made = synthesise_corpus(
            output,
            parts={"train-clean-5": train_minutes, "dev-clean-2": validation_minutes},
            speakers_per_part=speakers,
            text=text,
            hum=hum,
            seed=seed,
            jobs=jobs,
            progress=progress,
        )
    console.print(
        f"{made.corpus}: {made.speakers} speakers, {made.utterances} utterances, {made.seconds / 60:.1f} minutes"
        f"{'' if made.created else ' (was there already)'}",
        markup=False,
    )


if __name__ == "__main__":
    try:
        typer.run(synthesise)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
