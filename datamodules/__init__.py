"""Where batches come from."""

from datamodules.latents import LatentData
from datamodules.prompts import PromptData
from datamodules.proving_ground import ProvingGroundData
from datamodules.trajectories import TrajectoryData
from datamodules.video import VideoData

__all__ = ["LatentData", "PromptData", "ProvingGroundData", "TrajectoryData", "VideoData"]
