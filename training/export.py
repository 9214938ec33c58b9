"""Stage 5: the trained parts in diffusers layout, half precision, and what both variants share only once.

``python -m training.export --folder .train --output parallel_backend/checkpoints``
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file
from transformers import T5EncoderModel

from .parts import VARIANTS, make_scheduler, make_tokenizer, make_transformer, write_model_index


def export(folder: Path, output: Path) -> None:
    """Writes ``output/demo`` whole, and of ``output/demo-i2v`` what differs: transformer and model index."""
    names = {"t2v": "demo", "i2v": "demo-i2v"}
    for name in names.values():
        shutil.rmtree(output / name, ignore_errors=True)
    whole = output / names["t2v"]
    AutoencoderKLCogVideoX.from_pretrained(folder / "vae").half().save_pretrained(whole / "vae")
    T5EncoderModel.from_pretrained(folder / "text_encoder").half().save_pretrained(whole / "text_encoder")
    make_tokenizer().save_pretrained(whole / "tokenizer")
    settings = whole / "tokenizer" / "tokenizer_config.json"  # transformers 5 writes a class name that 4 does not know
    settings.write_text(settings.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    make_scheduler().save_pretrained(whole / "scheduler")
    for variant in VARIANTS:
        weights = folder / variant / "transformer.safetensors"
        if weights.exists():
            transformer = make_transformer(variant)
            transformer.load_state_dict(load_file(weights))
            transformer.to(torch.float16).save_pretrained(output / names[variant] / "transformer")
            write_model_index(output / names[variant], variant, lender=names["t2v"] if variant == "i2v" else None)


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".train"))
    parser.add_argument("--output", type=Path, default=Path("parallel_backend/checkpoints"))
    args = parser.parse_args()
    export(args.folder, args.output)


if __name__ == "__main__":
    main()
