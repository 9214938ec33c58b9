"""From a sampling job to a latent: text states, conditions, context windows and the denoise loop."""
