"""The transformer: its blocks, attention, FP8 layers, LoRA and step cache."""
