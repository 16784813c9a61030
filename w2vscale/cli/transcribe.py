"""`w2vscale transcribe`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from w2vscale.cli.arguments import Audio, BatchSeconds, Checkpoint


def transcribe(
    checkpoint: Checkpoint,
    audio: Audio,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line: utterance, file, text.")] = False,
    batch_seconds: BatchSeconds = 80.0,
) -> None:
    """Write what is said: a line for each utterance, shortest first; exit code 2 if some audio could not be used."""
    from w2vscale.cli.progress import progress_bar
    from w2vscale.data.micro_batch import BadAudio
    from w2vscale.errors import UserError
    from w2vscale.evaluation.pretrained import load
    from w2vscale.evaluation.transcription import transcribe as transcripts

    bad: list[BadAudio] = []
    done = 0
    with progress_bar("utterances") as progress:
        for found in transcripts(load(checkpoint), audio, batch_seconds=batch_seconds, progress=progress):
            if isinstance(found, BadAudio):
                bad.append(found)
                continue
            done += 1
            document = {"utterance": found.utterance, "file": found.file, "text": found.text}
            line = json.dumps(document, ensure_ascii=False) if as_json else f"{found.utterance}\t{found.text}"
            typer.echo(line)
    for each in bad[1:]:
        typer.echo(f"{each.file}: {each.reason}", file=sys.stderr)
    if bad:
        raise UserError(f"{bad[0].file}: {bad[0].reason}; {len(bad)} of {done + len(bad)} utterances could not be used")
