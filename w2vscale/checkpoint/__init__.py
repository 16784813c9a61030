"""The canonical checkpoint: write, commit, find, read. No engine code."""
