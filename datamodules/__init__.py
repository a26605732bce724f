"""Where batches come from."""

from datamodules.prompts import PromptData
from datamodules.video import VideoData

__all__ = ["PromptData", "VideoData"]
