"""Validation metrics and reports of a run."""
