"""Every plan gives the latents of ``single``, in real processes over gloo, for sizes that divide and that do not."""

import pytest
import torch

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.windows import Layout
from parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob
from parallel_backend.model import Model, Windows
from parallel_backend.parallel.sequence import Chunk
from parallel_backend.plan import Plan

from .conftest import TOLERANCE

FOUR = ["cfg2-ulysses2", "ulysses2-ring2", "cfg2-ring2"]
PLANS = ["cfg2", "ulysses2", "ring2", *(pytest.param(plan, marks=pytest.mark.slow) for plan in FOUR)]


def masked(*size: int) -> dict[str, torch.Tensor]:
    """What an inpaint model is given, for a latent of this size."""
    return {"masked_video": torch.randn(1, 16, *size), "mask": torch.rand(1, 1, *size)}


STEPS = 4
"""Of cases that do not say: DPM's second order begins with the second, and no step differs in kind after the third."""
CASES = [
    ("2b", {"size": (96, 64, 17), "scheduler": "ddim"}),
    ("2b", {"size": (80, 48, 13), "scheduler": "dpm", "dynamic_cfg": True}),
    ("5b", {"size": (48, 48, 9), "scheduler": "ddim", "steps": 4, "lora": 0.8}),
    ("5b", {"size": (48, 48, 9), "scheduler": "ddim", "steps": 3, "lora": -1.5}),
    ("5b", {"size": (96, 64, 17), "scheduler": "dpm"}),  # and without it again
    ("5b", {"size": (112, 48, 9), "scheduler": "ddim", "batch": 2}),
    ("5b", {"size": (80, 48, 5), "scheduler": "ddim", "cfg": 1.0}),
    ("5b", {"size": (16, 16, 1), "scheduler": "dpm"}),
    (
        "5b",
        {
            "size": (48, 48, 9),
            "steps": 8,
            "scheduler": "dpm",
            "positive_starts": (0, 0.3, 0.5),
            "negative_starts": (0, 0.8),
            "batch": 2,
        },
    ),
    ("5b", {"size": (48, 80, 13), "denoise": 0.5, "latent": torch.randn(1, 16, 4, 10, 6)}),
    ("1.5-5b", {"size": (80, 64, 13), "scheduler": "dpm"}),
    ("1.5-5b", {"size": (48, 48, 9), "scheduler": "ddim", "lora": 1.0}),
    (
        "5b-i2v",
        {
            "size": (96, 64, 9),
            "scheduler": "dpm",
            "image": torch.randn(1, 16, 1, 8, 12),
            "end_image": torch.ones(1, 16, 1, 8, 12),
        },
    ),
    ("5b-i2v", {"size": (96, 64, 17), "batch": 2, "cfg": 1.0, "image": torch.randn(2, 16, 1, 8, 12)}),
    ("1.5-5b-i2v", {"size": (80, 48, 9), "scheduler": "dpm", "image": torch.randn(1, 16, 1, 6, 10), "image_end": 0.5}),
    (
        "anisora-i2v",
        {"size": (64, 48, 9), "steps": 3, "image": torch.ones(1, 16, 1, 6, 8), "end_image": torch.ones(1, 16, 1, 6, 8)},
    ),
    ("1.5-5b", {"size": (80, 48, 13), "scheduler": "dpm", "in_one_file": True, "lora": 0.5}),
    ("5b", {"size": (80, 48, 25), "steps": 4, "scheduler": "dpm", "windows": Windows(17, 12, riflex="finetuned")}),
    (
        "1.5-5b",
        {"size": (48, 64, 29), "steps": 4, "scheduler": "ddim", "cfg": 1.0, "windows": Windows(13, 0, "uniform", False)},
    ),
    ("2b-i2v", {"size": (48, 48, 13), "steps": 2, "windows": Windows(9, 4), "image": torch.randn(1, 16, 1, 6, 6)}),
    ("2b-control", {"size": (48, 64, 5), "steps": 4, "batch": 2, "control": torch.randn(2, 16, 2, 8, 6), "control_end": 0.5}),
    ("1.5-5b-control", {"size": (64, 48, 5), "steps": 3, "control": torch.randn(1, 16, 2, 6, 8), "control_strength": 0.5}),
    ("5b-inp", {"size": (48, 48, 5), "steps": 3, "scheduler": "ddim", **masked(2, 6, 6)}),
    ("1.5-5b-inp", {"size": (64, 48, 5), "steps": 3, "cfg": 1.0, **masked(2, 6, 8)}),
    ("1.5-5b-inp", {"size": (64, 48, 1), "steps": 3, **masked(1, 6, 8)}),
    ("1.5-5b-void", {"size": (64, 48, 5), "steps": 3, "cfg": 1.0, **masked(2, 6, 8), "mask": torch.randn(1, 16, 2, 6, 8)}),
]

