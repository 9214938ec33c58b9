"""The transformer: blocks, attention, FP8 layers, LoRA and step cache."""
