"""What several test files share: a small corpus, a folder of every kind of audio, and real speech where it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import settings

# Before torch is imported: the tests' tensors are small, and the machine is shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before MLflow is imported: a thread of it would ask a server, and change the environment when there is no answer.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import torch
import typer.main

from tests.helpers.audio import SmallCorpus, cut_of, noise, tone, write_audio, write_manifest
from tests.helpers.processes import Started
from tests.helpers.torchaudio import import_torchaudio

# Typer builds all commands of the program at each call. A real process calls it once, tests thousands of times. If
# typer.testing were imported before, it would keep the slow function.
typer.main.get_command = cache(typer.main.get_command)

# A shell starts background jobs with Ctrl-C ignored, and their child processes inherit this. Some tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: the first example pays for imports, and the machine is shared.
settings.register_profile("w2vscale", max_examples=30, deadline=None)
settings.load_profile("w2vscale")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` need a GPU. Under pytest-xdist, which deals out whole files, those with slow tests go first,
    so that none of them ends alone."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "distributed")))}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def started() -> Started:
    """The processes that the test itself has started and that still run; those of pools are not among them."""
    before = set(multiprocessing.active_children())
    return lambda: [process for process in multiprocessing.active_children() if process not in before]


@pytest.fixture(scope="session")
def torchaudio() -> ModuleType:
    """torchaudio to compare with. Every environment that tools/setup.sh makes has it; in others it may be missing."""
    try:
        return import_torchaudio()
    except ImportError as error:
        if (Path(sys.prefix) / ".w2vscale-setup").is_file():
            raise
        pytest.skip(f"torchaudio is not installed: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real speech beside the checkout; tests that want it are skipped where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "LibriSpeech").is_dir():
        pytest.skip(f"no real speech: {folder / 'LibriSpeech'} does not exist")
    return folder


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    """24 utterances of noise to train on and 6 to validate on, of 1 to 6 seconds."""
    folder = tmp_path_factory.mktemp("small-corpus")
    manifests = []
    for name, count in (("train", 24), ("validation", 6)):
        cuts = []
        for number in range(count):
            audio = noise(1.0 + 5.0 * ((7 * number) % count) / (count - 1), seed=number)
            cuts.append(cut_of(write_audio(folder / name / f"{name}-{number:02d}.flac", audio)))
        manifests.append(write_manifest(folder / f"cuts_{name}.jsonl", cuts))
    return SmallCorpus(*manifests)


@pytest.fixture(scope="session")
def mixed_audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of audio in every format, at several rates, mono and stereo, some with transcripts. Do not change it."""
    folder = tmp_path_factory.mktemp("mixed") / "audio"
    write_audio(folder / "alice" / "one.flac", noise(3.0, seed=1))
    write_audio(folder / "alice" / "two.wav", noise(2.5, rate=8_000, seed=2), rate=8_000)
    write_audio(folder / "alice" / "three.mp3", noise(3.5, rate=44_100, seed=3), rate=44_100)
    write_audio(folder / "bob" / "four.ogg", noise(4.0, seed=4))
    write_audio(folder / "bob" / "session" / "five.opus", noise(2.0, rate=48_000, seed=5), rate=48_000)
    stereo = np.stack([tone(6.0, 440.0, rate=44_100), tone(6.0, 880.0, rate=44_100)], axis=1)
    write_audio(folder / "six.WAV", stereo, rate=44_100)
    (folder / "alice" / "one.txt").write_text("HELLO THERE\n", encoding="utf-8")
    (folder / "six.txt").write_text("zwei Töne\n", encoding="utf-8")
    (folder / "notes.md").write_text("not audio, and not meant to be\n")
    return folder
