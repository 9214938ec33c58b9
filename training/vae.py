"""Stage 1: the VAE, from clips alone. ``python -m training.vae --folder .train --minutes 9``"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from .drawing import draw
from .parts import LATENT, make_vae
from .scenes import held_out_scenes, training_scene
from .stage import Stage, captured

NOISE = 0.1
"""Deviation of what is added to latents, which are kept white: no pixel may hang on a detail that the transformer could not
get right. Latents of a plain small KL weight were so fine that this noise cost 5 dB."""
WHITE_WEIGHT = 0.02
"""Of how far the latents' second moments are from the identity; it keeps them from growing away from the noise."""
EDGE_WEIGHT = 6.0
"""How much more a pixel at an edge counts: most of a clip is plain background, and what tells a star from a triangle is
a few pixels of it."""


def edges(video: torch.Tensor) -> torch.Tensor:
    """Where ``[clips, 3, frames, height, width]`` changes within two pixels: ``[clips, 1, frames, height, width]``, 0..2."""
    most, least = (sign * F.max_pool3d(sign * video, (1, 5, 5), stride=1, padding=(0, 2, 2)) for sign in (1, -1))
    return (most - least).amax(1, keepdim=True)


def reconstruct(vae, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass there and, through noise, back: the video again, and its latent."""
    latent = vae.encode(video).latent_dist.mode()
    return vae.decode(latent + NOISE * torch.randn_like(latent)).sample, latent


def second_moments(latent: torch.Tensor) -> torch.Tensor:
    """Of the channels of ``[clips, channels, frames, height, width]``, with each other: the identity where they are white."""
    rows = latent.movedim(1, -1).flatten(0, -2)
    return rows.T @ rows / len(rows)


def as_video(clips: torch.Tensor) -> torch.Tensor:
    """``[clips, frames, height, width, 3]`` in 0..1 to what the VAE takes: channels first, -1..1."""
    return clips.permute(0, 4, 1, 2, 3).contiguous() * 2 - 1


def psnr(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Decibels between clips in 0..1, one figure a clip."""
    error = (one - other).float().square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


@torch.no_grad()
def measure(vae, device: torch.device) -> tuple[torch.Tensor, float, float]:
    """On held-out clips: PSNR of the round trip, and mean and standard deviation of their latents."""
    clips = draw(held_out_scenes(64, pairs=16), device)
    figures, latents = [], []
    for part in clips.split(16):
        latent = vae.encode(as_video(part)).latent_dist.mode()
        again = vae.decode(latent).sample.clamp(-1, 1).permute(0, 2, 3, 4, 1) / 2 + 0.5
        figures.append(psnr(part, again))
        latents.append(latent)
    latents = torch.cat(latents)
    return torch.cat(figures), latents.mean().item(), latents.std().item()


@torch.no_grad()
def whiten(vae, device: torch.device) -> None:
    """Turns and scales the latent channels so that each has a mean square of one and none follows another.

    The background makes nearly all of a latent's variance; unwhitened, the transformer learns backgrounds and colours
    and hardly sees the small channels that hold shapes. The change is folded into the layers that write and read
    latents, so that pixels stay the same and ``scaling_factor`` is 1. The posterior becomes as good as certain.
    """
    latents = [vae.encode(as_video(part)).latent_dist.mode() for part in draw(held_out_scenes(128, pairs=40), device).split(16)]
    values, turn = torch.linalg.eigh(second_moments(torch.cat(latents).double()))
    forward, back = (turn * values**-0.5).T.float(), (turn * values**0.5).float()
    channels = len(values)
    writes = vae.encoder.conv_out.conv
    writes.weight[:channels] = torch.einsum("ij,j...->i...", forward, writes.weight[:channels])
    writes.bias[:channels] = forward @ writes.bias[:channels]
    writes.weight[channels:] = 0
    writes.bias[channels:] = -20
    reads = [module.conv_y.conv for module in vae.decoder.modules() if hasattr(module, "conv_y")]
    reads += [module.conv_b.conv for module in vae.decoder.modules() if hasattr(module, "conv_b")]
    for layer in [vae.decoder.conv_in.conv, *reads]:
        layer.weight.copy_(torch.einsum("oj...,ji->oi...", layer.weight, back))
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def draw_clips(count: int, rng: random.Random, device: torch.device) -> torch.Tensor:
    """Training clips in bytes, on the device: ``[count, 3, frames, height, width]``."""
    parts = [[training_scene(rng) for _ in range(min(128, count - done))] for done in range(0, count, 128)]
    return torch.cat([(draw(part, device) * 255).round().byte().permute(0, 4, 1, 2, 3).contiguous() for part in parts])


def train(
    folder: Path, *, minutes: float, batch: int, clips: int, seed: int, device: torch.device, learning_rate: float,
    start: Path | None,
) -> None:  # fmt: skip
    """Trains, measures, whitens the latents, and saves ``folder/vae``."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    vae = make_vae().to(device)
    if start:
        vae = AutoencoderKLCogVideoX.from_pretrained(start, torch_dtype=torch.float32).to(device).train()
    weights = list(vae.parameters())
    stage = Stage(folder, "vae", minutes, {"vae": vae})
    optimizer = stage.make_optimizer(weights, learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    stage.resume()
    drawn = draw_clips(clips, random.Random(f"{seed} {stage.step}"), device)
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + stage.step)

    identity = torch.eye(LATENT[0], device=device)

    def update(video: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            again, latent = reconstruct(vae, video)
        difference = again.float() - video
        weight = 1 + EDGE_WEIGHT * edges(video)
        error = (weight * (difference.square() + 0.3 * difference.abs())).mean() / weight.mean()
        unlike = (second_moments(latent.float()) - identity).square().sum(1).mean()
        (error + WHITE_WEIGHT * unlike).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return {"square": difference.detach().square().mean(), "error": error.detach(), "unlike": unlike.detach()}

    def next_batch() -> torch.Tensor:
        which = torch.randint(clips, (batch,), generator=generator, device=device)
        return drawn[which].float() / 127.5 - 1

    example = next_batch()
    on_clips, on_images = captured(update, example), captured(update, example[:, :, :1].contiguous())
    for step in stage.steps():
        video = next_batch()
        if step % 7 == 0:  # one image: what image-to-video starts from
            on_images(video[:, :, :1])
        else:
            stage.note(**on_clips(video))
    vae.eval()
    figures, mean, deviation = measure(vae, device)
    stage.say(f"held-out PSNR mean {figures.mean():.2f}, least {figures.min():.2f} dB; latents {mean:.3f} +- {deviation:.3f}")
    whiten(vae, device)
    vae.save_pretrained(folder / "vae")
    stage.finish()


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".train"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--start", type=Path, help="folder of a trained VAE to go on from, not from nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3 from nothing, 7e-4 from a trained VAE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    args["learning_rate"] = args["learning_rate"] or (7e-4 if args["start"] else 1e-3)
    train(args.pop("folder"), device=torch.device(args.pop("device")), **args)


if __name__ == "__main__":
    main()
