"""This pack's attention kernels as far as a machine with no GPU can tell. Which function is used: test_attention_choice.py."""

import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from parallel_backend.cogvideox.attention import operands, recomputed_tiles
from parallel_backend.cogvideox.kernels import block_torch
from parallel_backend.cogvideox.kernels.probe import is_near, once

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CPU = torch.device("cpu")


def in_process(code: str, **environment: str) -> None:
    """Runs a program of its own: Triton decides at its import whether it interprets."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, **environment}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("fp8", [False, True])
def test_factors_leave_nothing_to_do_with_scores(fp8):
    query, key = operands.factors(64, base_two=True, fp8=fp8)
    assert math.isclose(query * key, math.log2(math.e) / 8)
    assert operands.factors(64, base_two=False, fp8=False) == (1.0, 1.0)


def test_heads_in_base_two_and_fp8_are_the_same_heads():
    states, weight, bias = torch.randn(2, 9, 3, 64), torch.rand(64) + 0.5, torch.randn(64)
    norm = torch.nn.LayerNorm(64, eps=1e-6)
    norm.weight.data, norm.bias.data = weight, bias

    def normal(factor: float, *, fp8: bool) -> torch.Tensor:
        return block_torch.TorchBlockOps().normal_heads(states, norm, None, factor, fp8=fp8, parts=1)[:, 0].detach()

    plain = normal(1.0, fp8=False)
    assert torch.equal(plain, torch.nn.functional.layer_norm(states, (64,), weight, bias, 1e-6))
    whole, root = (operands.factors(64, base_two=True, fp8=fp8)[0] for fp8 in (False, True))
    scaled, rounded = normal(whole, fp8=False), normal(root, fp8=True)
    assert (scaled / whole - plain).abs().max() <= 1e-5
    assert (rounded.float() / root - plain).abs().max() <= plain.abs().max() / 16
    query, key = operands.in_fp8(scaled, plain)
    assert (query.float() - rounded.float()).abs().max() <= rounded.float().abs().max() / 16
    assert torch.equal(key.float(), normal(root, fp8=True).float())


@needs_triton
def test_values_are_rounded_in_the_order_in_which_threads_have_their_probabilities():
    in_process(TRANSPOSES, TRITON_INTERPRET="1")


TRANSPOSES = """
import torch
from parallel_backend.cogvideox.kernels import attention_hopper_fp8 as own

