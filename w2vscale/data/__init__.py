"""Manifests become a planned stream of duration-bucketed micro-batches."""
