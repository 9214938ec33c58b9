"""Stage 2: the text encoder. ``python -m training.text --folder .train``; a minute or two on a CPU, seconds on a GPU.

It learns to read, and stays as it is afterwards, as the T5 of the real models does. CogVideoX's transformer gives text tokens no
positions: what belongs to what must stand in the text encoder's states. So at each colour word it must tell the shape
and the motion of that thing, not of the other one.
"""

import argparse
import random
from pathlib import Path

import torch
from torch.nn import functional

from .parts import TEXT_FEATURES, TEXT_TOKENS, make_text_encoder, make_tokenizer
from .scenes import COLOURS, MOTIONS, SHAPES, Scene, caption, random_scene

STEPS, BATCH = 600, 128
UNKNOWN = 0.05
"""Share of words that the model must do without."""
LEARNING_RATE, BIAS_RATE = 1e-3, 3e-2
"""The bias alone knows word order, and has to grow to several units, far for an optimizer that moves by its rate."""
UNSAID = -100
"""The label of a token that has nothing to tell."""
CROSSING = len(MOTIONS)
"""The motion of things whose caption says that they cross, not which way they go."""


def without_words(tokens: torch.Tensor, unknown: int, generator: torch.Generator) -> torch.Tensor:
    """The tokens with some words made unknown; padding and the end stay."""
    lost = torch.rand(tokens.shape, generator=generator, device=tokens.device) < UNKNOWN
    return torch.where(lost & (tokens > 2), unknown, tokens)


def tokenized(tokenizer, captions: list[str]) -> torch.Tensor:
    """``[captions, TEXT_TOKENS]``."""
    return tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").input_ids


def make_reading(tokenizer, count: int, *, held_out: bool, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions, three of four with two things: tokens ``[count, TEXT_TOKENS]`` and labels ``[count, TEXT_TOKENS, 2]``.

    Labels are the shape and the motion of a colour word's thing, and ``UNSAID`` elsewhere.
    """
    scenes: list[Scene] = []
    while len(scenes) < count:
        if (scene := random_scene(rng, pairs=0.75)).held_out == held_out:
            scenes.append(scene)
    tokens = tokenized(tokenizer, [caption(scene, rng) for scene in scenes])
    labels = torch.full((*tokens.shape, 2), UNSAID)
    shapes, motions = list(SHAPES), list(MOTIONS)
    colours = dict(zip(COLOURS, tokenizer.convert_tokens_to_ids(list(COLOURS))))
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            motion = CROSSING if scene.crossing else motions.index(thing.motion)
            labels[index, tokens[index] == colours[thing.colour]] = torch.tensor([shapes.index(thing.shape), motion])
    return tokens, labels


class Reader(torch.nn.Module):
    """The text encoder with what its states are asked for; only the encoder is kept."""

    def __init__(self, words: int):
        super().__init__()
        self.encoder = make_text_encoder(words)
        self.shape = torch.nn.Linear(TEXT_FEATURES, len(SHAPES))
        self.motion = torch.nn.Linear(TEXT_FEATURES, len(MOTIONS) + 1)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of shape and motion at each token."""
        states = self.encoder(tokens)[0]
        return self.shape(states), self.motion(states)


@torch.no_grad()
def share_read(reader: Reader, tokens: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Shares of colour words whose shape and whose motion are read right."""
    said = labels[..., 0] != UNSAID
    return [
        (logits.argmax(-1) == label)[said].float().mean().item() for logits, label in zip(reader(tokens), labels.unbind(-1))
    ]


def train(folder: Path, *, seed: int, device: torch.device) -> None:
    """Trains the text encoder and saves it to ``folder/text_encoder``."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(f"reading {seed}"), make_tokenizer()
    reader = Reader(len(tokenizer)).to(device)
    groups = [
        {"params": [value], "lr": BIAS_RATE if "relative_attention_bias" in name else LEARNING_RATE}
        for name, value in reader.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator(device).manual_seed(seed)
    unseen = [part.to(device) for part in make_reading(tokenizer, 1000, held_out=True, rng=rng)]
    for step in range(STEPS):
        tokens, labels = (part.to(device) for part in make_reading(tokenizer, BATCH, held_out=False, rng=rng))
        answers = reader(without_words(tokens, tokenizer.unk_token_id, generator))
        loss = sum(
            functional.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=UNSAID)
            for logits, label in zip(answers, labels.unbind(-1))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            shape, motion = share_read(reader, *unseen)
            print(
                f"text: step {step + 1}, loss {loss.item():.3f}; unseen captions: shape {shape:.1%}, motion {motion:.1%}",
                flush=True,
            )
    reader.encoder.save_pretrained(folder / "text_encoder")


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".train"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(args.folder, seed=args.seed, device=torch.device(args.device))


if __name__ == "__main__":
    main()
