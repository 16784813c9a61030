"""Hold some of the speakers with transcripts out of training, to choose settings on them.

Writes manifests to a folder: cuts_train.jsonl has the speech of all other speakers, cuts_labelled.jsonl the utterances
of theirs that have transcripts, and cuts_held_out.jsonl the utterances with transcripts of the speakers held out, in
random order. The speakers held out are those with the fewest utterances.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut


def with_texts(cuts: Iterable[Cut]) -> Iterator[Cut]:
    """Yield cuts with their transcripts, from LibriSpeech's SPEAKER.trans.txt beside the audio where they have none."""
    texts: dict[Path, dict[str, str]] = {}
    for cut in cuts:
        audio = Path(cut.recording.sources[0].source)
        if audio.parent not in texts:
            lists = sorted(audio.parent.glob("*.trans.txt"))
            lines = [line.partition(" ") for one in lists for line in one.read_text(encoding="utf-8").splitlines()]
            texts[audio.parent] = {utterance: text for utterance, _, text in lines}
        (said,) = cut.supervisions
        cut.supervisions = [replace(said, text=said.text or texts[audio.parent].get(audio.stem))]
        yield cut


def speaker_of(cut: Cut) -> str:
    """The speaker of a cut."""
    (said,) = cut.supervisions
    return str(said.speaker)


def main() -> None:
    """Read and write manifests as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument("--train", type=Path, required=True, metavar="CUTS.jsonl", help="speech for pretraining")
    parser.add_argument("--transcribed", type=Path, required=True, metavar="CUTS.jsonl", help="speech with transcripts")
    parser.add_argument("--speakers", type=int, default=4, help="number of speakers to hold out (default: %(default)s)")
    parser.add_argument("--utterances", type=int, default=64, help="most of their utterances (default: %(default)s)")
    arguments = parser.parse_args()
    train = list(with_texts(CutSet.from_file(arguments.train)))
    transcribed = list(CutSet.from_file(arguments.transcribed))
    count = Counter(map(speaker_of, train))
    names = sorted({*map(speaker_of, transcribed)} & count.keys(), key=lambda name: (count[name], name))
    if len(names) <= arguments.speakers:
        parser.error(
            f"{arguments.train} has {len(names)} speakers of {arguments.transcribed}: too few to hold out "
            f"{arguments.speakers} of them"
        )
    held_out = {*names[: arguments.speakers]}
    tested = [cut for cut in train if speaker_of(cut) in held_out and cut.supervisions[0].text]
    tested = tested or [cut for cut in transcribed if speaker_of(cut) in held_out]
    random.Random(0).shuffle(tested)
    for name, cuts in (
        ("train", [cut for cut in train if speaker_of(cut) not in held_out]),
        ("labelled", [cut for cut in transcribed if speaker_of(cut) not in held_out]),
        ("held_out", tested[: arguments.utterances]),
    ):
        path = arguments.output / f"cuts_{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        CutSet.from_cuts(cuts).to_jsonl(path)
        print(f"{path}: {len(cuts)} utterances, {sum(cut.duration for cut in cuts) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
