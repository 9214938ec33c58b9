"""Plans and precisions side by side with diffusers' and xDiT's own pipelines, in one run, from one checkpoint."""
