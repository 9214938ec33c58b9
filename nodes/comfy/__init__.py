"""All that touches ComfyUI."""
