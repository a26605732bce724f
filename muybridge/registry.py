"""Names of what ships, readable without importing torch: the command lists them at once.

A test holds this table against the classes themselves, so nothing can be added without being listed.
"""

from __future__ import annotations

BACKBONES: dict[str, str] = {
    "Wan": "muybridge.backbones.wan",
    "CogVideoX": "muybridge.backbones.cogvideox",
    "Latte": "muybridge.backbones.latte",
    "UNet3D": "muybridge.backbones.unet3d",
    "HunyuanVideo": "muybridge.backbones.hunyuan",
    "LTX": "muybridge.backbones.ltx",
    "Mochi": "muybridge.backbones.mochi",
    "AnimateDiff": "muybridge.backbones.animatediff",
}
"""Class name of every family and the module it lives in."""

LOSSES: dict[str, str] = {
    "Denoising": "muybridge.losses.denoising",
}
"""Class name of every loss and the module it lives in."""

MODULES: dict[str, str] = {
    "Finetuning": "lightning_modules.finetuning",
}

DATAMODULES: dict[str, str] = {
    "VideoData": "datamodules.video",
    "PromptData": "datamodules.prompts",
}

CALLBACKS: dict[str, str] = {
    "EMA": "callbacks.ema",
    "Samples": "callbacks.samples",
    "Preemption": "callbacks.preemption",
}
