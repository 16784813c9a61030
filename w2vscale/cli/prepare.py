"""`w2vscale data prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from w2vscale.cli.arguments import Channel, Jobs, channel_number
from w2vscale.cli.progress import console, print_table, progress_bar
from w2vscale.errors import counted

if TYPE_CHECKING:
    from w2vscale.corpora.manifests import PreparedManifest
    from w2vscale.corpora.preparing import Options
    from w2vscale.corpora.report import Report

app = typer.Typer(
    no_args_is_help=True,
    help="Write Lhotse cut manifests of a corpus. OUT/prepare_report.json shows what is not used, and why.",
)

Corpus = Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder of the corpus.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the manifests.")]
Parts = Annotated[
    list[str] | None,
    typer.Option(
        "--part", metavar="PART", help="Prepare only this part, e.g. train-clean-100; repeatable.", show_default="all"
    ),
]
SegmentSeconds = Annotated[
    float, typer.Option(metavar="SECONDS", help="Longest segment of a recording that is cut at pauses, in seconds.")
]
Encoding = Annotated[
    str | None, typer.Option(metavar="NAME", help="Encoding of the transcripts, e.g. latin-1.", show_default="Unicode")
]
Language = Annotated[str | None, typer.Option(metavar="NAME", help="Language of all recordings, for mix.by=language.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop if a file or an utterance cannot be used.")]
MaxBadFraction = Annotated[
    float,
    typer.Option(
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Stop if more of the files, or of the utterances of a list, cannot be used (and more than ten).",
    ),
]


@app.command()
def folder(
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="Folder of audio files at any depth.")],
    output: Output,
    segment_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Split longer recordings into segments of at most this duration, in seconds.",
            show_default="30 with --vad",
        ),
    ] = None,
    vad: Annotated[
        bool, typer.Option("--vad", help="Cut recordings at pauses, and leave pauses out, with Silero VAD.")
    ] = False,
    validation_share: Annotated[
        float, typer.Option(help="Put this fraction of the recordings, from 0 to 1, into cuts_validation.jsonl.")
    ] = 0.0,
    language: Language = None,
    encoding: Encoding = None,
    channel: Channel = "mean",
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare any folder of audio files.

    The transcript of a.wav is a.txt, or with times a.ctm, a.TextGrid, a.srt, a.vtt or a.json.
    """
    from w2vscale.corpora.folder import prepare_folder
    from w2vscale.corpora.preparing import Options

    with progress_bar("looking for speech" if vad else "reading headers") as progress:
        report = prepare_folder(
            audio,
            output,
            segment_seconds=segment_seconds,
            validation_share=validation_share,
            language=language,
            encoding=encoding,
            options=Options(channel_number(channel), vad, strict, max_bad_fraction, jobs, progress),
        )
    _show_report(report, output)


NAMED = {
    "librispeech": "Prepare LibriSpeech: write OUT/cuts_PART.jsonl for each part.",
    "mini_librispeech": "Prepare mini LibriSpeech: train-clean-5 and dev-clean-2.",
    "mls": "Prepare Multilingual LibriSpeech: write OUT/cuts_LANGUAGE_PART.jsonl, e.g. cuts_german_train.jsonl.",
    "commonvoice": "Prepare Common Voice: write OUT/cuts_LANGUAGE_PART.jsonl for train, dev and test of each language.",
    "gigaspeech": "Prepare GigaSpeech: XL, DEV and TEST, or other parts.",
    "peoples_speech": "Prepare The People's Speech: clean, clean_sa, dirty, dirty_sa, validation and test.",
    "aishell": "Prepare AISHELL-1: train, dev and test.",
}
"""Corpora that have no options of their own, with the help of their commands."""


def _command(name: str) -> Callable[..., None]:
    def command(
        corpus: Corpus,
        output: Output,
        part: Parts = None,
        strict: Strict = False,
        max_bad_fraction: MaxBadFraction = 0.05,
        jobs: Jobs = 1,
    ) -> None:
        from w2vscale.corpora import named

        with _options(strict, max_bad_fraction, jobs) as options:
            report = getattr(named, f"prepare_{name}")(corpus, output, parts=part or (), options=options)
        _show_report(report, output)

    return command


for _name, _help in NAMED.items():
    app.command(_name, help=_help)(_command(_name))


