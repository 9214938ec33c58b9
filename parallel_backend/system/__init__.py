"""The operating system: files, folders, and the limits of a container."""
