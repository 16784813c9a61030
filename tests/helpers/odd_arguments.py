"""The commands with words that are mostly usual, so that many do their work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from typer.main import get_command

from tests.helpers.faults import run
from tests.helpers.good_files import Good
from w2vscale.cli.app import app

FILES = (
    *("cuts.jsonl", "texts.jsonl", "u0.wav", "config.yaml", "lm.arpa", "words.txt", "letters.txt", "pieces.model"),
    *("results.json", "metrics.jsonl", "exp", "ctc", "shards"),
)
ODD_WORDS = (
    *(".", "..", "/dev/null", "/nope/x", "loop", "empty", "empty/a", "new/deep", "a.pgf", "-", "--", "", "\udcff"),
    *("0", "-1", "3", "2.5", "1e-9", "1e308", "nan", "inf", "-inf", "9" * 20, "true", "tiny", "base", "ctc_1h"),
    *("data.train=u0.wav", "data.train=shards", "data.mode=stream", "trainer.init_from=empty", "x" * 300, "a=b"),
    *("trainer.updates=\udcff", "trainer.init_from=exp", "objective.name=ctc", "batch.max_seconds=2", "torchaudio"),
)
USUAL = {
    name: words
    for names, words in {
        "manifest manifests cuts train test": ("cuts.jsonl", "texts.jsonl"),
        "checkpoint path run exps": ("exp", "ctc", "exp/checkpoints/latest"),
        "source one other config": ("tiny", "config.yaml", "exp", "ctc"),
        "output exp html": ("new", "new/a", "a.png", "exp"),
        "jobs shard_size seed size beam layer last best updates": ("1", "2", "30"),
        "hours segment_seconds validation_share lm_weight word_score": ("0.0005", "0.5", "1"),
        "batch_seconds chunk_seconds overlap_seconds": ("0.5", "2", "30"),
        "overrides override": ("data.min_seconds=0.3", "batch.micro_batches=2"),
        "audio": ("u0.wav", "folder", "cuts.jsonl"),
        "corpus": ("folder",),
        "metrics": ("results.json",),
        "identifiers": ("ids",),
        "lm": ("lm.arpa",),
        "lexicon": ("words.txt",),
        "vocabulary": ("letters", "letters.txt"),
        "form": ("flac", "opus", "mp3", "huggingface", "torchaudio"),
        "file_format": ("npy", "safetensors"),
    }.items()
    for name in names.split()
}
NOT_DRAWN = {"doctor"}  # it starts programs and opens connections: that is its job
ALWAYS = {"train": ["trainer.updates=5"], "finetune": ["trainer.updates=5"]}  # so that it ends


def commands(group: Any, *words: str) -> Iterator[tuple[list[str], Any]]:
    """Every command, with the words that call it."""
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, *words, name)
        elif name not in NOT_DRAWN:
            yield [*words, name], one


@st.composite
def arguments(draw: st.DrawFn, good: Good) -> list[str]:
    """A command with its arguments and some of its options."""
    words, one = draw(st.sampled_from(list(commands(get_command(app)))))
    odd = draw(st.sampled_from([0, 0, 1, 3]))  # of ten values

    def value(name: str) -> str:
        if name in USUAL and draw(st.integers(0, 9)) >= odd:
            return draw(st.sampled_from(USUAL[name]))
        return draw(st.sampled_from([*FILES, *ODD_WORDS]) | st.text(max_size=4)).replace("\0", "")

    found = [*words]
    for parameter in one.params:
        if parameter.param_type_name == "argument":
            several = parameter.nargs < 0 and draw(st.booleans())
            found += [value(parameter.name) for _ in range(parameter.required + several)]
        elif parameter.name != "nproc_per_node" and (parameter.required or draw(st.integers(0, 4)) == 0):
            found += [draw(st.sampled_from(parameter.opts)), *([] if parameter.is_flag else [value(parameter.name)])]
    if odd and draw(st.integers(0, 9)) == 0:
        found.insert(draw(st.integers(0, len(found))), draw(st.sampled_from(["--bogus", "-x", "", "more"])))
    return [*found, *ALWAYS.get(words[0], [])]


def check_arguments(words: list[str], good: Good) -> None:
    for name in FILES:
        copy: Callable[..., object] = shutil.copytree if (good.folder / name).is_dir() else shutil.copy
        copy(good.folder / name, name)
    for folder in ("empty", "folder"):
        Path(folder).mkdir()
    shutil.copy("u0.wav", "folder/a.wav")
    Path("folder/loop.wav").symlink_to("loop.wav")
    Path("ids").write_text("u0\n")
    Path("loop").symlink_to("loop")
    found = run(*words)
    if found.code and "utterances could not be used" not in found.errors:  # the others are used
        files = [name for name in found.new_files if not (Path(name).is_dir() or name.startswith("shards"))]
        documented = (".index.npy", ".bad_audio", ".bad_headers", "headers.sqlite", "prepare_report.json")
        assert [name for name in files if not name.endswith(documented)] == []
