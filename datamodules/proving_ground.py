"""Clips of the proving ground, written where they are not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from lightning.pytorch.utilities import rank_zero_only

from datamodules.video import VideoData
from muybridge.errors import UsageError
from muybridge.proving_ground.files import held, write_clips
from muybridge.proving_ground.scene import World


class ProvingGroundData(VideoData):
    """Clips of ten known motions, read from files as any others are. Validation has shapes in colours that training has not.

    Args:
        folder: Where the clips are; those that are not there are written.
        clips: How many there are in all.
        validation_share: How many of them are for validation.
        size: Height and width in pixels.
        frames: Frames of a clip.
        anti_leak: No single frame tells the motion.
        camera: Share of clips whose camera moves.
        distractors: Grey things that drift behind the sprite, in every clip.
        static: Share of clips in which nothing moves.
        backwards: Share of clips that are shown last frame first.
        motions: Which of the ten there are; none given is all, likewise with the next four.
        shapes: Of the sprite.
        colours: Of the sprite.
        textures: Of the sprite.
        backgrounds: Behind it.
        scale: Size of sprites against the usual, 0.5 to 1.3.
        pace: Speed of what bounces, spins, swings, floats or bursts, against the usual, 0.6 to 1.5.
        world_seed: Of what is drawn.
        cache: What ``muybridge cache`` made of these clips.
        selection: Train on these clips only: a .txt file with one id a line, or .csv or .parquet with a column ``id``.
        repeats: How often the clips stand in one epoch.
        motion_weights: Read motion weights from the cache too.
        batch_size: Clips of a micro-batch, on every rank.
        num_workers: Processes that decode, on every rank.
        seed: The order of an epoch is a function of this seed and the epoch.
        shuffle: Draw a new order every epoch.
        drop_last: Leave out an epoch's last clips where they do not fill a batch on every rank, rather than fill it up.
    """

    def __init__(
        self,
        folder: str = "runs/proving-ground",
        clips: int = 2000,
        validation_share: float = 0.1,
        size: int = 64,
        frames: int = 17,
        anti_leak: bool = True,
        camera: float = 0.0,
        distractors: int = 0,
        static: float = 0.0,
        backwards: float = 0.0,
        motions: Optional[list[str]] = None,
        shapes: Optional[list[str]] = None,
        colours: Optional[list[str]] = None,
        textures: Optional[list[str]] = None,
        backgrounds: Optional[list[str]] = None,
        scale: float = 1.0,
        pace: float = 1.0,
        world_seed: int = 0,
        cache: Optional[str] = None,
        selection: Optional[str] = None,
        repeats: int = 1,
        motion_weights: bool = False,
        batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if clips < 2 or not 0.0 < validation_share < 1.0:
            raise UsageError(f"{clips} clips, {validation_share} of them for validation", "2 or more, a share below 1")
        root = Path(folder)
        super().__init__(
            str(root / "train.parquet"),
            str(root / "validation.parquet"),
            frames=frames,
            height=size,
            width=size,
            cache=cache,
            selection=selection,
            repeats=repeats,
            motion_weights=motion_weights,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
        )
        self.folder, self.clips, self.world_seed, self.validation_share = root, clips, world_seed, validation_share
        self.world = World.of(
            size=size,
            frames=frames,
            anti_leak=anti_leak,
            camera=camera,
            distractors=distractors,
            static=static,
            backwards=backwards,
            motions=motions,
            shapes=shapes,
            colours=colours,
            textures=textures,
            backgrounds=backgrounds,
            scale=scale,
            pace=pace,
        )

    def prepare_data(self) -> None:
        """Write what is not there yet; one process of a machine does."""
        self._write()

    def setup(self, stage: str) -> None:
        if self.trainer is None:
            self._write()
        elif held(self.folder) != self.clips:
            raise UsageError(
                f"{self.folder} holds {held(self.folder)} clips, and {self.clips} are asked for",
                "a folder that every machine of a run can read",
                f"muybridge proving-ground --clips {self.clips} --out {self.folder}",
            )
        super().setup(stage)

    @rank_zero_only
    def _write(self) -> None:
        # Also where all are there: the settings of the folder are held against those of this run.
        write_clips(self.folder, self.world, self.clips, self.world_seed, self.validation_share)
