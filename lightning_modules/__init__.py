"""What is trained: one LightningModule a job."""

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.base import DiffusionModule, Sampling
from lightning_modules.customization import MotionCustomization
from lightning_modules.distillation import Clips, Distillation
from lightning_modules.finetuning import Finetuning
from lightning_modules.motion_score import Mixing, MotionScore, Rating, Windows
from lightning_modules.optimization import LearningRate
from lightning_modules.parallel import FullyShard
from lightning_modules.trajectory import TrajectoryDistillation

__all__ = [
    "Autoencoder",
    "Clips",
    "DiffusionModule",
    "Distillation",
    "Finetuning",
    "FullyShard",
    "LearningRate",
    "Mixing",
    "MotionCustomization",
    "MotionScore",
    "Rating",
    "Sampling",
    "TrajectoryDistillation",
    "Windows",
]
