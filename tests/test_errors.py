"""Counts in messages."""

from __future__ import annotations

import pytest

from w2vscale.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "tensor", "0 tensors"),
        (1, "micro-batch", "1 micro-batch"),
        (2, "micro-batch", "2 micro-batches"),
        (1234, "utterance", "1,234 utterances"),
    ],
)
def test_a_noun_agrees_with_its_number(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
