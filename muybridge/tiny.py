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
    sizes = dict(vocab_size=384, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1)
    return cls(config(**sizes)).eval()


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
    second = dict(transformer_2=transformer(1), boundary_ratio=0.875) if experts == 2 else dict(transformer_2=None)
    return WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5_encoder(umt5=True),
        vae=vae,
        scheduler=scheduler,
        transformer=transformer(0),
        **second,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "wan": _wan,
    "wan22": lambda: _wan(experts=2),
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
