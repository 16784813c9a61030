"""Linear probes, alignment, plots, the log of events, and the report of runs."""
