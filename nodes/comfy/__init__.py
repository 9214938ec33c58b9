"""The adapter to ComfyUI: running jobs, model folders, memory management, sockets, CLIP and VAE."""
