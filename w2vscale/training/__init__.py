"""The loop, its state, metrics, display and signals."""
