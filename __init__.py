"""ComfyUI's entry point of the pack. Nothing slow is imported before a node runs."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Returns the pack's extension. ComfyUI looks for this name."""
    from .nodes import CogVideoXExtension

    return CogVideoXExtension()
