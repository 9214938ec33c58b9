"""The persistent processes: a launcher starts them, rank 0 listens, every rank works."""
