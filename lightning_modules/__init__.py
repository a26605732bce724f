"""What is trained: one LightningModule a job."""

from lightning_modules.base import DiffusionModule, Sampling
from lightning_modules.finetuning import Finetuning
from lightning_modules.optimization import LearningRate
from lightning_modules.parallel import FullyShard

__all__ = ["DiffusionModule", "Finetuning", "FullyShard", "LearningRate", "Sampling"]
