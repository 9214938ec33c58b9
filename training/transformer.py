"""Stages 3 and 4: the transformer. ``python -m training.transformer --variant t2v --folder .train --minutes 9``

The VAE and the text encoder of the folder stay as they are; ``i2v`` starts from the weights of ``t2v``.
``--start FOLDER`` goes on from an exported model of the variant instead: less to learn again when the scenes change.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from .drawing import draw
from .parts import (
    LATENT,
    TEXT_TOKENS,
    VARIANTS,
    make_scheduler,
    make_tokenizer,
    make_transformer,
    widen_input,
)
from .scenes import caption, training_scene
from .stage import Stage, captured
from .text import tokenized, without_words
from .vae import as_video

CAPTIONS = 4
"""Captions of each clip; one in four leaves something unsaid."""
TEXT_DROPOUT = 0.12
"""Share of prompts that are empty, so that guidance has something to lead away from."""
EMA = 0.9995


@dataclass
class Bank:
    """Encoded clips with their captions, on the device."""

    latents: torch.Tensor
    """``[clips, latent frames, 16, height, width]``, scaled."""
    images: torch.Tensor
    """First frames, each encoded alone: mean and deviation ``[clips, 2, 16, height, width]``, scaled."""
    tokens: torch.Tensor
    """``[clips, CAPTIONS, TEXT_TOKENS]``."""


def load_bank(folder: Path, tokenizer, *, clips: int, pairs: float, seed: int, device: torch.device) -> Bank:
    """The clips that both variants learn from; made once, and kept in ``folder/bank.pt``."""
    path, made_with = folder / "bank.pt", [clips, pairs, seed]
    if path.exists() and (kept := torch.load(path, map_location=device, weights_only=True))["made with"] == made_with:
        return Bank(kept["latents"], kept["images"], kept["tokens"])
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae").eval()
    bank = make_bank(vae, tokenizer, clips=clips, pairs=pairs, seed=seed, device=device)
    torch.save({"made with": made_with, **vars(bank)}, path)
    return bank


@torch.no_grad()
def make_bank(vae, tokenizer, *, clips: int, pairs: float, seed: int, device: torch.device) -> Bank:
    """Draws and encodes training scenes; ``pairs`` is the share of those with two things."""
    rng = random.Random(f"bank {seed}")
    scale = vae.config.scaling_factor
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = vae.to(device, dtype)
    latents, images, captions = [], [], []
    done = 0
    while done < clips:
        scenes = [training_scene(rng, pairs=pairs) for _ in range(min(128, clips - done))]
        done += len(scenes)
        video = as_video(draw(scenes, device)).to(dtype)
        latents.append((vae.encode(video).latent_dist.mode().float() * scale).half())
        first = vae.encode(video[:, :, :1]).latent_dist
        images.append((torch.stack([first.mean, first.std], 1)[:, :, :, 0].float() * scale).half())
        captions += [caption(scene, rng, partial=number == 0) for scene in scenes for number in range(CAPTIONS)]
    return Bank(
        torch.cat(latents).transpose(1, 2).contiguous(),
        torch.cat(images),
        tokenized(tokenizer, captions).view(clips, CAPTIONS, TEXT_TOKENS).to(device),
    )


def draw_batch(bank: Bank, size: int, unknown: int, generator: torch.Generator):
    """Random clips with one caption each: latents, image latents and tokens, some words and some prompts left out."""
    device = bank.latents.device
    which = torch.randint(len(bank.latents), (size,), generator=generator, device=device)
    wording = torch.randint(CAPTIONS, (size,), generator=generator, device=device)
    tokens = without_words(bank.tokens[which, wording], unknown, generator)
    empty = torch.zeros(TEXT_TOKENS, dtype=tokens.dtype, device=device)
    empty[0] = 1
    dropped = torch.rand(size, 1, generator=generator, device=device) < TEXT_DROPOUT
    tokens = torch.where(dropped, empty, tokens)
    mean, deviation = bank.images[which].float().unbind(1)
    image = mean + deviation * torch.randn(mean.shape, generator=generator, device=device)
    return bank.latents[which].float(), image, tokens


def rotary(head_dim: int, device: torch.device):
    """Positions of the one size there is."""
    _, frames, height, width = LATENT
    return get_3d_rotary_pos_embed(
        embed_dim=head_dim, crops_coords=((0, 0), (height // 2, width // 2)), grid_size=(height // 2, width // 2),
        temporal_size=frames, device=device,
    )  # fmt: skip


class Average:
    """An exponential moving average of a module's weights."""

    def __init__(self, module: torch.nn.Module):
        self.weights = list(module.parameters())
        self.values = [value.detach().clone() for value in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the weights, closely at first."""
        torch._foreach_lerp_(self.values, self.weights, 1 - min(EMA, (1 + step) / (10 + step)))

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the module its averaged weights."""
        torch._foreach_copy_(self.weights, self.values)

    def state_dict(self) -> dict:
        """The averages by number."""
        return {str(index): value for index, value in enumerate(self.values)}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        for index, value in enumerate(self.values):
            value.copy_(state[str(index)])


def train(
    folder: Path, *, variant: str, start: Path | None, minutes: float, batch: int, clips: int, pairs: float, seed: int,
    device: torch.device, learning_rate: float, compiled: bool,
) -> None:  # fmt: skip
    """Trains one variant on ``folder/vae`` and ``folder/text_encoder`` and saves averaged weights to ``folder/<variant>``."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = make_tokenizer()
    transformer = make_transformer(variant).to(device)
    if start:
        transformer.load_state_dict(CogVideoXTransformer3DModel.from_pretrained(start / "transformer").float().state_dict())
    elif variant == "i2v":
        transformer.load_state_dict(widen_input(load_file(folder / "t2v" / "transformer.safetensors")))
    text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").to(device).requires_grad_(False)
    weights, average = list(transformer.parameters()), Average(transformer)
    stage = Stage(folder, variant, minutes, {"transformer": transformer, "average": average})
    optimizer = stage.make_optimizer(weights, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    stage.resume()
    bank = load_bank(folder, tokenizer, clips=clips, pairs=pairs, seed=seed, device=device)
    stage.say(f"{clips} clips encoded, latents {bank.latents.float().mean():.3f} +- {bank.latents.float().std():.3f}")
    if compiled:
        for block in transformer.transformer_blocks:
            block.compile()
    scheduler = make_scheduler()
    signal = scheduler.alphas_cumprod.sqrt().float().to(device)
    noise_level = (1 - scheduler.alphas_cumprod).sqrt().float().to(device)
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + stage.step)
    positions = rotary(transformer.config.attention_head_dim, device)
    unknown = tokenizer.unk_token_id

    def update(clean, image, tokens, noise, timestep) -> dict[str, torch.Tensor]:
        a, b = (level[timestep].view(-1, 1, 1, 1, 1) for level in (signal, noise_level))
        noisy, velocity = a * clean + b * noise, a * noise - b * clean
        if variant == "i2v":
            frames = torch.zeros_like(clean)
            frames[:, 0] = image
            noisy = torch.cat([noisy, frames], dim=2)
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            text = text_encoder(tokens)[0]
            predicted = transformer(noisy, text, timestep, image_rotary_emb=positions, return_dict=False)[0]
        loss = (predicted.float() - velocity).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return {"loss": loss.detach()}

    def next_batch() -> tuple[torch.Tensor, ...]:
        clean, image, tokens = draw_batch(bank, batch, unknown, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        # the noisier of two: what goes where is decided in the first steps, at little signal
        timestep = torch.randint(1000, (2, batch), generator=generator, device=device).amax(0)
        return clean, image, tokens, noise, timestep

    run = captured(update, *next_batch())
    for step in stage.steps():
        stage.note(**run(*next_batch()))
        average.update(step)
    average.apply()
    (folder / variant).mkdir(exist_ok=True)
    save_file(transformer.state_dict(), folder / variant / "transformer.safetensors")
    stage.finish()


def main() -> None:
    """The command of the module's docstring."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--folder", type=Path, default=Path(".train"))
    parser.add_argument("--start", type=Path, help="an exported model of the variant to go on from")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--pairs", type=float, default=0.5, help="share of clips with two things")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3, or 5e-4 for what goes on from something")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    args = vars(parser.parse_args())
    args["learning_rate"] = args["learning_rate"] or (5e-4 if args["start"] or args["variant"] == "i2v" else 1e-3)
    train(args.pop("folder"), device=torch.device(args.pop("device")), **args)


if __name__ == "__main__":
    main()
