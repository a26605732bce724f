"""The proving ground's own Wan pipeline before any training: real classes, small enough for a laptop."""

from __future__ import annotations

from typing import Any

from muybridge.proving_ground.captions import WORDS

LENGTH = 16
"""Tokens of a caption; the tokenizer says so, and the backbone asks it."""
CHANNELS = 8
"""Of the latents, at a quarter of the height and width and at every frame."""


def vocabulary() -> list[str]:
    """Every word that a caption can hold, after the special ones."""
    from muybridge.proving_ground.appearance import COLOURS, SHAPES

    turns = ["to", "the", "right", "left", "clockwise", "counterclockwise", "sideways", "vertically", "backwards"]
    words = {word for phrase in WORDS.values() for word in phrase.split()}
    return ["<pad>", "</s>", "<unk>", *sorted({"a", "an", "|", ",", *COLOURS, *SHAPES, *turns, *words})]


def tokenizer() -> Any:
    """One token a word; the vocabulary is a file of the pipeline, so nothing is downloaded."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )


def text_encoder(words: int) -> Any:
    """A T5 encoder of one layer. It stays as it is drawn: random embeddings tell words apart, and the network learns the rest."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=words,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
    )


def autoencoder() -> Any:
    """Space to depth by four, then convolutions; no compression of time, so that five CPU minutes train it on stills."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=48,
        decoder_base_dim=48,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_spatial=4,
        scale_factor_temporal=1,
    )


def transformer() -> Any:
    """The denoiser: every token sees four by four pixels of one frame, by two by two of them."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def untrained(seed: int = 0) -> Any:
    """The whole pipeline with random weights, a function of the seed."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from muybridge.proving_ground.stills import forget_past

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer()
        encoder, vae, network = text_encoder(len(words)).eval(), autoencoder().eval(), transformer().eval()
    forget_past(vae)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return WanPipeline(tokenizer=words, text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=network)
