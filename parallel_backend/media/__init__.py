"""Images and videos: reading, writing and checking."""
