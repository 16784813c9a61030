"""Process group, rank helpers, launching."""
