"""Linear probes, alignment, plots and the curves of runs."""
