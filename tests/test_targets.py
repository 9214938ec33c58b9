"""Kernels compile for every kind of GPU that people have, on a machine with none. What they compute: test_speed.py, test_vae.py."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.random_weights import transformer_config
from parallel_backend.cogvideox.attention import hopper_fp8, recomputed_tiles
from parallel_backend.cogvideox.attention.torch_attention import HEAD_DIM
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.kernels.block_torch import CONDITIONS, FP8, INT8, Own
from parallel_backend.cogvideox.transformer.quantized_linear import Int8Linear

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets here", allow_module_level=True)

from parallel_backend.cogvideox.kernels import attention_hopper, attention_hopper_fp8, block_triton, vae_triton  # noqa: E402

from .conftest import REPO  # noqa: E402
from .support.targets import HOPPER, SHARED, Variant, recorded  # noqa: E402

pytestmark = pytest.mark.slow
DTYPES = {"2b": torch.float16, "5b": torch.bfloat16, "1.5-5b": torch.bfloat16, "demo": torch.bfloat16}
"""The models that differ in their features, and what they are computed in."""
VAE_LAYERS = ((512, 32), (256, 32), (128, 32), (48, 8))
"""Channels and groups of norms: CogVideoX's, and the demo's layer whose channels are no power of two."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Kernels are compiled and not read from the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def demo_config(part: str) -> dict:
    return json.loads((bundled.find(bundled.DEMO) / part / "config.json").read_text())


def empty(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def launch_block(config: dict, dtype: torch.dtype) -> None:
    """Launches every kernel of a block, with tokens rounded to FP8, to int8 and not at all."""
    ops, heads, head_dim = block_triton.TritonBlockOps(), config["num_attention_heads"], config["attention_head_dim"]
    features, rotary = heads * head_dim, config.get("use_rotary_positional_embeddings")
    norm = torch.nn.LayerNorm(features, device="meta", dtype=dtype)
    norm_head = torch.nn.LayerNorm(head_dim, device="meta", dtype=dtype)
    states, conditions = empty(2, 100, features, dtype=dtype), empty(2, CONDITIONS * features, dtype=dtype)
    tables = (empty(100, head_dim), empty(100, head_dim)) if rotary else None
    for rounded in (None, FP8, INT8):
        ops.add_and_modulate(states, states, conditions, norm, conditions, 7, rounded=rounded)
        inputs = ops.modulate(states, norm, conditions, 7, rounded=rounded)
        ops.inputs(states, rounded=rounded)
        if rounded is INT8:
            ops.gelu(
                Int8Linear(torch.nn.Linear(features, 4 * features, device="meta", dtype=dtype)), inputs, "tanh", rounded=INT8
            )
            Int8Linear(torch.nn.Linear(features, features, device="meta", dtype=dtype))(*inputs)
        else:
            ops.gelu(lambda *inputs: empty(2, 100, 4 * features, dtype=dtype), (states,), "tanh", rounded=rounded)
    spread, own = states.unflatten(2, (heads, head_dim)), Own(empty(2, 1, 100, heads // 2, head_dim, dtype=dtype), 1)
    for fp8 in (False, True):
        ops.normal_heads(spread, norm_head, tables, 0.18, fp8=fp8, parts=1)
        in_fp8 = Own(own.memory.to(FP8), own.first) if fp8 else own
        ops.normal_heads(spread, norm_head, tables, 0.18, fp8=fp8, parts=2, own=in_fp8)
    ops.add(states, states, conditions, 7)
    ops.join(ops.spread(spread, 2))
    ops.spread(spread, 2, own)


def launch_vae(channels: int, groups: int, dtype: torch.dtype) -> None:
    """Launches every kernel of a VAE's layer, with the condition of its decoder and without."""
    ops = vae_triton.TritonVaeOps()

    def frames(count: int, rows: int) -> torch.Tensor:
        states = empty(1, channels, count, rows, rows, dtype=dtype)
        return states.contiguous(memory_format=torch.channels_last_3d)

    states, norm, bias = (
        frames(4, 48),
        torch.nn.GroupNorm(groups, channels, device="meta", dtype=dtype),
        empty(channels, dtype=dtype),
    )
    mean, variance = ops.moments(states, bias, groups)
    for condition in (frames(2, 6).float(), None):
        ops.normalise(states, bias, mean, variance, norm, condition, condition, torch.empty_like(states))
    ops.enlarge(states, frames(8, 96))
    ops.add(states, bias, states)


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    """What all published models and the demo launch, each variant once, those of the largest model first."""
    with recorded(block_triton, "token_kernel", "head_kernel", "swap_kernel") as of_blocks:
        for like in ("5b", "1.5-5b", "2b", "demo"):
            launch_block(
                demo_config("transformer") if like == "demo" else transformer_config(like, full_size=True), DTYPES[like]
            )
    with recorded(vae_triton, "_moments", "_normalise", "_add", "_enlarge") as of_vaes:
        for channels, groups in VAE_LAYERS:
            launch_vae(channels, groups, torch.bfloat16)
    return [*of_blocks, *of_vaes]


@pytest.mark.parametrize("chip", SHARED)
def test_the_kernels_of_every_model_are_made_for_every_chip(chip, variants):
    """The largest variant of each kernel is made for every chip, and each other variant for one chip, in turn."""
    kinds = set()
    for place, variant in enumerate(variants):
        chips = variant.chips if variant.kind not in kinds else [variant.chips[place % len(variant.chips)]]
        kinds.add(variant.kind)
        if chip in chips:
            variant.compile(chip)
    assert len(kinds) == 10


def test_no_condition_in_a_kernel_chains_three_operands():
    """Triton 3.2, which torch 2.6 brings, does not compile one."""
    for module in (block_triton, vae_triton):
        functions = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef)]
        kernels = [node for node in functions if any("jit" in ast.unparse(each) for each in node.decorator_list)]
        assert len(kernels) >= 3
        for node in (node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.BoolOp)):
            assert len(node.values) == 2, ast.unparse(node)