PICTURES = [
    ("5b", (32, 112, 17), "auto"),  # width, height, frames: rows that no plan divides
    ("2b", (48, 64, 13), "off"),
    ("1.5-5b", (64, 32, 5), "auto"),
    ("5b", (48, 16, 9), "auto"),  # too few rows for four
    ("5b", (96, 64, 1), "on"),
]
"""What the VAE decodes and encodes."""


@pytest.fixture(scope="module")
def vae_jobs(checkpoints) -> list[DecodeJob | EncodeJob]:
    jobs, generator = [], torch.Generator().manual_seed(0)
    for like, (width, height, frames), tiling in PICTURES:
        model = Model(str(checkpoints[like]))
        shape = (2, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        jobs.append(DecodeJob(model, torch.randn(shape, generator=generator), tiling, 64, 32))
        jobs.append(EncodeJob(model, torch.rand((frames, height, width, 3), generator=generator), tiling, 64, 32))
    return jobs


@pytest.fixture(scope="module")
def jobs(make_job) -> list[SampleJob]:
    return [make_job(like, **{"steps": STEPS, **settings}) for like, settings in CASES]


@pytest.fixture(scope="module")
def single(jobs, local) -> list[torch.Tensor]:
    """What this process alone makes of each job."""
    return [local.sample(job).tensor for job in jobs]


def work_the_vae(executor, job: DecodeJob | EncodeJob) -> torch.Tensor:
    return executor.decode(job).tensor if isinstance(job, DecodeJob) else executor.encode(job).tensor


@pytest.fixture(scope="module")
def vae_single(vae_jobs, local) -> list[torch.Tensor]:
    """What this process alone makes of each picture."""
    return [work_the_vae(local, job) for job in vae_jobs]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_equals_single(plan, start_group, jobs, single, vae_jobs, vae_single):
    group = start_group(plan)
    for job, expected in zip(vae_jobs, vae_single):
        result = work_the_vae(group, job)
        assert result.shape == expected.shape and (result - expected).abs().max() <= TOLERANCE, job
    for case, job, expected in zip(CASES, jobs, single):
        result = group.sample(job)
        assert (result.tensor - expected).abs().max() <= TOLERANCE, case
        assert (result.report.plan, result.report.world_size) == (plan, Plan.parse(plan).world_size)
        assert len(result.report.peak_memory) == result.report.world_size


def test_the_cases_have_tokens_that_divide_and_that_do_not(jobs):
    for degree in (2, 4):
        remainders = set()
        for job in jobs:
            checkpoint = Checkpoint.open(job.model.path)
            frames = Layout.of(job, checkpoint).length
            remainders.add((checkpoint.tokens(frames, *job.latent.shape[3:]) + checkpoint.text_tokens) % degree)
        assert 0 in remainders and len(remainders) > 1


def test_the_lora_of_the_cases_changes_the_latents(make_job, local):
    settings = {"size": (48, 48, 9), "steps": 2}
    base, changed = (local.sample(make_job("5b", **settings, **lora)).tensor for lora in ({}, {"lora": 0.8}))
    assert (base - changed).abs().max() > 0.01


@pytest.mark.parametrize("text, video, size", [(226, 17550, 16), (226, 17550, 7), (32, 1, 4), (32, 75, 4), (5, 3, 4)])
def test_chunks_of_a_sequence_are_equal_and_lose_nothing(text, video, size):
    joint = torch.arange(text + video, dtype=torch.float32)[None, :, None]
    cosines, sines = joint[0, text:], -joint[0, text:]
    chunks = [Chunk(text, video, rank, size) for rank in range(size)]
    parts = [chunk.of_joint(joint) for chunk in chunks]
    assert {part.shape[1] for part in parts} == {chunks[0].length}
    assert all(part.is_contiguous() for part in parts)  # as the kernels need them
    assert torch.equal(torch.cat(parts, dim=1)[:, : text + video], joint)
    assert chunks[0].padding < size
    assert sum(chunk.local_text for chunk in chunks) == text
    for chunk, part in zip(chunks, parts):
        cosine_rows, sine_rows = chunk.of_rotary(cosines, sines)
        for rows, sign, at_text in ((cosine_rows, 1, 1), (sine_rows, -1, 0)):
            assert (rows[: chunk.local_text] == at_text).all()
            assert torch.equal(rows[chunk.local_text :], sign * part[0, chunk.local_text :])  # padding is zero in both


def test_the_sizes_that_xdit_cannot_split_are_no_special_case():
    """xDiT cuts the 30 rows of 480 pixels and refuses 4 and 8; whole tokens divide by 16."""
    tokens = Checkpoint(None, {"sample_height": 60}, {}, {}).tokens(13, 60, 90)
    assert (tokens + 226) % 16 == 0
