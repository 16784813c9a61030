"""The speech synthesiser of the demo: its draws, repeated bytes, a layout that Lhotse reads, and user errors."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import recipes

import speech_corpus
from espeak import EspeakProcess, Voice
from sentences import RULES, WORDS, draw_sentence, transcript
from speech_corpus import SynthesisSummary, draw_speakers, finish_audio, speakers_table, synthesise_corpus
from w2vscale.corpora.named import prepare_librispeech
from w2vscale.errors import UserError

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader is not installed: pip install 'w2vscale[synth]'",
)

PARTS = {"train-clean-5": 0.5, "dev-clean-2": 0.2}


def make(output: Path, **changes: object) -> SynthesisSummary:
    return synthesise_corpus(output, **{"parts": PARTS, "speakers_per_part": 2, "seed": 3, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sound(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".flac")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SynthesisSummary:
    return make(tmp_path_factory.mktemp("synth") / "output")


class TestSentences:
    def test_every_rule_is_known_used_and_without_cycles(self) -> None:
        def reach(rule: str, path: tuple[str, ...]) -> set[str]:
            assert rule not in path
            references = {name for phrase in RULES[rule] for name in re.findall(r"<(\w+)>", phrase)}
            return {rule}.union(*(reach(name, (*path, rule)) for name in references))

        assert reach("sentence", ()) | reach("digits", ()) == set(RULES)

    def test_vocabulary_is_a_few_hundred_words_and_no_list_repeats_one(self) -> None:
        assert len({word for words in WORDS.values() for word in words.split()}) > 400
        assert all(len(set(words.split())) == len(words.split()) for words in WORDS.values())

    def test_a_sentence_is_a_pure_function_of_the_generator(self) -> None:
        random.seed(1)
        state = random.getstate()
        first, second = ([draw_sentence(generator) for _ in range(20)] for generator in map(random.Random, (5, 5)))
        assert first == second
        assert len(set(first)) == 20
        assert random.getstate() == state

    def test_sentences_and_transcripts_have_the_expected_characters(self) -> None:
        generator = random.Random(0)
        for _ in range(500):
            sentence = draw_sentence(generator)
            assert re.fullmatch(r"[a-z']+(,? [a-z']+)*[.?]", sentence)
            assert re.fullmatch(r"[A-Z']+( [A-Z']+)*", transcript(sentence))
            assert not re.search(r"\ba [aeio]|\ban [^aeiou]", sentence.replace("a one", ""))

    def test_digits_are_words_too(self) -> None:
        generator = random.Random(0)
        said = [draw_sentence(generator, "digits").rstrip(".").split() for _ in range(200)]
        assert {len(words) for words in said} == {4, 5, 6, 7, 8}
        assert {word for words in said for word in words} == set(WORDS["digit"].split())


class TestSpeakers:
    def test_speakers_of_different_parts_and_their_voices_are_disjoint(self) -> None:
        speakers = draw_speakers({"train": 40.0, "dev": 2.0, "test": 50.0}, seed=1)
        assert len({speaker.identifier for speaker in speakers}) == len(speakers) == 94
        assert len({speaker.voice.name for speaker in speakers}) == len(speakers)

    def test_speakers_do_not_depend_on_the_order_of_parts_but_on_the_seed(self) -> None:
        reordered = dict(reversed(PARTS.items()))
        assert draw_speakers(PARTS, seed=1) == draw_speakers(reordered, seed=1) != draw_speakers(PARTS, seed=2)

    @pytest.mark.parametrize(("minutes", "count"), [(0.1, 4), (12.0, 12), (600.0, 64)])
    def test_default_number_of_speakers_follows_the_minutes(self, minutes: float, count: int) -> None:
        speakers = draw_speakers({"train": minutes})
        assert len(speakers) == count
        assert sum(speaker.seconds for speaker in speakers) == pytest.approx(60 * minutes)

    def test_table_has_the_columns_of_librispeech(self) -> None:
        totals = [speech_corpus.SpeakerTotal(speaker, 3, 75.0) for speaker in draw_speakers(PARTS)]
        rows = [line for line in speakers_table(totals).splitlines() if not line.startswith(";")]
        for row, total in zip(rows, totals, strict=True):
            identifier, sex, part, minutes, name = (column.strip() for column in row.split("|"))
            assert (int(identifier), part, float(minutes)) == (
                total.speaker.identifier,
                total.speaker.part,
                1.25,
            )
            assert sex in {"F", "M"}
            assert name == total.speaker.voice.name


@pytest.mark.parametrize(("mains_hertz", "quieter"), [(50.0, 0.0), (None, 10.8)])
def test_finished_audio_has_the_gain_and_a_noise_floor(mains_hertz: float | None, quieter: float) -> None:
    tone = (0.5 * np.sin(np.arange(48_000, dtype=np.float32))).astype(np.float32)
    audio = finish_audio(tone, gain_decibels=-6.0, mains_hertz=mains_hertz, generator=np.random.default_rng(0))
    expected = tone * 10.0 ** (-6.0 / 20.0)
    noise = audio / 32767.0 - expected
    signal_to_noise = 20.0 * np.log10(np.std(expected) / np.std(noise))
    assert audio.dtype == np.int16
    assert 24.5 < signal_to_noise - quieter < 35.5


@needs_espeak
class TestEspeak:
    VOICES = (Voice("en-us+f2", 160, 10, 50, 50, 7), Voice("en-gb-scotland+f5", 170, 20, 40, 60, 8))

    def test_a_speaker_sounds_the_same_whoever_spoke_before(self) -> None:
        def speak(voice: Voice) -> list[bytes]:
            with EspeakProcess(voice) as espeak:
                assert espeak.sampling_rate == 22_050
                return [espeak.speak(sentence) for sentence in ("seven thin shells hissed.", "who saw the fish?")]

        first, other, again = speak(self.VOICES[0]), speak(self.VOICES[1]), speak(self.VOICES[0])
        assert first == again != other

    @pytest.mark.parametrize("accent", speech_corpus.ACCENTS)
    def test_every_accent_exists(self, accent: str) -> None:
        with EspeakProcess(Voice(f"{accent}+m1", 160, 10, 50, 50, 0)) as espeak:
            assert len(espeak.speak("hello there.")) > 10_000

    def test_every_variant_exists(self) -> None:
        import espeakng_loader

        folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
        assert all((folder / variant).is_file() for variant in speech_corpus.VARIANTS)

    def test_an_unknown_voice_is_one_line(self) -> None:
        with pytest.raises(UserError, match=r"^espeak-ng failed with voice 'xx': there is no voice 'xx'; .*$"):
            EspeakProcess(Voice("xx", 160, 10, 50, 50, 0))


@needs_espeak
class TestCorpus:
    def test_the_same_arguments_give_the_same_bytes_for_any_jobs_and_order(
        self, corpus: SynthesisSummary, tmp_path: Path
    ) -> None:
        again = make(tmp_path / "again", parts=dict(reversed(PARTS.items())), jobs=2)
        assert contents(corpus.corpus) == contents(again.corpus)

    def test_another_seed_gives_other_audio(self, corpus: SynthesisSummary, tmp_path: Path) -> None:
        other = make(tmp_path / "other", seed=4)
        assert not set(sound(other.corpus).values()) & set(sound(corpus.corpus).values())

    def test_lhotse_reads_the_parts_with_transcripts(self, corpus: SynthesisSummary) -> None:
        manifests = recipes.prepare_librispeech(corpus_dir=corpus.corpus, dataset_parts=list(PARTS))
        speakers = {part: {s.speaker for s in manifests[part]["supervisions"]} for part in PARTS}
        assert all(len(names) == 2 for names in speakers.values())
        assert speakers["train-clean-5"].isdisjoint(speakers["dev-clean-2"])
        supervisions = [s for part in PARTS for s in manifests[part]["supervisions"]]
        assert len(supervisions) == corpus.utterances
        assert sum(s.duration for s in supervisions) == pytest.approx(corpus.seconds)
        assert all(re.fullmatch(r"[A-Z']+( [A-Z']+)+", s.text) for s in supervisions)
        for part, minutes in PARTS.items():
            duration = sum(s.duration for s in manifests[part]["supervisions"])
            assert 60 * minutes <= duration < 60 * minutes + 2 * speech_corpus.LONGEST_SECONDS

    def test_folders_and_names_are_those_of_librispeech(self, corpus: SynthesisSummary) -> None:
        for path in corpus.corpus.rglob("*.flac"):
            part, speaker, chapter, name = path.relative_to(corpus.corpus).parts
            assert part in PARTS
            assert re.fullmatch(rf"{speaker}-{chapter}-\d{{4}}\.flac", name)
            assert (path.parent / f"{speaker}-{chapter}.trans.txt").is_file()
        assert (corpus.corpus / "SPEAKERS.TXT").is_file()
        assert {path.name for path in corpus.corpus.parent.iterdir()} == {"LibriSpeech"}

    def test_audio_is_16_bit_mono_of_sane_level_and_length(self, corpus: SynthesisSummary) -> None:
        paths = list(corpus.corpus.rglob("*.flac"))
        assert len(paths) == corpus.utterances >= 4
        for path in paths:
            info = soundfile.info(path)
            assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
            assert speech_corpus.SHORTEST_SECONDS <= info.duration <= speech_corpus.LONGEST_SECONDS
            samples, _ = soundfile.read(path)
            assert 0.05 < np.abs(samples).max() < 0.99
            assert 0.005 < np.sqrt(np.mean(samples**2)) < 0.3
            assert abs(samples.mean()) < 0.01

    def test_nothing_is_printed_and_progress_counts_speakers(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        seen: list[tuple[int, int]] = []
        make(tmp_path, progress=lambda finished, total: seen.append((finished, total)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert capfd.readouterr() == ("", "")

    def test_long_speakers_get_several_chapters(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: SynthesisSummary
    ) -> None:
        monkeypatch.setattr(speech_corpus, "UTTERANCES_PER_CHAPTER", 1)
        chapters = make(tmp_path)
        assert len(list(chapters.corpus.rglob("*.trans.txt"))) == chapters.utterances == corpus.utterances
        assert sorted(sound(chapters.corpus).values()) == sorted(sound(corpus.corpus).values())


@needs_espeak
class TestRepeating:
    def test_a_complete_corpus_is_left_alone(self, corpus: SynthesisSummary, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object, **settings: object) -> None:
            raise AssertionError("a second call must not synthesise")

        monkeypatch.setattr(speech_corpus, "_synthesise_speakers", refuse)
        before = {path: path.stat().st_mtime_ns for path in corpus.corpus.parent.rglob("*")}
        again = make(corpus.corpus.parent, jobs=2)
        assert not again.created
        assert (again.speakers, again.utterances, again.seconds) == (4, corpus.utterances, corpus.seconds)
        assert before == {path: path.stat().st_mtime_ns for path in corpus.corpus.parent.rglob("*")}

    @pytest.mark.parametrize("change", [{"seed": 4}, {"parts": {"train-clean-5": 1.0}}, {"speakers_per_part": 1}])
    def test_other_arguments_are_refused(self, corpus: SynthesisSummary, change: dict[str, object]) -> None:
        with pytest.raises(UserError, match=re.escape(str(corpus.corpus.parent))):
            make(corpus.corpus.parent, **change)

    def test_a_corpus_that_lost_a_file_is_refused(self, tmp_path: Path) -> None:
        next(make(tmp_path).corpus.rglob("*.flac")).unlink()
        with pytest.raises(UserError, match="choose another folder or delete this one"):
            make(tmp_path)

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_an_interrupted_run_leaves_no_corpus_and_can_be_repeated(
        self, corpus: SynthesisSummary, tmp_path: Path, jobs: int
    ) -> None:
        def interrupt(finished: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, jobs=jobs, progress=interrupt)
        assert not list(tmp_path.iterdir())
        # What a run that could not clean up (a kill) leaves behind.
        killed = tmp_path / "LibriSpeech.unfinished" / "train-clean-5" / "1" / "1"
        killed.mkdir(parents=True)
        (killed / "1-1-0000.flac").touch()
        assert contents(make(tmp_path, jobs=jobs).corpus) == contents(corpus.corpus)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"parts": {"train": 0.0}}, "0 minutes of speech for part 'train'"),
            ({"parts": {"train": -1.5}}, "-1.5 minutes of speech for part 'train'"),
            ({"parts": {"train": float("nan")}}, "nan minutes of speech for part 'train'"),
            ({"parts": {}}, "no part to synthesise"),
            ({"parts": {"../train": 1.0}}, "part '../train' cannot be the name of a folder"),
            ({"speakers_per_part": 0}, "--speakers 0: must be"),
            ({"seed": -1}, "--seed -1: must be"),
            ({"jobs": 0}, "--jobs 0: must be"),
        ],
    )
    def test_arguments_out_of_range_are_one_line(
        self, tmp_path: Path, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(UserError, match=rf"^{re.escape(message)}[^\n]*$"):
            make(tmp_path / "output", **arguments)
        assert not list(tmp_path.iterdir())

    def test_a_folder_of_something_else_is_refused_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))} is not empty[^\n]*$"):
            make(tmp_path)
        assert contents(tmp_path) == {"thesis.txt": b"years of work"}

    @needs_espeak
    def test_a_folder_that_cannot_be_written_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for output in (tmp_path / "file", tmp_path / "file" / "output"):
            with pytest.raises(UserError, match=rf"^{output}: cannot be written: [^\n]*$"):
                make(output)

    def test_a_missing_espeak_names_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "espeakng_loader", None)
        with pytest.raises(UserError, match=r"^[^\n]*pip install 'w2vscale\[synth\]'$"):
            make(tmp_path / "output")
        assert not list(tmp_path.iterdir())


@needs_espeak
class TestScript:
    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        script = Path(speech_corpus.__file__).with_name("synthesise.py")
        done = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def test_it_makes_a_corpus_once_that_prepare_takes(self, tmp_path: Path) -> None:
        minutes = ("--train-minutes", 0.05, "--validation-minutes", 0.05, "--speakers", 1)
        line = rf"{tmp_path}/out/LibriSpeech: 2 speakers, \d utterances, 0\.\d minutes"
        assert re.fullmatch(line + r"\n", self.run(tmp_path / "out", *minutes).stdout)
        assert re.fullmatch(line + r" \(was there already\)\n", self.run(tmp_path / "out", *minutes).stdout)
        written = prepare_librispeech(tmp_path / "out", tmp_path / "manifests", mini=True).manifests
        assert [manifest.path.name for manifest in written] == ["cuts_dev-clean-2.jsonl", "cuts_train-clean-5.jsonl"]

    def test_an_error_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        done = self.run(tmp_path / "file", code=2)
        assert done.stderr.startswith(f"error: {tmp_path / 'file'}: cannot be written: ")
        assert done.stderr.count("\n") == 1 and done.stdout == ""
