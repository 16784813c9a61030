"""Estimate a small word n-gram model from transcripts and write it as an ARPA file.

Interpolated Kneser-Ney smoothing with one discount per order (Chen & Goodman 1999):

    p(w | h) = max(c(h w) - D, 0) / c(h) + D * N(h) / c(h) * p(w | h')

h' is h without its first word, N(h) the number of different words after h. c counts n-grams in the highest order, and
in lower orders the different words before an n-gram. For large texts use KenLM's lmplz.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lhotse import CutSet

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
IMPOSSIBLE = -99.0  # log10 probability of <s>, which no context predicts

Ngram = tuple[str, ...]


def estimate(sentences: Iterable[Sequence[str]], order: int) -> list[dict[Ngram, tuple[float, float]]]:
    """Return (probability, backoff weight) of the n-grams of each order from 1 to `order`."""
    counts: list[Counter[Ngram]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        padded = [BEGIN, *sentence, END]
        for size in range(1, order + 1):
            counts[size - 1].update(tuple(padded[end - size : end]) for end in range(size, len(padded) + 1))
    del counts[0][(BEGIN,)]
    for size in range(order - 1, 0, -1):
        before = Counter(ngram[1:] for ngram in counts[size])
        # Nothing comes before <s>, so n-grams that begin with it keep their counts.
        counts[size - 1] = Counter(
            {ngram: count if ngram[0] == BEGIN else before[ngram] for ngram, count in counts[size - 1].items()}
        )
    counts[0].setdefault((UNKNOWN,), 0)

    words = len(counts[0])
    probability: dict[Ngram, float] = {}
    weights: dict[Ngram, float] = {}
    for size, of_size in enumerate(counts, start=1):
        once, twice = (sum(count == times for count in of_size.values()) for times in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        total: Counter[Ngram] = Counter()
        different: Counter[Ngram] = Counter()
        for ngram, count in of_size.items():
            total[ngram[:-1]] += count
            different[ngram[:-1]] += count > 0
        weights |= {context: discount * different[context] / total[context] for context in total}
        for ngram, count in of_size.items():
            context = ngram[:-1]
            lower = probability[ngram[1:]] if size > 1 else 1.0 / words
            probability[ngram] = max(count - discount, 0.0) / total[context] + weights[context] * lower
    counts[0][(BEGIN,)] = 0
    probability[(BEGIN,)] = 10.0**IMPOSSIBLE
    return [{ngram: (probability[ngram], weights.get(ngram, 1.0)) for ngram in sorted(of_size)} for of_size in counts]


def arpa(model: Sequence[dict[Ngram, tuple[float, float]]]) -> str:
    """Format a model as an ARPA file."""
    lines = ["\\data\\", *(f"ngram {size}={len(ngrams)}" for size, ngrams in enumerate(model, start=1))]
    for size, ngrams in enumerate(model, start=1):
        lines += ["", f"\\{size}-grams:"]
        for ngram, (probability, weight) in ngrams.items():
            backoff = f"\t{math.log10(weight):.6f}" if size < len(model) else ""
            lines.append(f"{math.log10(probability):.6f}\t{' '.join(ngram)}{backoff}")
    return "\n".join([*lines, "", "\\end\\", ""])


def transcripts(manifests: Iterable[Path]) -> list[list[str]]:
    """Return the words of each utterance of Lhotse manifests."""
    cuts = (cut for path in manifests for cut in CutSet.from_jsonl_lazy(path))
    return [supervision.text.split() for cut in cuts for supervision in cut.supervisions if supervision.text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="ARPA file to write")
    parser.add_argument("manifests", type=Path, nargs="+", metavar="CUTS.jsonl", help="manifest with transcripts")
    parser.add_argument("--order", type=int, default=3, help="longest n-gram, in words (default: 3)")
    options = parser.parse_args()
    sentences = transcripts(options.manifests)
    if not sentences:
        parser.error(f"{options.manifests[0]}: no utterance has a transcript")
    model = estimate(sentences, options.order)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(arpa(model), encoding="utf-8")
    print(
        f"{options.output}: {options.order}-gram of {len(sentences):,} sentences, {sum(map(len, sentences)):,} words, "
        f"{len(model[0]) - 3:,} different ones"
    )


if __name__ == "__main__":
    main()
