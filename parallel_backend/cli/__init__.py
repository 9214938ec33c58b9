"""The command line: its options, its commands, and the files that it reads and writes."""
