"""The DeepSpeed ZeRO engine and its JSON configuration."""
