"""The operating system: files, folders, and container limits."""
