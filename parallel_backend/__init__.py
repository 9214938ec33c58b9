"""CogVideoX on every GPU a person has: a library and a command line that know nothing of ComfyUI."""
