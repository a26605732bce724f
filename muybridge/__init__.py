"""muybridge: motion in video diffusion models. Distil it, customize it, attribute it."""

__version__ = "0.1.0"
