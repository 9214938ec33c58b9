"""Executors: they run a caller's jobs in this process, in a group, or over several groups."""
