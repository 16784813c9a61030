"""A SentencePiece model of characters with the special symbols of fairseq2."""

from __future__ import annotations

from pathlib import Path

TEXTS = ["the cat sat on the mat", "it's a dög", "naïve café, øre!", "ひらがな と カタカナ"]


def train_characters(path: Path, *, normalization: str = "nmt_nfkc", size: int = 60) -> Path:
    """Train it. `<s>` is piece 0, and CTC's blank."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, model_type="char", vocab_size=size,
            hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name=normalization, minloglevel=2,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3,
        )  # fmt: skip
    return path
