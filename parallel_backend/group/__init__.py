"""The persistent processes of a group: a launcher starts them, rank 0 takes requests, every rank works."""
