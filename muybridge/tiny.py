"""Tiny checkpoints of the real diffusers classes, with random weights: what tests and the first demo run on.

They are complete pipelines of a few hundred KiB, saved by ``save_pretrained`` and loaded by the same code as real ones.
No vocabulary or weight is downloaded: ByT5's tokenizer needs none, and CLIP's is built from the byte alphabet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from muybridge.errors import UsageError, did_you_mean


def byte_tokenizer(length: int = 64) -> Any:
    """A T5 tokenizer without a vocabulary file."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(model_max_length=length, extra_ids=0)


def t5_encoder(umt5: bool = False, seed: int = 0) -> Any:
    """A two-layer T5 encoder for the byte tokenizer."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    cls, config = (UMT5EncoderModel, UMT5Config) if umt5 else (T5EncoderModel, T5Config)
    sizes = config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    return cls(sizes).eval()


def clip_tokenizer(length: int = 32) -> Any:
    """A CLIP tokenizer whose vocabulary is the byte alphabet, without merges."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def clip_encoder(vocabulary: int, length: int = 32, seed: int = 0) -> Any:
    """A two-layer CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        projection_dim=32,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config).eval()


def image_vae(seed: int = 0) -> Any:
    """Stable Diffusion's VAE: 8 pixels a side per latent, 4 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


def wake(network: Any, seed: int = 0) -> Any:
    """Give what is initialised to zero (last layers of temporal branches, biases) small random values.

    Untrained, such a layer lets nothing through: no gradient reaches what lies behind it, and no test sees it.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return network.eval()


def _wan(experts: int = 1) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    two = experts == 2
    return WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(umt5=True),
        vae=vae,
        scheduler=scheduler,
        transformer=transformer(0),
        transformer_2=transformer(1) if two else None,
        boundary_ratio=0.875 if two else None,
    )


def _cogvideox(rotary: bool) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=rotary,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7 if rotary else 1.15258426,
    ).eval()
    # The published schedulers: 2b with DDIM and a shifted SNR, 5b with the multistep solver and none.
    scheduler = (CogVideoXDPMScheduler if rotary else CogVideoXDDIMScheduler)(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return CogVideoXPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae,
        transformer=wake(transformer),
        scheduler=scheduler,
    )


def _latte() -> Any:
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    return LattePipeline(
        tokenizer=byte_tokenizer(120),
        text_encoder=t5_encoder(),
        vae=image_vae(),
        transformer=wake(transformer),
        scheduler=scheduler,
    )


def _unet3d() -> Any:
    from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel

    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    tokenizer = clip_tokenizer()
    return TextToVideoSDPipeline(
        vae=image_vae(),
        text_encoder=clip_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=wake(unet),
        scheduler=scheduler,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "wan": _wan,
    "wan22": lambda: _wan(experts=2),
    "cogvideox": lambda: _cogvideox(rotary=False),
    "cogvideox_rope": lambda: _cogvideox(rotary=True),
    "latte": _latte,
    "unet3d": _unet3d,
}
"""Name of every tiny pipeline and the function that builds it."""


def write(name: str, out: str | Path) -> Path:
    """Build the tiny pipeline ``name`` and save it to ``out``; the same bytes every time."""
    if name not in MAKERS:
        raise UsageError(f"tiny model {name!r}", f"one of {', '.join(MAKERS)}", did_you_mean(name, MAKERS))
    with torch.random.fork_rng():
        pipeline = MAKERS[name]()
    pipeline.save_pretrained(str(out), safe_serialization=True)
    return Path(out)
