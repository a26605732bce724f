"""AnimateDiff: Stable Diffusion's image UNet with motion modules between its layers."""

from __future__ import annotations

from typing import ClassVar, Literal, Optional

import torch
from torch import Tensor, nn

from muybridge.backbones.geometry import Geometry
from muybridge.backbones.stable_diffusion import ClipText
from muybridge.diffusion.conditioning import Conditioning


class AnimateDiff(ClipText):
    """AnimateDiff on Stable Diffusion 1.5.

    The UNet may lie in the checkpoint with its motion modules inside, as ``save_pretrained`` writes it, or as an image UNet
    beside a motion adapter.
    """

    family = "AnimateDiff"
    pipelines = ("AnimateDiffPipeline",)
    network_names = ("unet",)
    block_lists = ("down_blocks", "mid_block", "up_blocks")
    # Both attentions of a motion module are temporal: there is no text in it.
    temporal_attention = r".*\.motion_modules\.\d+\.transformer_blocks\.\d+\.attn[12]"
    cross_attention: ClassVar[Optional[str]] = r".*\.attentions\.\d+\.transformer_blocks\.\d+\.attn2"
    attention_kind: ClassVar[Literal["factorised", "unified"]] = "factorised"

    @property
    def _joined(self) -> bool:
        """Whether the UNet has its motion modules inside."""
        return self.checkpoint.class_of("unet") == "UNetMotionModel"

    def _make_geometry(self) -> Geometry:
        holder = self.checkpoint.config("unet" if self._joined else "motion_adapter")
        return Geometry(
            channels=int(self.checkpoint.config("unet").get("in_channels", 4)),
            spatial=self._vae_factor,
            patch=(1, 1, 1),
            max_frames=int(holder.get("motion_max_seq_length", 32)),
        )

    def _load_network(self, name: str) -> nn.Module:
        if self._joined:
            return super()._load_network(name)
        from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

        path = self.checkpoint.fetch("unet", "motion_adapter")
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=self.dtype)
        adapter = MotionAdapter.from_pretrained(path, subfolder="motion_adapter", dtype=self.dtype)
        return UNetMotionModel.from_unet2d(unet, adapter)

    def skeleton(self, name: Optional[str] = None) -> nn.Module:
        """The network without weights (on the meta device)."""
        if self._joined:
            return super().skeleton(name)
        from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.checkpoint.config("unet"))
            adapter = MotionAdapter.from_config(self.checkpoint.config("motion_adapter"))
            return UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)

    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        # This UNet, unlike the 3D one, wants the text once per frame.
        text = conditioning.text.repeat_interleave(latents.shape[2], dim=0)
        return self.network(latents, t, encoder_hidden_states=text, return_dict=False)[0]
