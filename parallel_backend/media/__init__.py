"""Pictures and videos: files read and written, and pictures checked."""
