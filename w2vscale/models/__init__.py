"""wav2vec 2.0 as modules and pure tensor functions; knows nothing of files, ranks or engines."""
