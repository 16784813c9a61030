"""What a run will need and cost on GPUs that need not be there: memory, time and communication, without computing."""
