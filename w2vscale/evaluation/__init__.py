"""Validation metrics, word error rates with confidence intervals, and tables of results."""