torch.manual_seed(0)
batch, tokens, heads, features, keys, rows, steps = 2, 200, 2, 32, 128, 32, 2
value = (torch.randn(batch, tokens, heads, features) * 3 + torch.arange(features)).bfloat16()
value[0, 7, 1, 3] = float("nan")
parts, tiles = -(-tokens // (rows * steps)), -(-tokens // keys)
found = torch.empty(batch, heads, parts, 3, features)
own.survey_kernel[(parts, heads, batch)](
    value, found, tokens, heads, *value.stride()[:2], FEATURES=features, ROWS=rows, STEPS=steps
)
scales, centers = torch.zeros(batch, heads, features), torch.zeros(batch, heads, features)
own.settle_kernel[(batch * heads,)](
    found, scales, centers, tokens, parts, FEATURES=features, PARTS=8, LARGEST=448.0, SMALLEST=1e-12
)
places = torch.zeros(batch, heads, features, tiles * keys, dtype=torch.float8_e4m3fn)
own.transpose_kernel[(tiles, heads, batch)](
    value, places, scales, centers, tokens, heads, *value.stride()[:2], tiles * keys,
    FEATURES=features, KEYS=keys, LARGEST=448.0,
)
place = torch.arange(tiles * keys)
key = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
# A thread's columns after the first product, for each 16 of them, and those that the second one takes from it.
for lane in range(4):
    assert key[4 * lane : 4 * lane + 4].tolist() == [2 * lane, 2 * lane + 1, 8 + 2 * lane, 8 + 2 * lane + 1]
assert sorted(key.tolist()) == place.tolist()
back = (places.float() * scales[..., None] + centers[..., None])[..., key.argsort()][..., :tokens].permute(0, 3, 1, 2)
assert back[0, :, 1, 3].isnan().any()
exact, back = (part.clone() for part in (value.float(), back))
exact[0, :, 1, 3] = back[0, :, 1, 3] = 0
# It is half of this where rounding is right: the interpreter's does not carry from mantissa to exponent.
assert (back - exact).norm() < 0.06 * (exact - exact.mean(1, keepdim=True)).norm()
beyond = places.float()[..., key >= tokens]
beyond[0, 1, 3] = 0
assert not beyond.any()
"""


@needs_triton
def test_the_careful_kernel_attends_to_what_failed_and_to_nothing_else():
    in_process(ATTENDS, TRITON_INTERPRET="1")


ATTENDS = """
import torch
from parallel_backend.cogvideox.kernels import attention_hopper as own

torch.manual_seed(0)
batch, queries, keys, heads, features, rows = 2, 130, 200, 2, 32, 64
query, key, value = (torch.randn(batch, count, heads, features) for count in (queries, keys, keys))
query = query * 40  # 2 to the power of such scores is no number
groups = -(-queries // (3 * rows)) * 3
failed = torch.zeros(batch, heads, groups, dtype=torch.int32)
failed[0, 1, 0] = failed[1, 0, 2] = 5
result, sums, redone = torch.zeros_like(query), torch.zeros(batch, heads, queries), torch.zeros(1, dtype=torch.int32)
own.careful_kernel[(groups, heads, batch)](
    query, key, value, result, sums, failed, redone, queries, keys, heads,
    *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], FEATURES=features, ROWS=rows, KEYS=64,
)
scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.6931471805599453
expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
done = torch.zeros(batch, queries, heads, dtype=torch.bool)
done[0, :64, 1] = done[1, 128:, 0] = True
assert (result[done] - expected[done]).abs().max() < 1e-4 and not result[~done].any()
assert (sums.transpose(1, 2)[done] - scores.logsumexp(-1).transpose(1, 2)[done]).abs().max() < 1e-3
assert redone.item() == 2
"""


def test_a_trial_is_made_once_and_whoever_asks_meanwhile_waits_for_it():
    made, begun, go_on = [], threading.Event(), threading.Event()

    @once
    def trial(device, *dtype):
        begun.set()
        assert go_on.wait(60)
        made.append(device)
        return "a reason"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(trial, CPU)
        assert begun.wait(60)
        second = pool.submit(trial, CPU)
        assert not second.done()
        go_on.set()
        assert first.result(60) == second.result(60) == trial(CPU) == "a reason"
        assert trial(CPU, torch.float16) == "a reason"
    assert made == [CPU, CPU]


def test_where_too_much_is_attended_to_twice_a_kernel_with_a_running_maximum_takes_over():
    for twice, needs in ((4, False), (6, True)):
        pieces = recomputed_tiles.Pieces(CPU)
        pieces.look()
        pieces.all += 100
        pieces.twice.fill_(twice)
        pieces.look()
        assert not pieces.needs_maximum  # what it was at the look before: nothing yet
        pieces.look()
        assert pieces.needs_maximum == needs
        assert pieces.share_of_twice() == twice / 100
        pieces.look()
        assert pieces.needs_maximum == needs and pieces.share_of_twice() == 0


def test_what_is_not_a_number_is_near_nothing():
    exact = torch.ones(4)
    assert is_near(exact * 1.01, exact, 0.02) and not is_near(exact * 1.03, exact, 0.02)
    assert not is_near(torch.full((4,), torch.nan), exact, 0.02)


def test_a_trial_that_fails_has_its_error_for_a_reason_and_is_made_once():
    tries = []

    @once
    def fails(device, word):
        tries.append(word)
        raise ImportError("no compiler\nat line 7")

    reasons = [fails(torch.device("cpu"), word) for word in ("a", "a", "b")]
    assert reasons == ["no compiler (details in the log)"] * 3 and tries == ["a", "b"]
