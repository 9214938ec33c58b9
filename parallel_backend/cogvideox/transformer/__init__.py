"""The transformer: blocks, FP8 layers, LoRA and step cache."""
