"""wav2vec 2.0's encoder in plain PyTorch: modules and functions of tensors, without files, ranks or engines."""
