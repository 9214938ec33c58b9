"""After a new text encoder, without training again: ``python -m training.refit --old OLD_TEXT_ENCODER``

Turns ``demo-i2v``'s text projection, by least squares over captions, to what it made of the old text encoder's states. Order
that the old states lacked is not won by it; training the stage is better (see README.md).
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from .parts import make_tokenizer
from .scenes import caption, training_scene
from .text import tokenized

CAPTIONS, EMPTY = 20_000, 400


@torch.no_grad()
def states(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """``[tokens, features]`` of a text encoder."""
    encoder = T5EncoderModel.from_pretrained(folder).float().eval()
    return torch.cat([encoder(part)[0] for part in tokens.split(256)]).flatten(0, 1).double()


def refit(weights: dict[str, torch.Tensor], old: torch.Tensor, new: torch.Tensor) -> None:
    """Changes the text projection in ``weights``; ``old`` and ``new`` are states of the same tokens."""
    ones = torch.ones(len(new), 1, dtype=new.dtype)
    turned = torch.linalg.lstsq(torch.cat([new, ones], 1), old).solution
    name = "patch_embed.text_proj."
    weight, bias = weights[name + "weight"].double(), weights[name + "bias"].double()
    weights[name + "weight"] = (weight @ turned[:-1].T).half()
    weights[name + "bias"] = (bias + weight @ turned[-1]).half()


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the text encoder that demo-i2v was trained with")
    parser.add_argument("--folder", type=Path, default=Path("parallel_backend/checkpoints"))
    args = parser.parse_args()
    rng = random.Random(5)
    captions = [caption(training_scene(rng, pairs=0.5), rng, partial=number % 4 == 0) for number in range(CAPTIONS)]
    tokens = tokenized(make_tokenizer(), captions + [""] * EMPTY)
    path = args.folder / "demo-i2v" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    refit(weights, states(args.old, tokens), states(args.folder / "demo" / "text_encoder", tokens))
    save_file(weights, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
