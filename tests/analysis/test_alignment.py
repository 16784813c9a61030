"""Forced alignment agrees with a search over all paths."""

from __future__ import annotations

from itertools import groupby, product

import numpy as np
import pytest

from w2vscale.analysis.alignment import align, fill_blanks


def read(path: tuple[int, ...]) -> list[int]:
    return [symbol for symbol, _ in groupby(path) if symbol != 0]


@pytest.mark.parametrize("labels", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 2, 2], []])
def test_the_path_is_the_most_probable_that_reads_as_the_labels(labels: list[int]) -> None:
    random = np.random.default_rng(len(labels))
    for _ in range(5):
        scores_TV = np.log(random.dirichlet(np.ones(3), size=5))
        paths = [path for path in product(range(3), repeat=5) if read(path) == labels]
        best = max(paths, key=lambda path: scores_TV[range(5), path].sum())
        places = align(scores_TV, labels)
        assert tuple(labels[place] if place >= 0 else 0 for place in places) == best
        assert [place for place, _ in groupby(places.tolist()) if place >= 0] == list(range(len(labels)))


def test_a_long_utterance() -> None:
    labels = [1 + place % 2 for place in range(300)]
    scores_TV = np.full((1000, 3), -9.0)
    scores_TV[range(1000), [labels[frame // 3] if frame % 3 == 0 and frame < 900 else 0 for frame in range(1000)]] = 0.0
    places = align(scores_TV, labels)
    assert np.flatnonzero(places >= 0).tolist() == list(range(0, 900, 3))


def test_too_few_frames_for_the_labels() -> None:
    with pytest.raises(ValueError, match="2 frames are too few for 2 labels"):
        align(np.zeros((2, 3)), [1, 1])


def test_blanks_take_the_nearest_label_within_reach() -> None:
    path = np.array([-1, -1, -1, 0, -1, -1, -1, 1, 1, -1, -1, -1])
    assert fill_blanks(path, 2).tolist() == [-1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]
    assert fill_blanks(path, 0).tolist() == path.tolist()
    assert fill_blanks(np.array([-1, -1]), 3).tolist() == [-1, -1]
