"""A model of training time on many GPUs: what engines send, how long links take, and how both overlap with computing."""
