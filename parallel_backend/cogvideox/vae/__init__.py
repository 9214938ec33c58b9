"""The VAE: encoding, decoding and previews."""
