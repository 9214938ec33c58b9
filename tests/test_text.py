"""Prompts become the text states of diffusers' pipeline, padded or cut to the model's limit."""

import gc
import logging
import shutil
from weakref import ref

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

from parallel_backend.cli.prompts import encode_prompts
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint import checkpoint
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline import prompt_weights
from parallel_backend.cogvideox.pipeline import text as text_module
from parallel_backend.cogvideox.pipeline.text import CPU, TextEncoder, find_place
from parallel_backend.errors import GroupError, RequestError
from parallel_backend.executor.local import LocalExecutor

from .conftest import NEGATIVE, PROMPT, TOLERANCE

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
T5 = 9 * 2**30
"""Bytes of the encoder's weights in 16 bits, as the tests have it."""


@pytest.fixture
def encoder(checkpoints):
    return TextEncoder(Checkpoint.open(checkpoints["5b"]), device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("prompt", ["", "a red circle", "A Panda, playing!", "red " * 31, "red " * 32, "red blue " * 40])
def test_text_states_equal_those_of_diffusers(prompt, encoder, checkpoints):
    pipeline = CogVideoXPipeline.from_pretrained(checkpoints["5b"])
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)
    states = encoder.encode([encoder.tokenize(prompt)])
    assert states.shape == (1, 32, 32)
    assert (states - expected).abs().max() <= TOLERANCE


def test_a_prompt_that_is_too_long_says_what_is_cut_off(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        encoder.tokenize("red blue")
        assert not caplog.messages
        encoder.tokenize("red blue " * 20 + "green")
    assert "32 are used; cut off: '" in caplog.text
    assert text_module.shortened("a red circle") == "a red circle"
    assert text_module.shortened("word " * 20) == "word " * 12 + "… and 8 more words"
    assert caplog.messages[0].endswith("green'")


WEIGHTED = {
    "a (red circle:1.3) moves": [("a ", 1.0), ("red circle", 1.3), (" moves", 1.0)],
    "(a) ((b)) (((c):2)d)": [("a", 1.1), (" ", 1), ("b", 1.1 * 1.1), (" ", 1), ("c", 2 * 1.1), ("d", 1.1)],
    "(a (b:0.5) c:2)": [("a ", 2), ("b", 0.5), (" c", 2)],
    r"a \(b:1.3\) (\(c\):1.3)": [("a (b:1.3) ", 1), ("(c)", 1.3)],
    "(a:b) (:2) (a:) (a:nan)": [("a:b", 1.1), (" ", 1), (":2", 1.1), (" ", 1), ("a:", 1.1), (" ", 1), ("a:nan", 1.1)],
    "(a:-1)(b: 0)()": [("a", -1), ("b", 0)],
    "a) (b:1.3)": [("a) (b:1.3)", 1)],
    "(a (b:1.3": [("(a (b:1.3", 1)],
    "": [],
}
"""Prompts and their parts, worked out by hand."""


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_brackets_weigh_the_words_between_them(prompt):
    found = prompt_weights.parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in WEIGHTED[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in WEIGHTED[prompt]])


def test_brackets_nest_deeper_than_python_s_calls():
    assert prompt_weights.parse("(" * 3000 + "a" + ")" * 3000)[0][0] == "a"


@torch.inference_mode()
def test_a_weight_moves_the_states_of_its_words_away_from_those_of_the_empty_prompt(encoder, checkpoints):
    pipeline = CogVideoXPipeline.from_pretrained(checkpoints["5b"])

    def states(prompt):
        return pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)[0][0]

    plain, empty = states("a red circle moves"), states("")
    ids = pipeline.tokenizer("a red circle moves").input_ids
    first = len(pipeline.tokenizer("a").input_ids) - 1
    last = first + len(pipeline.tokenizer("red circle").input_ids) - 1
    expected = plain.clone()
    expected[first:last] = empty[first:last] + 1.3 * (plain[first:last] - empty[first:last])
    assert encoder.tokenize("a (red circle:1.3) moves")[: len(ids)] == ids
    found = encoder.encode_prompt("a (red circle:1.3) moves")[0]
    assert (found - expected).abs().max() <= TOLERANCE < (found - plain).abs().max()
    assert torch.equal(found[last:], encoder.encode_prompt("a red circle moves")[0][last:])
    assert (encoder.encode_prompt(r"\(a\)") - states("(a)")).abs().max() <= TOLERANCE


def test_half_a_character_is_read_as_a_question_mark(encoder):
    assert encoder.tokenize("a \ud83d circle") == encoder.tokenize("a ? circle")


def test_syntax_that_has_no_effect_is_named(encoder):
    said = []
    encoder.say = said.append
    assert encoder.tokenize("red embedding:easynegative, (embedding:bad:1.2) circle") == encoder.tokenize("red , circle")
    encoder.tokenize("[red:0.5] BREAK <lora:x>")
    assert said == [
        "embedding:easynegative is not used: CogVideoX's text encoder takes no embeddings",
        "embedding:bad is not used: CogVideoX's text encoder takes no embeddings",
        "[red:0.5], BREAK, <lora:x> in the prompt has no special effect: it is read as plain words",
    ]


def test_a_text_encoder_that_is_replaced_on_disk_is_read_again(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["5b"], tmp_path / "5b")
    encoder = TextEncoder(Checkpoint.open(folder), device=CPU, dtype=torch.float32)
    before, path = encoder.encode_prompt("a red circle"), folder / "text_encoder" / "model.safetensors"
    held = encoder._encoder
    assert torch.equal(encoder.encode_prompt("a red circle"), before) and encoder._encoder is held
    other = {name: weight * 2 for name, weight in load_file(path).items()}
    save_file(other, tmp_path / "other.safetensors", {"format": "pt"})
    (tmp_path / "other.safetensors").replace(path)
    assert (encoder.encode_prompt("a red circle") - before).abs().max() > 0.1


