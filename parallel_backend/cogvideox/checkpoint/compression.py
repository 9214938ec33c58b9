"""The VAE's compression: how much smaller a latent is than its video."""

SPATIAL, TEMPORAL = 8, 4
"""Pixels per latent row or column, and frames per latent frame after the first."""


def frames_of(latent_frames: int) -> int:
    """Returns the frames of a video of so many latent frames."""
    return (latent_frames - 1) * TEMPORAL + 1


def latent_frames_of(frames: int) -> int:
    """Returns the latent frames of a video, without padding."""
    return (frames - 1) // TEMPORAL + 1
