"""Train the video autoencoder of a pipeline on clips, frame by frame."""

from __future__ import annotations

from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lightning_modules.optimization import LearningRate
from muybridge.backbones.checkpoint import Checkpoint
from muybridge.batch import Batch
from muybridge.diffusion.draws import keyed_generator
from muybridge.errors import UsageError
from muybridge.export import replace_parts
from muybridge.proving_ground.stills import as_stills


class Autoencoder(pl.LightningModule):
    r"""Train the ``AutoencoderKLWan`` of a small pipeline, for the proving ground or a world of your own.

    With pixels ``x`` in [-1, 1], the posterior ``N(m, s²)`` of the encoder and the reconstruction ``r`` of a draw from it,

    .. math:: L = \overline{w |r - x|} + c\, \overline{w (r - x)^2}
              + k\, \overline{\tfrac12 (m^2 + s^2 - 1 - \log s^2)},

    where ``w`` is ``1 + emphasis`` times how coloured a pixel is (its greatest channel less its least), over the mean of that:
    what moves is small and coloured, and the grey behind it would otherwise be all that counts. Training sees single frames,
    which is the video VAE's own computation for clips of one frame; validation measures whole clips through the real chunked
    encoder and decoder.

    Args:
        path: The pipeline; what is exported has its other parts.
        stills: Frames of each clip that a step trains on.
        optimizer: The optimizer.
        learning_rate: Warm-up and decay of the learning rate.
        emphasis: Weight of fully coloured pixels beyond that of grey ones.
        squared: ``c``.
        kl: ``k``.
        seed: Which frames are drawn, and the posterior's noise, are functions of this seed, the update and the clip's id.
    """

    def __init__(
        self,
        path: str,
        stills: int = 4,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0),
        learning_rate: LearningRate = LearningRate("cosine", 100),  # noqa: B008
        emphasis: float = 4.0,
        squared: float = 2.0,
        kl: float = 2e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.checkpoint = Checkpoint(path)
        kind = self.checkpoint.class_of("vae") if self.checkpoint.has("vae") else "no VAE"
        if kind != "AutoencoderKLWan":
            raise UsageError(f"{path} holds {kind}", "an AutoencoderKLWan", "muybridge proving-ground --model DIR")
        if stills < 1:
            raise UsageError(f"stills is {stills}", "frames of each clip, 1 or more")
        if min(emphasis, squared, kl) < 0.0:
            raise UsageError(f"emphasis {emphasis}, squared {squared}, kl {kl}", "numbers that are 0 or more")
        self.stills, self.emphasis, self.squared, self.kl, self.seed = stills, emphasis, squared, kl, seed
        self._optimizer, self._learning_rate = optimizer, learning_rate
        self.updates = 0
        self.vae: Optional[Any] = None
        channels = int(self.checkpoint.config("vae")["z_dim"])
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))
        self._sums: list[Tensor] = []

    latents_mean: Tensor
    latents_std: Tensor

    def configure_model(self) -> None:
        """Load the VAE, once."""
        if self.vae is None:
            from diffusers import AutoencoderKLWan

            source = self.checkpoint.fetch("vae")
            self.vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae").train().requires_grad_(True)

    def configure_optimizers(self) -> Any:
        """One optimizer, one schedule, stepped per update."""
        optimizer = self._optimizer(self.parameters())
        schedule = self._learning_rate.schedule(optimizer, float(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) as they come back from the real encoder and decoder."""
        vae: Any = self.vae
        return vae.decode(vae.encode(pixels).latent_dist.mode(), return_dict=False)[0].clamp(-1.0, 1.0)

    def _parts(self, vae: Any, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior of single frames (N, 3, 1, H, W)."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        patch = vae.config.patch_size
        x = patchify(frames, patch) if patch is not None else frames
        mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-12.0, 4.0)

    def _reconstruct(self, vae: Any, latents: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        x = vae.decoder(vae.post_quant_conv(latents))
        return unpatchify(x, vae.config.patch_size) if vae.config.patch_size is not None else x

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step on some frames of every clip."""
        x, generators, there = self._draw(batch)
        with as_stills(self.vae):  # type: ignore[arg-type]
            mean, logvar = self._parts(self.vae, x)
            eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).to(mean)
            rebuilt = self._reconstruct(self.vae, mean + (0.5 * logvar).exp() * eps)
        emphasis = 1.0 + self.emphasis * (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
        weight = there.view(-1, 1, 1, 1, 1) * emphasis / emphasis.mean()
        difference = rebuilt - x
        divergence = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar)
        kl = (divergence * there.view(-1, 1, 1, 1, 1)).mean()
        loss = (weight * difference.abs()).mean() + self.squared * (weight * difference**2).mean() + self.kl * kl
        error = (difference.detach() ** 2).mean((1, 2, 3, 4))
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/psnr", psnr((error * there).sum() / there.sum().clamp(min=1.0)), prog_bar=True)
        self.log("train/kl", kl.detach())
        return loss

    def _draw(self, batch: Batch) -> tuple[Tensor, list[torch.Generator], Tensor]:
        """Frames (N, 3, 1, H, W), a generator for each one's noise, and whether it is there."""
        pixels = self._pixels(batch)
        frames, noise = [], []
        for clip, name in zip(pixels, batch.ids, strict=True):
            generator = keyed_generator(self.seed, "stills", str(self.updates), name)
            chosen = torch.randperm(clip.shape[1], generator=generator)[: self.stills]
            frames.append(clip[:, chosen].transpose(0, 1).unsqueeze(2))
            noise += [keyed_generator(self.seed, "posterior", str(self.updates), name, str(int(i))) for i in chosen]
        there = torch.ones(len(batch), device=pixels.device) if batch.present is None else batch.present.to(pixels)
        return torch.cat(frames), noise, there.repeat_interleave(len(frames[0]))

    def _pixels(self, batch: Batch) -> Tensor:
        if batch.pixels is None:
            raise UsageError("a batch without pixels", "clips", "train an autoencoder on videos, not on cached latents")
        return batch.pixels

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Counts updates, which the draws are keyed by."""
        super().optimizer_step(*args, **kwargs)
        self.updates += 1

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement."""
        self._sums.clear()

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Whole clips, through the real encoder and decoder."""
        vae: Any = self.vae
        pixels = self._pixels(batch)
        there = torch.ones(len(batch), device=pixels.device) if batch.present is None else batch.present.to(pixels)
        latents = vae.encode(pixels).latent_dist.mode()
        rebuilt = vae.decode(latents, return_dict=False)[0].clamp(-1.0, 1.0)
        error = ((rebuilt - pixels) ** 2).mean((1, 2, 3, 4))
        first, second = latents.mean((2, 3, 4)), (latents**2).mean((2, 3, 4))
        rows = torch.cat([first, second, error[:, None], torch.ones_like(error[:, None])], 1) * there[:, None]
        self._sums.append(rows.double().sum(0))

    def on_validation_epoch_end(self) -> None:
        """Log how well clips come back, and keep the mean and spread of their latents for the pipeline."""
        sums = self.trainer.strategy.reduce(torch.stack(self._sums).sum(0), reduce_op="sum")
        means = (sums[:-1] / sums[-1]).float()
        channels = len(self.latents_mean)
        mean, second = means[:channels], means[channels : 2 * channels]
        self.latents_mean = mean
        self.latents_std = (second - mean**2).clamp(min=1e-8).sqrt()
        self.log("val/psnr", psnr(means[-1]), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters."""
        checkpoint["muybridge"] = {"job": type(self).__name__, "updates": self.updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counters; refuses another job's file."""
        made = checkpoint.get("muybridge", {})
        if made.get("job") != type(self).__name__:
            raise UsageError(
                f"this checkpoint is of the job {made.get('job')}", f"one of {type(self).__name__}", "check ckpt_path"
            )
        self.updates = made["updates"]

    def export(self, out: str) -> list[str]:
        """The pipeline with the trained autoencoder, and with the latents' measured mean and spread in its config."""
        vae: Any = self.vae
        vae.register_to_config(
            latents_mean=[round(v, 5) for v in self.latents_mean.tolist()],
            latents_std=[round(v, 5) for v in self.latents_std.tolist()],
        )
        return [str(replace_parts(self.checkpoint, {"vae": vae}, out))]


def psnr(error: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of a mean squared error where the signal goes from -1 to 1."""
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-10))
