"""What the installed libraries can do."""


def dtype_argument(cls) -> str:
    """Returns the name of the dtype argument of ``cls.from_pretrained``: diffusers and transformers both renamed it."""
    from importlib.metadata import version

    from packaging.version import Version

    library = cls.__module__.partition(".")[0]
    renamed = {"diffusers": "0.42", "transformers": "4.56"}[library]
    return "dtype" if Version(version(library)) >= Version(renamed) else "torch_dtype"
