"""Stage 1: the VAE, from clips alone. ``python -m training.vae --folder .train --minutes 7``"""

import argparse
import random
from pathlib import Path

import torch

from .drawing import draw
from .parts import make_vae
from .scenes import held_out_scenes, training_scene
from .stage import Stage, captured

KL_WEIGHT = 2e-5
"""Of the mean divergence from a unit normal: latents stay smooth and bounded, which the transformer needs."""


def reconstruct(vae, video: torch.Tensor):
    """One pass there and back: the video again, and the posterior."""
    posterior = vae.encode(video).latent_dist
    return vae.decode(posterior.sample()).sample, posterior


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
    latents = []
    for part in draw(held_out_scenes(128, pairs=40), device).split(16):
        latents.append(vae.encode(as_video(part)).latent_dist.mode().movedim(1, -1).flatten(0, -2))
    rows = torch.cat(latents).double()
    values, turn = torch.linalg.eigh(rows.T @ rows / len(rows))
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


def train(folder: Path, *, minutes: float, batch: int, seed: int, device: torch.device, learning_rate: float) -> None:
    """Trains, measures, whitens the latents, and saves ``folder/vae``."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    vae = make_vae().to(device)
    weights = list(vae.parameters())
    stage = Stage(folder, "vae", minutes, {"vae": vae})
    optimizer = stage.make_optimizer(weights, learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    stage.resume()
    rng = random.Random(f"{seed} {stage.step}")
    scenes = [training_scene(rng) for _ in range(20_000 if device.type == "cuda" else 50)]

    def update(video: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            again, posterior = reconstruct(vae, video)
        difference = again.float() - video
        square = difference.square().mean()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        (square + 0.3 * difference.abs().mean() + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return {"square": square.detach(), "kl": kl.detach()}

    example = as_video(draw(scenes[:batch], device))
    on_clips, on_images = captured(update, example), captured(update, example[:, :, :1].contiguous())
    for _step in stage.steps():
        video = as_video(draw(rng.sample(scenes, batch), device))
        if rng.random() < 0.15:  # one image: what image-to-video starts from
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
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = vars(parser.parse_args())
    train(args.pop("folder"), device=torch.device(args.pop("device")), **args)


if __name__ == "__main__":
    main()
