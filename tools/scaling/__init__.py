"""A model of training time on many GPUs: what engines send, how long links take, what overlaps with computing."""
