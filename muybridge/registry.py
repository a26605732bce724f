"""Names of what ships, readable without importing torch: the command lists them at once.

A test holds this table against the classes themselves, so nothing can be added without being listed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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
    "MotionFeatureMatching": "muybridge.losses.motion_feature_matching",
    "FrameResidual": "muybridge.losses.frame_residual",
    "AppearanceDebiased": "muybridge.losses.appearance_debiased",
    "TemporalHighPass": "muybridge.losses.temporal_high_pass",
    "SpaceTimeFeatures": "muybridge.losses.space_time_features",
    "MotionFeatures": "muybridge.losses.motion_features",
    "AttentionMotionFlow": "muybridge.losses.attention_motion_flow",
    "DistributionMatching": "muybridge.losses.distribution_matching",
    "MotionScoreMatching": "muybridge.losses.motion_score_matching",
    "MotionWeightedDenoising": "muybridge.losses.motion_weighted",
    "Regression": "muybridge.losses.regression",
    "TrajectoryRegression": "muybridge.losses.trajectory_regression",
    "Adversarial": "muybridge.losses.adversarial",
}
"""Class name of every loss and the module it lives in."""

MODULES: dict[str, str] = {
    "Finetuning": "lightning_modules.finetuning",
    "MotionCustomization": "lightning_modules.customization",
    "TrajectoryDistillation": "lightning_modules.trajectory",
    "MotionScore": "lightning_modules.motion_score",
    "Distillation": "lightning_modules.distillation",
    "Autoencoder": "lightning_modules.autoencoder",
}

DATAMODULES: dict[str, str] = {
    "VideoData": "datamodules.video",
    "PromptData": "datamodules.prompts",
    "LatentData": "datamodules.latents",
    "TrajectoryData": "datamodules.trajectories",
    "ProvingGroundData": "datamodules.proving_ground",
}

CALLBACKS: dict[str, str] = {
    "EMA": "callbacks.ema",
    "Samples": "callbacks.samples",
    "Preemption": "callbacks.preemption",
    "Interruption": "callbacks.interruption",
    "ProgressLine": "callbacks.progress_line",
    "MotionMonitor": "callbacks.motion_monitor",
    "GradientCapture": "callbacks.gradient_capture",
    "ClipLosses": "callbacks.clip_losses",
}

ESTIMATORS: dict[str, str] = {
    "DIS": "muybridge.motion.estimators",
    "RAFT": "muybridge.motion.networks",
    "CoTracker": "muybridge.motion.networks",
    "AllTracker": "muybridge.motion.networks",
}
"""Class name of every motion estimator and the module it lives in."""

PROJECTIONS: dict[str, str] = {
    "FastfoodProjection": "muybridge.attribution.projection",
    "SRHTProjection": "muybridge.attribution.projection",
    "CountSketchProjection": "muybridge.attribution.projection",
    "DenseProjection": "muybridge.attribution.projection",
    "NoProjection": "muybridge.attribution.projection",
}
"""Class name of every projection of gradients and the module it lives in."""

CLASSES = (BACKBONES, LOSSES, MODULES, DATAMODULES, CALLBACKS, ESTIMATORS, PROJECTIONS)
"""All of what ``class_path`` names in short."""


class Model(NamedTuple):
    """A trained pipeline that ships.

    Args:
        folder: Inside the package ``muybridge``.
        help: One line on what it is.
    """

    folder: str
    help: str


MODELS: dict[str, Model] = {
    "proving-ground": Model(
        "proving_ground/teacher",
        "a tiny Wan pipeline that was trained on the proving ground's clips: 32 pixels, 9 frames",
    ),
}
"""Names that a backbone's path may be, where no directory is called so."""


class Verb(NamedTuple):
    """What the command can do.

    Args:
        help: One line for ``muybridge --help``.
        kind: ``loop`` is a loop of Lightning's Trainer. ``job`` acts on a model that a config describes: the function in
            ``muybridge/cli/verbs/<name>.py`` becomes a method of the Trainer and takes ``-c`` like the loops. ``tool`` needs
            no model: the function's parameters are all its options.
    """

    help: str
    kind: Literal["loop", "job", "tool"]


VERBS: dict[str, Verb] = {
    "fit": Verb("train what a config describes", "loop"),
    "validate": Verb("measure the validation loss of a checkpoint", "loop"),
    "test": Verb("measure the loss on the test clips", "loop"),
    "predict": Verb("make videos", "loop"),
    "sample": Verb("make a video of every prompt of a file, a distilled student's in its few steps", "job"),
    "export": Verb("turn a checkpoint into a diffusers pipeline, or into adapter files", "job"),
    "cache": Verb("encode latents and text embeddings once, for training without VAE and text encoder", "job"),
    "attribute": Verb("project the gradients of training clips and of query clips into a store", "job"),
    "trajectories": Verb("write a teacher's paths from noise to clean, for a student to learn from", "job"),
    "attribution-check": Verb(
        "compare rankings by projected with those by full gradients, and by one time with many", "job"
    ),
    "select": Verb(
        "select the clips that a store says are most helpful to some queries, with a page to look at", "tool"
    ),
    "consolidate": Verb("turn a sharded checkpoint folder into one file", "tool"),
    "invert": Verb("write the noise that a model would make each clip of", "tool"),
    "probe": Verb("find the time above which a model settles motion and below which it settles appearance", "tool"),
    "motion-layers": Verb("rank attention layers by how well their maps find clips of the same motion", "tool"),
    "customize": Verb("teach a model the motion of one clip, and show it on new subjects", "tool"),
    "demo": Verb("from nothing to a report: sample, distil and judge the proving ground's model, in minutes", "tool"),
    "bench-motion": Verb("the demo's comparisons at full strength, with several seeds, as a table", "tool"),
    "bench-customize": Verb(
        "ways to teach a motion from one clip, held against one another on the proving ground, as a table", "tool"
    ),
    "bench-attribution": Verb(
        "what attribution finds, foretells and gives, on clips whose motion is known, as tables", "tool"
    ),
    "judge": Verb("read clips of the proving ground and score them against their captions", "tool"),
    "tiny": Verb("write a tiny checkpoint with random weights, or toy clips, to try things on", "tool"),
    "proving-ground": Verb("write clips of ten motions whose law, flow and tracks are known", "tool"),
    "proving-ground-reader": Verb("train the reader that says which motion, shape and colour a clip shows", "tool"),
    "list": Verb(
        "list what ships: verbs, backbones, losses, modules, datamodules, callbacks, models, tiny, configs", "tool"
    ),
}
"""Name of every verb; those of Lightning are methods of its Trainer, the others live in ``muybridge/cli/verbs``."""