def test_an_encoder_that_is_let_go_leaves_no_weights_for_a_garbage_collection(checkpoints):
    encoder = TextEncoder(Checkpoint.open(checkpoints["5b"]), device=torch.device("cpu"), dtype=torch.float32)
    gc.disable()
    try:
        encoder.encode_prompt("a red circle")
        encoder.unload()
        kept = ref(encoder._encoder)
        del encoder
        assert kept() is None
    finally:
        gc.enable()


def test_a_missing_package_is_named_with_the_command_that_brings_it(encoder, monkeypatch):
    monkeypatch.setattr(checkpoint, "has_module", lambda name: name != "google.protobuf")
    with pytest.raises(RequestError, match="needs protobuf: pip install protobuf"):
        encoder.tokenize("x")


@pytest.fixture
def roomy(checkpoints, monkeypatch):
    """A checkpoint with a large encoder, and what each device and the CPU can give, in GiB."""
    found = Checkpoint.open(checkpoints["5b"])
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda self, part, dtype: T5 * dtype.itemsize // 2)
    monkeypatch.setattr(Checkpoint, "native_dtype", "bf16")

    def place(*free: float, ram: float = 100, transformer: float | None = 12, dtype: str = "auto"):
        monkeypatch.setattr(offload, "free_bytes", lambda device: free[device.index] * 2**30)
        monkeypatch.setattr(text_module, "usable_memory", lambda: ram * 2**30)
        devices = [torch.device("cuda", index) for index in range(len(free))] or [CPU] * 2
        return find_place(found, devices, dtype, transformer_bytes=transformer and int(transformer * 2**30))

    return place


def test_text_is_encoded_on_the_gpu_with_most_room_and_beside_the_transformer_where_both_fit(roomy):
    place = roomy(14, 24)
    assert (place.device, place.dtype, place.alongside, place.note) == (SECOND, torch.bfloat16, True, None)
    assert not roomy(14, 23).alongside  # 9 + 0.25 + 12 of 0.9 x 23
    assert not roomy(14, 24, transformer=None).alongside
    assert roomy(10.3).device == FIRST


def test_text_that_no_gpu_has_room_for_is_encoded_on_the_cpu_and_one_line_says_so(roomy):
    place = roomy(8, 10)
    assert (place.device, place.dtype, place.alongside) == (CPU, torch.float32, True)
    assert place.note == "the text is encoded on the CPU: it needs 9.2 GiB and cuda:1 has 9.0 GiB available"
    assert roomy(8, ram=15).dtype == torch.bfloat16  # float32 takes 18
    assert roomy(8, dtype="fp16").dtype == torch.float16


def test_where_there_is_no_gpu_the_transformer_is_read_meanwhile_if_memory_holds_one_on_each_rank(roomy):
    assert (roomy().device, roomy().note) == (CPU, None)
    assert roomy().alongside and not roomy(ram=45).alongside  # 18 + 0.25 + 2 x 12 of 0.9 x 45


def test_a_gpu_that_runs_out_of_memory_leaves_the_text_to_the_cpu(encoder, monkeypatch, caplog):
    ids = [encoder.tokenize("a red circle")]
    expected, encode = encoder.encode(ids), encoder._encode

    def short(*tokens):
        if encoder.device == FIRST:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(*tokens)

    monkeypatch.setattr(encoder, "_encode", short)
    encoder.device = FIRST
    assert torch.equal(encoder.encode(ids), expected)
    assert caplog.messages == ["the text is encoded on the CPU: cuda:0 ran out of memory"]


def test_another_dtype_reads_the_encoder_again(encoder):
    ids = [encoder.tokenize("a red circle")]
    expected = encoder.encode(ids)
    encoder.move(text_module.EncoderPlace(CPU, torch.bfloat16, alongside=False))
    found = encoder.encode(ids)
    assert found.dtype == torch.bfloat16 and 0 < (found.float() - expected).abs().max() < 0.1


def test_the_transformer_is_there_once_the_text_is(make_job, texts, encoder):
    job, executor = make_job("5b"), LocalExecutor(CPU)
    states, loaded = encode_prompts([PROMPT, NEGATIVE, PROMPT, "(red:1.3)"], job, Checkpoint.open(job.model.path), executor)
    assert list(states) == [PROMPT, NEGATIVE, "(red:1.3)"] and torch.equal(states[PROMPT], texts["5b"][0])
    assert torch.equal(states["(red:1.3)"], encoder.encode_prompt("(red:1.3)"))
    assert loaded.load_seconds > 0 and executor.status()["held"] == ["transformer"]
    assert executor.sample(job).report.load_seconds < loaded.load_seconds and executor.engine.cache.loads == 1


def test_a_transformer_that_cannot_be_read_meanwhile_is_left_to_the_job(make_job, monkeypatch, caplog):
    job, executor = make_job("5b"), LocalExecutor(CPU)

    def fail(job, **_):
        raise GroupError("rank 1 failed\nsomewhere")

    monkeypatch.setattr(executor, "load", fail)
    with caplog.at_level(logging.INFO):
        states, loaded = encode_prompts([PROMPT], job, Checkpoint.open(job.model.path), executor)
    assert list(states) == [PROMPT] and loaded.load_seconds == 0
    assert "the transformer was not loaded while the text was encoded: rank 1 failed (details in the log)" in caplog.messages
