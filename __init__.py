"""ComfyUI's door to the pack. Nothing slow is imported before a node runs."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's extension, as ComfyUI asks for it."""
    from .nodes import CogVideoXExtension

    return CogVideoXExtension()
