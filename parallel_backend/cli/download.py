"""The command ``download``: gets a model from a hub."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..cogvideox.checkpoint import bundled, catalogue
from ..cogvideox.checkpoint.download import GB, Download, prepare
from ..cogvideox.checkpoint.download import download as fetch_all
from ..cogvideox.checkpoint.hubs import HUBS
from ..errors import RequestError
from .console import show


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``download``."""
    parser.add_argument("model", metavar="NAME", help=f"{', '.join(catalogue.MODELS)}; or any ORG/NAME of the hub")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--comfyui", metavar="PATH", help="ComfyUI's folder: the model goes into its models/CogVideo")
    where.add_argument(
        "--output",
        metavar="FOLDER",
        help="the model's own folder (default: that of the ComfyUI that the pack is installed in, else the Hugging Face cache)",
    )
    parser.add_argument(
        "--source",
        choices=tuple(HUBS),
        default="huggingface",
        help="the hub; HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors, and HF_TOKEN your account at Hugging Face",
    )
    parser.set_defaults(run=download)


def download(args: Namespace) -> int:
    """Downloads a model, after saying its size and licence."""
    if alone := catalogue.ALONE.get(args.model.lower()):
        raise RequestError(
            f"{args.model} is published as transformers in single files: get those of {alone.repository} into ComfyUI's "
            "models/diffusion_models"
        )
    repository = catalogue.repository_of(args.model)
    if repository is None:
        raise RequestError(
            f"there is no model '{args.model}'; use one of {', '.join(catalogue.MODELS)}, or ORG/NAME of the hub"
        )
    wanted = prepare(HUBS[args.source](), repository, folder_of(args, repository))
    show(wanted.describe())
    show(f"into {wanted.folder}")
    fetch_all(wanted)
    show(f"complete and checked, {wanted.size / GB:.1f} GB: {how_to_use(args, wanted)}")
    return 0


def folder_of(args: Namespace, repository: str) -> Path | None:
    """Returns the folder to write to; None for the Hugging Face cache."""
    if args.output:
        return Path(args.output).expanduser().absolute()
    root = Path(args.comfyui).expanduser().absolute() if args.comfyui else bundled.comfyui()
    if root is None:
        return None
    if not (root / "models").is_dir():
        raise RequestError(
            f"--comfyui {args.comfyui}: there is no folder {root / 'models'}; give the folder that main.py is in"
        )
    return root / bundled.MODELS_FOLDER / repository.partition("/")[2]


def how_to_use(args: Namespace, wanted: Download) -> str:
    """Says by which name nodes and commands find the model."""
    if wanted.is_cached:
        return f"choose huggingface/{wanted.repository.name} in Load CogVideoX, or give --model {args.model}"
    if args.output:
        return f"give --model {wanted.folder}"
    is_own = bundled.downloaded(args.model) == wanted.folder
    return f"choose CogVideo/{wanted.folder.name} in Load CogVideoX, or give --model {args.model if is_own else wanted.folder}"
