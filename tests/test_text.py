"""Prompts become the text states of diffusers' pipeline, padded or cut to the model's limit."""

import logging

import pytest
import torch
from diffusers import CogVideoXPipeline

from parallel_backend.cogvideox import checkpoint
from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.cogvideox.text import TextEncoder
from parallel_backend.errors import RequestError

from .conftest import TOLERANCE


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
    assert caplog.messages[0].endswith("green'")


def test_a_missing_package_is_named_with_the_command_that_brings_it(encoder, monkeypatch):
    monkeypatch.setattr(checkpoint, "has_module", lambda name: name != "google.protobuf")
    with pytest.raises(RequestError, match="needs protobuf: pip install protobuf"):
        encoder.tokenize("x")
