"""What a model has learned, and how a run went: probes, alignment, plots, reports."""
