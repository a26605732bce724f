"""What the tiny pipelines share: tokenizers, text encoders, an image VAE."""

from __future__ import annotations

from typing import Any

import torch


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


def template_tokenizer(template: str, tokens: int) -> Any:
    """A byte tokenizer for which what ``template`` says before the prompt is exactly ``tokens`` tokens.

    HunyuanVideo's pipeline cuts that many from the front of what its language model made; with bytes alone, the
    template would be longer than everything it reads.

    Args:
        template: Text with ``{}`` where the prompt goes.
        tokens: Number of tokens of the part before it.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = template.split("{}")[0]
    # The first are bytes, one token each; all the rest is one token more.
    tokenizer.add_tokens([AddedToken(before[tokens - 1 :], normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def llama_encoder(vocabulary: int, seed: int = 0) -> Any:
    """A four-layer Llama: HunyuanVideo's pipeline takes the states two layers before the last."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=vocabulary - 1,
    )
    return LlamaModel(config).eval()


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
