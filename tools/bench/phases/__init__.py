"""The phases of tools/bench/gpu.py. Each is a function that yields rows, (key, value), as it measures them."""
