"""The demo model's parts: diffusers' own classes, only small."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from parallel_backend.cogvideox.checkpoint.index import LENDER

from .scenes import FRAMES, HEIGHT, WIDTH, vocabulary

TEXT_TOKENS = 32
TEXT_FEATURES = 128
VARIANTS = ("t2v", "i2v")
LATENT = (16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
"""Channels, latent frames, height and width of one clip."""


def make_vae() -> AutoencoderKLCogVideoX:
    """A VAE with the real compression: 8x in space, 4x in time, 16 channels."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        latent_channels=LATENT[0],
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=HEIGHT,
        sample_width=WIDTH,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, whatever its case; a word it does not know is ``<unk>``. Ends with ``</s>``, as T5's does."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    punctuation = normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), punctuation])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def make_text_encoder(words: int) -> T5EncoderModel:
    """A T5 encoder; it is trained together with the transformer."""
    config = T5Config(
        vocab_size=words, d_model=TEXT_FEATURES, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def make_transformer(variant: str) -> CogVideoXTransformer3DModel:
    """The transformer, like 5b (rotary); ``i2v`` takes the image's latent beside the noise, as 5b-I2V does."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=LATENT[0] * (2 if variant == "i2v" else 1),
        out_channels=LATENT[0],
        time_embed_dim=64,
        text_embed_dim=TEXT_FEATURES,
        num_layers=7,
        sample_width=LATENT[3],
        sample_height=LATENT[2],
        sample_frames=FRAMES,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )


def make_scheduler() -> CogVideoXDPMScheduler:
    """The noise schedule of CogVideoX-5b: v-prediction, no signal at the last step."""
    return CogVideoXDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True, snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )  # fmt: skip


def widen_input(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A t2v transformer's weights for i2v: what reads the image's latent starts at zero."""
    name = "patch_embed.proj.weight"
    return {**state, name: torch.cat([state[name], torch.zeros_like(state[name])], dim=1)}


def write_model_index(folder: Path, variant: str, lender: str | None = None) -> None:
    """What ``DiffusionPipeline.from_pretrained`` reads first; ``lender`` names the folder beside it that has the rest."""
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if variant == "i2v" else "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    if lender:
        index[LENDER] = lender
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
