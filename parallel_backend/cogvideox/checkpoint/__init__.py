"""A checkpoint: what its files hold, where they are found, and its parts as they are loaded."""
