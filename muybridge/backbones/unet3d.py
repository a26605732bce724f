"""ModelScope, Zeroscope: ε-prediction by a 3D UNet with temporal attention and temporal convolutions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muybridge.backbones.gates import same_switches
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.stable_diffusion import ClipText
from muybridge.diffusion.conditioning import Conditioning

RECOMPUTED = ("Transformer2DModel", "TransformerTemporalModel", "ResnetBlock2D", "TemporalConvLayer")
"""The UNet's sub-blocks, whose activations gradient checkpointing forgets."""


def _recomputing(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward is checkpointed while gradients are recorded.

    The class of an existing module is exchanged for it, so names in the state dict stay the same, and copies of the
    module run themselves rather than the original.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(cls.forward, self, *args, use_reentrant=False, context_fn=same_switches(self), **kwargs)
        return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "recomputes": True})


class UNet3D(ClipText):
    """ModelScope's and Zeroscope's 3D UNet."""

    family = "UNet3D"
    pipelines = ("TextToVideoSDPipeline",)
    network_names = ("unet",)
    block_lists = ("down_blocks", "mid_block", "up_blocks")
    # Both attentions of a temporal transformer are temporal: there is no text in it.
    temporal_attention = r"(?:transformer_in|.*\.temp_attentions\.\d+)\.transformer_blocks\.\d+\.attn[12]"
    cross_attention: ClassVar[Optional[str]] = r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn2"
    attention_kind: ClassVar[Literal["factorised", "unified"]] = "factorised"

    def _make_geometry(self) -> Geometry:
        return Geometry(
            channels=int(self.checkpoint.config("unet").get("in_channels", 4)),
            spatial=self._vae_factor,
            patch=(1, 1, 1),
        )

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(latents, t, encoder_hidden_states=conditioning.text, return_dict=False)[0]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the sub-blocks' activations in the backward pass; diffusers refuses to for this network."""
        for module in self.networks.modules():
            if type(module).__name__ in RECOMPUTED and not hasattr(module, "recomputes"):
                module.__class__ = _recomputing(type(module))
