"""Losses: one file an idea. ``docs/plug-in-a-loss.md`` shows how to add one, here or in a file of your own."""

from muybridge.losses.base import Loss, per_sample
from muybridge.losses.denoising import Denoising

__all__ = ["Denoising", "Loss", "per_sample"]
