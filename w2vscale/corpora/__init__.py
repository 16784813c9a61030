"""Offline commands on corpora: prepare, index, validate, summarise, subset, write shards, train sentence pieces."""
