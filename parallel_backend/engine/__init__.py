"""The engine: runs a job on one rank."""
