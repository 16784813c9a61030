"""Process groups, collectives and the single-machine launcher."""
