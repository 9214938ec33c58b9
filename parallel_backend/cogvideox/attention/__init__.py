"""Attention of a full sequence: the functions that exist, and which of them a job uses."""