@pytest.fixture(scope="module")
def hopper_ptx(tmp_path_factory) -> dict[str, str]:
    """The attention kernels in PTX, by what they multiply in; see ``support/hopper.py``."""
    folder = tmp_path_factory.mktemp("hopper")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hopper", folder], cwd=REPO, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return {file.stem: file.read_text() for file in folder.glob("*.ptx")}


@pytest.mark.parametrize("queries", ["bf16", "fp16", "fp8e4nv"])
def test_attention_is_made_for_hopper_by_the_triton_that_is_here(queries, hopper_ptx):
    """Gluon changes from version to version; where this fails, GPUs fall back to something slower."""
    products = [line for line in hopper_ptx[queries].splitlines() if "wgmma.mma_async" in line]
    assert products and any("e4m3" in line for line in products) == (queries == "fp8e4nv")


@pytest.mark.parametrize("raises", [False, True])
def test_both_products_are_made_in_e4m3_and_probabilities_stay_in_their_threads(raises, hopper_ptx):
    keys, ptx = attention_hopper_fp8.KEYS.value, hopper_ptx[f"all-fp8e4nv-{raises}"]
    products = re.findall(r"wgmma.mma_async.sync.aligned.m64n(\d+)k32.f(16|32).e4m3.e4m3", ptx)
    assert set(products) == {(str(keys), "16"), (str(HEAD_DIM), "16"), (str(HEAD_DIM), "32")}
    assert len(products) == ptx.count("wgmma.mma_async"), "a product is not in e4m3"
    assert "st.shared.v4" not in ptx and "stmatrix" not in ptx, "probabilities go through shared memory"
    assert ptx.count("shfl.sync.idx") <= 1, "probabilities go from thread to thread"  # maxima are shfl.sync.bfly


def test_what_prepares_fp8_attention_and_repairs_it_is_made_for_hopper():
    states, sums = empty(1, 900, 48, HEAD_DIM, dtype=torch.bfloat16), empty(1, 48, 900)
    with recorded(attention_hopper_fp8, "survey_kernel", "settle_kernel", "transpose_kernel") as found:
        hopper_fp8.in_places(states, attention_hopper_fp8.KEYS.value)
    with recorded(attention_hopper, "careful_kernel") as careful:
        recomputed_tiles.recompute(states, states, states, states, sums, empty(48 * 15, dtype=torch.int32))
    assert len(found) == 3 and len(careful) == 1
    for variant in (*found, *careful):
        variant.compile(HOPPER)
