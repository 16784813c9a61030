"""Published curves, which a report can draw beside those of a run."""

from __future__ import annotations

from w2vscale.objectives.base import Published

BASE_ACCURACY = Published(
    name="BASE, published",
    values={
        50_000: 0.491, 100_000: 0.537, 150_000: 0.564, 200_000: 0.580,
        250_000: 0.599, 300_000: 0.610, 350_000: 0.619, 400_000: 0.629,
    },
    source="Contrastive accuracy of wav2vec 2.0 BASE on LibriSpeech, with 64 micro-batches of 87.5 s per update; mean "
    "of eight seeds in BF16, standard deviation 0.007 to 0.011 (NVIDIA DeepLearningExamples, 8 A100)",
    url="https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/SpeechRecognition/wav2vec2",
    caveat="These runs trim masks as fairseq does, which makes the task easier: 46.4 % of the frames are masked "
    "instead of 49.0 %, in runs of 170 ms instead of 290 ms. A run is comparable only with "
    "objective.mask_trim=micro_batch, 100 negatives, and as much audio per update",
)  # fmt: skip
