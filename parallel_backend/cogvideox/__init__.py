"""The CogVideoX model: checkpoints, transformer, VAE and sampling. Independent of how a forward pass is split over ranks."""
