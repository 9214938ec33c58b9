"""From a request to a latent: text, conditions, windows and the denoise loop."""
