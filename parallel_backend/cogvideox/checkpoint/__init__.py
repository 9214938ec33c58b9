"""Checkpoints: how they are found, what their files say, and how their parts are loaded."""