@app.command()
def librilight(
    corpus: Corpus,
    output: Output,
    segment_seconds: SegmentSeconds = 30.0,
    part: Parts = None,
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare Libri-Light: cut at pauses, by the speech that its JSON files list."""
    from w2vscale.corpora.named import prepare_librilight

    with _options(strict, max_bad_fraction, jobs) as options:
        report = prepare_librilight(corpus, output, parts=part or (), segment_seconds=segment_seconds, options=options)
    _show_report(report, output)


@app.command()
def voxpopuli(
    corpus: Corpus,
    output: Output,
    language: Annotated[str, typer.Option(metavar="CODE", help="Language, e.g. en.")],
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare the transcribed part of VoxPopuli in one language. For its other audio use: data prepare folder."""
    from w2vscale.corpora.named import prepare_voxpopuli

    with _options(strict, max_bad_fraction, jobs) as options:
        report = prepare_voxpopuli(corpus, output, language=language, options=options)
    _show_report(report, output)


@app.command()
def huggingface(
    source: Annotated[
        str, typer.Argument(metavar="DATASET|DIR", help="A folder of Parquet or Arrow files, or a name on the Hub.")
    ],
    output: Output,
    config: Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a dataset on the Hub.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Prepare only this split; repeatable.", show_default="all")
    ] = None,
    audio_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with audio.", show_default="by its type")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column with transcripts.", show_default="text, sentence, ...")
    ] = None,
    channel: Channel = "mean",
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare a dataset of Hugging Face: write OUT/cuts_SPLIT.jsonl, and the audio to OUT/audio."""
    from w2vscale.corpora.huggingface import prepare_huggingface

    with _options(strict, max_bad_fraction, jobs, channel) as options:
        report = prepare_huggingface(
            source,
            output,
            config=config,
            splits=split or (),
            audio=audio_column,
            text=text_column,
            options=options,
        )
    _show_report(report, output)


@app.command()
def kaldi(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="A data folder of Kaldi, with wav.scp.")],
    output: Output,
    encoding: Encoding = None,
    channel: Channel = "mean",
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare a data folder of Kaldi: write OUT/cuts_DIR.jsonl.

    No command in wav.scp is run. Where it only decodes a file, that file is read.
    """
    from w2vscale.corpora.lists import prepare_kaldi

    with _options(strict, max_bad_fraction, jobs, channel) as options:
        report = prepare_kaldi(data, output, encoding=encoding, options=options)
    _show_report(report, output)


@app.command()
def manifest(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A manifest of NeMo.")],
    output: Output,
    encoding: Encoding = None,
    channel: Channel = "mean",
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare a manifest of NeMo: write OUT/cuts_FILE.jsonl."""
    from w2vscale.corpora.lists import prepare_nemo

    with _options(strict, max_bad_fraction, jobs, channel) as options:
        report = prepare_nemo(file, output, encoding=encoding, options=options)
    _show_report(report, output)


@app.command()
def fairseq(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.tsv", help="A manifest of fairseq; FILE.wrd or FILE.ltr has its text.")
    ],
    output: Output,
    encoding: Encoding = None,
    channel: Channel = "mean",
    strict: Strict = False,
    max_bad_fraction: MaxBadFraction = 0.05,
    jobs: Jobs = 1,
) -> None:
    """Prepare a manifest of fairseq: write OUT/cuts_FILE.jsonl."""
    from w2vscale.corpora.lists import prepare_fairseq

    with _options(strict, max_bad_fraction, jobs, channel) as options:
        report = prepare_fairseq(file, output, encoding=encoding, options=options)
    _show_report(report, output)


@contextmanager
def _options(strict: bool, max_bad_fraction: float, jobs: int, channel: str = "mean") -> Iterator[Options]:
    """The options of a corpus that lists its utterances, with a progress bar."""
    from w2vscale.corpora.preparing import Options

    with progress_bar("reading headers") as progress:
        yield Options(
            channel=channel_number(channel),
            strict=strict,
            max_bad_fraction=max_bad_fraction,
            jobs=jobs,
            progress=progress,
        )


def show_written(written: list[PreparedManifest]) -> None:
    """Show the manifests that were written."""
    for one in written:
        console.print(f"{one.path}: {counted(one.utterances, 'utterance')}, {one.hours:.2f} hours")


def _show_report(report: Report, output: Path) -> None:
    """Show what was written, and what became of each file if not all were used."""
    show_written(report.manifests)
    if report.headers_unchanged:
        read = counted(report.headers_read, "audio file")
        console.print(f"headers: {read} read, {report.headers_unchanged:,} unchanged since an earlier call")
    if report.seconds:
        hours, speech = report.seconds / 3600, report.seconds_of_speech / 3600
        console.print(f"speech: {speech:.2f} of {hours:.2f} hours ({speech / hours:.1%})")
    for note, count in (+report.notes).items():
        console.print(f"{count:,} {note}")
    if report.incomplete:
        rows = [(suffix, f"{count:,}", what) for suffix, count, what in report.rows()]
        console.print()
        print_table(("suffix", "files", ""), rows, right=False)
        console.print(f"details, with the paths of unusable files: {output / 'prepare_report.json'}")
