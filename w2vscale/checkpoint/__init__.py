"""The canonical checkpoint: one format for every engine and number of processes; one reader, one writer, and tools."""
