"""w2vscale: scalable pretraining of wav2vec 2.0."""

__version__ = "0.1.0"
