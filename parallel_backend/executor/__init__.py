"""Executors: run jobs in this process, in a group of processes, or in several groups."""
