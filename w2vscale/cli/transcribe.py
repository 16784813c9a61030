"""`w2vscale transcribe`."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Annotated

import typer

from w2vscale.cli.arguments import (
    Audio,
    BatchSeconds,
    Beam,
    Checkpoint,
    LanguageModel,
    Lexicon,
    LmWeight,
    Processes,
    WordScore,
    launch_if_asked,
)


def transcribe(
    context: typer.Context,
    checkpoint: Checkpoint,
    audio: Audio,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object per utterance: utterance, file, text.")
    ] = False,
    beam: Beam = None,
    lm: LanguageModel = None,
    lexicon: Lexicon = None,
    lm_weight: LmWeight = 2.0,
    word_score: WordScore = -1.0,
    batch_seconds: BatchSeconds = 80.0,
    nproc_per_node: Processes = 1,
) -> None:
    """Transcribe audio with a fine-tuned model, shortest utterance first.

    Prints a line per utterance: name, tab, text. Exits with code 2 if some audio could not be used.
    """
    from w2vscale.cli.progress import progress_bar
    from w2vscale.data.micro_batch import BadAudio
    from w2vscale.distributed.process_group import LONG_TIMEOUT, gather_as_found, process_group
    from w2vscale.errors import UserError
    from w2vscale.inference.decoding import BeamSearch
    from w2vscale.inference.pretrained import load
    from w2vscale.inference.transcription import transcribe as transcripts
    from w2vscale.inference.utterances import find_utterances

    launch_if_asked(context, nproc_per_node)
    bad: list[BadAudio] = []
    done = 0
    with process_group(timeout=LONG_TIMEOUT) as (ranks, device), progress_bar("utterances") as progress:
        stream = transcripts(
            load(checkpoint, device=device),
            [utterance for path in audio for utterance in find_utterances(path)],
            search=BeamSearch.from_options(beam, lm, lexicon, lm_weight=lm_weight, word_score=word_score),
            ranks=ranks,
            batch_seconds=batch_seconds,
            progress=progress,
            log=partial(typer.echo, err=True) if ranks.is_main else lambda text: None,
        )
        for found in gather_as_found(stream):
            if not ranks.is_main:
                continue
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
