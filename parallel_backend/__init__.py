"""CogVideoX on every GPU of the user: a library and a command line that know nothing of ComfyUI."""
