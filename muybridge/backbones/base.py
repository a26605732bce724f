"""One face for every family of video diffusion models."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Optional

import torch
from torch import Tensor, nn

from muybridge.backbones.causal import Causal, check_causal, is_causal, stream
from muybridge.backbones.checkpoint import Checkpoint
from muybridge.backbones.geometry import Geometry
from muybridge.backbones.noise import trained_steps
from muybridge.diffusion import samplers
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.predictions import guide
from muybridge.diffusion.schedules import NoiseSchedule
from muybridge.errors import UsageError, did_you_mean
from muybridge.progress import bars_on_terminals_alone

DType = Literal["float32", "bfloat16", "float16"]
Component = Literal["denoiser", "vae", "text_encoder"]
Projection = Literal["q", "k", "v", "o"]
ALL_COMPONENTS: tuple[Component, ...] = ("denoiser", "vae", "text_encoder")


class Backbone(nn.Module, ABC):
    """A diffusers model behind the toolkit's face: (B, C, F, H, W) latents, time 0..1000, one conditioning dataclass.

    Constructing one reads configuration files only. :meth:`materialize` loads the network; the VAE and the text encoder
    are loaded when something is first encoded or decoded, and are no submodules: never trained, saved or sharded. Of a hub
    id, weights are downloaded at the same moments, each component's own.

    Args:
        path: Directory of a diffusers pipeline (with ``model_index.json``), a hub id, or a model that ships (``proving-ground``).
        dtype: Dtype of the network's weights. Train all weights in float32 with Trainer precision ``bf16-mixed``;
            bfloat16 suits a frozen base under adapters.
        components: What this job may load: ``denoiser``, ``vae``, ``text_encoder``. Training on cached latents and text
            needs ``denoiser`` alone.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        vae_dtype: Dtype of the VAE.
        vae_tiling: Encode and decode in spatial tiles, for large frames on small cards.
        max_text_length: Tokens per prompt; the family's own default where not given.
        text_dtype: Dtype of the text encoder; ``dtype`` where not given. bfloat16 halves the memory of a large T5, and
            its embeddings are cast to the network's dtype anyway; a cache of text remembers which it was made with.
        causal: Let each block of frames see only itself and the blocks before it, and make clips block by block (Wan).
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    """Pipeline classes (``_class_name`` in model_index.json) that this family takes."""
    network_names: ClassVar[tuple[str, ...]] = ("transformer",)
    """Components that denoise, most important first."""
    block_lists: ClassVar[tuple[str, ...]]
    """Attributes of the network that hold its blocks: what is sharded and checkpointed one by one."""
    temporal_attention: ClassVar[str]
    """Full-match regex of the attention modules that carry motion: temporal, or unified over space and time."""
    cross_attention: ClassVar[Optional[str]] = None
    """Full-match regex of the attention modules from video to text, where they are modules of their own."""
    attention_kind: ClassVar[Literal["factorised", "unified"]] = "unified"
    """``factorised``: temporal attention sees one place over all frames. ``unified``: all places of all frames."""
    text_tokens: ClassVar[Optional[Literal["first", "last"]]] = None
    """Where text tokens sit in a joint attention sequence; ``None`` where video attends to itself alone."""
    projections: ClassVar[dict[Projection, str]] = {"q": "to_q", "k": "to_k", "v": "to_v", "o": r"to_out\.0"}
    """Names of the four projections inside an attention module, as regexes."""
    per_frame_times: ClassVar[bool] = False
    """Whether :meth:`denoise` takes times of shape (B, F)."""
    lays_own_levels: ClassVar[bool] = False
    """Whether the family's pipeline hands its scheduler noise levels of its own, rather than a number of steps."""
    default_text_length: ClassVar[int]

    def __init__(
        self,
        path: str,
        dtype: DType = "float32",
        components: Sequence[Component] = ALL_COMPONENTS,
        gradient_checkpointing: bool = False,
        vae_dtype: DType = "float32",
        vae_tiling: bool = False,
        max_text_length: Optional[int] = None,
        text_dtype: Optional[DType] = None,
        causal: Optional[Causal] = None,
    ) -> None:
        super().__init__()
        unknown = [c for c in components if c not in ALL_COMPONENTS]
        if unknown:
            raise UsageError(
                f"component {unknown[0]!r}",
                f"some of {', '.join(ALL_COMPONENTS)}",
                did_you_mean(unknown[0], ALL_COMPONENTS),
            )
        self.checkpoint = Checkpoint(path)
        if self.checkpoint.pipeline_class not in self.pipelines:
            raise UsageError(
                f"{path} is a {self.checkpoint.pipeline_class or 'pipeline without a class name'}",
                f"{' or '.join(self.pipelines)} for the backbone {self.family}",
                "use class_path: Pretrained, which picks the family from what it finds",
            )
        self.dtype = getattr(torch, dtype)
        self.vae_dtype = getattr(torch, vae_dtype)
        # Fixed here: sharding may change the dtype that the network computes in, and no cached text should notice.
        self.text_dtype: torch.dtype = getattr(torch, text_dtype or dtype)
        self.components = tuple(components)
        self.gradient_checkpointing = gradient_checkpointing
        self.vae_tiling = vae_tiling
        self.max_text_length = self._text_length(max_text_length)
        self.schedule: NoiseSchedule = self._make_schedule(self.checkpoint.config("scheduler"))
        self.geometry: Geometry = self._make_geometry()
        if causal is not None:
            known = type(self)._make_causal is not Backbone._make_causal
            check_causal(self.family, self.per_frame_times, known, self._present_networks())
        self.causal = causal
        self.networks = nn.ModuleDict()
        self.idle_device = torch.device("cpu")
        """Where the VAE and the text encoder work while no network is loaded."""
        # A plain dict: what it holds is neither trained nor moved nor saved with the module.
        self._parts: dict[str, Any] = {}
        self._empty_text: dict[str, Conditioning] = {}

    # -- what a family says of itself ------------------------------------------------------------------------------

    @abstractmethod
    def _make_schedule(self, config: dict[str, Any]) -> NoiseSchedule:
        """The noise schedule that a scheduler configuration stands for."""

    @abstractmethod
    def _make_geometry(self) -> Geometry:
        """Factors and patch sizes from the configuration files."""

    @abstractmethod
    def _forward(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The raw prediction, in our layout; times are snapped, shapes are checked."""

    @abstractmethod
    def _encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """Text to conditioning through the pipeline's own ``encode_prompt``."""

    def _check(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> None:
        """Refuse what the network would silently get wrong."""

    @property
    def trained_clip(self) -> Optional[tuple[int, int, int]]:
        """Frames, height and width that this checkpoint was trained for, where its configuration says so."""
        return None

    def set_frame_rate(self, fps: float) -> None:
        """Say how many frames a second the clips have that follow; of use to networks whose positions are seconds (LTX)."""

    def _make_causal(self, causal: Causal) -> None:
        """Make the loaded network causal, see :mod:`muybridge.backbones.causal`; only families with per-frame times can."""
        raise NotImplementedError(f"{self.family} does not say how it is made causal")

    def _text_length(self, wanted: Optional[int]) -> int:
        """Tokens per prompt; families that know only one number refuse others."""
        return wanted or self.default_text_length

    # -- loading ---------------------------------------------------------------------------------------------------

    def materialize(self) -> Backbone:
        """Load the network's weights, once. Idempotent."""
        if self.networks or "denoiser" not in self.components:
            return self
        for name in self._present_networks():
            network = self._load_network(name)
            broken = [n for n, p in network.named_parameters() if not bool(torch.isfinite(p).all())]
            if broken:
                raise UsageError(
                    f"{self.checkpoint.given}/{name} holds {len(broken)} parameters that are not finite: {broken[0]}",
                    "finite weights",
                    "the download is broken or was saved after a diverged run",
                )
            self.networks[name] = network.eval()
        if self.causal is not None:
            self._make_causal(self.causal)
        if self.gradient_checkpointing:
            self.enable_gradient_checkpointing()
        return self

    def _present_networks(self) -> list[str]:
        return [name for name in self.network_names if self.checkpoint.has(name)]

    def _network_class(self, name: str) -> Any:
        import diffusers

        return getattr(diffusers, self.checkpoint.class_of(name))

    def _load_network(self, name: str) -> nn.Module:
        cls = self._network_class(name)
        return cls.from_pretrained(self.checkpoint.fetch(name), subfolder=name, dtype=self.dtype)

    def skeleton(self, name: Optional[str] = None) -> nn.Module:
        """The network without weights (on the meta device): names and shapes for checks before anything is loaded."""
        name = name or self._present_networks()[0]
        with torch.device("meta"):
            return self._network_class(name).from_config(self.checkpoint.config(name))

    @property
    def network(self) -> nn.Module:
        """The denoising network (of Wan 2.2's two experts, the one for high noise)."""
        self._need_network()
        return next(iter(self.networks.values()))

    def _need_network(self) -> None:
        if not self.networks:
            self._need("denoiser")
            raise RuntimeError(
                f"{self.family}: the network is not loaded yet; call materialize() or use backbones.load()"
            )

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        parameter = next(self.parameters(), None)
        return parameter.device if parameter is not None else self.idle_device

    def _need(self, component: Component) -> None:
        if component not in self.components:
            raise UsageError(
                f"this job asked {self.family} for its {component}, but was given components {list(self.components)}",
                f"components that include {component}",
                f"add {component} to the backbone's components, or feed the job cached latents or text instead",
            )

    @property
    def vae(self) -> Any:
        """The VAE, loaded at first use."""
        if "vae" not in self._parts:
            self._need("vae")
            import diffusers

            cls = getattr(diffusers, self.checkpoint.class_of("vae"))
            vae = cls.from_pretrained(self.checkpoint.fetch("vae"), subfolder="vae", dtype=self.vae_dtype)
            if self.vae_tiling:
                vae.enable_tiling()
            self._parts["vae"] = vae.eval().requires_grad_(False)
        return self._parts["vae"].to(self.device)

    def _text_pipeline(self) -> Any:
        """The family's pipeline with nothing in it but tokenizers and text encoders."""
        if "text" not in self._parts:
            self._need("text_encoder")
            import diffusers

            keep = [c for c in self.checkpoint.components if c.startswith(("tokenizer", "text_encoder"))]
            rest: dict[str, Any] = {c: None for c in self.checkpoint.components if c not in keep}
            cls = getattr(diffusers, self.checkpoint.pipeline_class)
            with bars_on_terminals_alone():
                pipeline = cls.from_pretrained(self.checkpoint.fetch(*keep), dtype=self.text_dtype, **rest)
            for name in keep:
                part = getattr(pipeline, name)
                if isinstance(part, nn.Module):
                    # Dropout would make the same prompt two things.
                    part.eval().requires_grad_(False)
            self._parts["text"] = pipeline
        return self._parts["text"].to(self.device)

    def release(self, component: Component) -> None:
        """Forget the VAE or the text encoder, to give its memory back once everything is encoded."""
        self._parts.pop({"vae": "vae", "text_encoder": "text"}.get(component, ""), None)

    # -- denoising -------------------------------------------------------------------------------------------------

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's raw prediction, in the family's own kind and our layout.

        Args:
            latents: Noisy latents (B, C, F, H, W).
            t: Times 0..1000, (B,); (B, F) for families with per-frame times.
            conditioning: One per sample.
        """
        self._need_network()
        if latents.ndim != 5:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (B, C, F, H, W)")
        if t.ndim == 2 and not self.per_frame_times:
            raise UsageError(
                f"{self.family} was given per-frame times of shape {tuple(t.shape)}",
                "one time per sample: its network modulates all frames, and the text, by one time",
                "causal stages need a family with per-frame times (Wan)",
            )
        if t.shape[0] != latents.shape[0] or len(conditioning) != latents.shape[0]:
            raise ValueError(
                f"{latents.shape[0]} latents, {t.shape[0]} times, {len(conditioning)} prompts: expected equal numbers"
            )
        frames = latents.shape[2]
        if t.ndim == 2 and t.shape[1] != frames:
            raise ValueError(
                f"per-frame times of shape {tuple(t.shape)}: expected one for each of {frames} latent frames"
            )
        self.geometry.check_latents(latents, self.family)
        self._check(latents, t, conditioning)
        dtype = self.dtype
        t = self.schedule.snap(t.to(latents.device))
        return self._forward(latents.to(dtype), t, conditioning.to(latents.device, dtype=dtype))

    forward = denoise

    # -- codec -----------------------------------------------------------------------------------------------------

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Refuse a clip size that the family can't represent exactly, with the nearest that it can."""
        self.geometry.check_clip(frames, height, width, self.family)
        if self.causal is not None:
            self.causal.spans((frames - 1) // self.geometry.temporal + 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip; refuses sizes that don't fit."""
        self.check_clip(frames, height, width)
        return self.geometry.latent_shape(frames, height, width, self.family)

    def _statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that normalise this VAE's latents, per channel."""
        config = vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        scale = float(getattr(config, "scaling_factor", None) or 1.0)
        center = torch.tensor(mean if mean is not None else [float(getattr(config, "shift_factor", None) or 0.0)])
        spread = torch.tensor(std if std is not None else [1.0]) / scale
        return center.view(1, -1, 1, 1, 1), spread.view(1, -1, 1, 1, 1)

    def _own_precision(self) -> torch.autocast:
        """Encoders run in the dtype they were given, also inside a training step under Trainer precision ``bf16-mixed``."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: Optional[torch.Generator] = None) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] to normalised latents, float32.

        Args:
            pixels: The clips.
            generator: Draw from the posterior with it; its mode where not given, which is the same for every call.
        """
        self.check_clip(*pixels.shape[2:])
        vae = self.vae
        with self._own_precision():
            posterior = self._vae_encode(vae, pixels.to(vae.device, vae.dtype))
        raw = posterior.mode() if generator is None else posterior.sample(generator)
        raw = self._from_codec(raw, pixels.shape[0]).float()
        center, spread = self._statistics(vae)
        return (raw - center.to(raw.device)) / spread.to(raw.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to pixels (B, 3, F, H, W) in [-1, 1], float32."""
        vae = self.vae
        center, spread = self._statistics(vae)
        raw = latents.float() * spread.to(latents.device) + center.to(latents.device)
        with self._own_precision():
            pixels = self._vae_decode(vae, raw.to(vae.device, vae.dtype))
        return pixels.float().clamp(-1.0, 1.0)

    def _vae_encode(self, vae: Any, pixels: Tensor) -> Any:
        """The posterior of a clip; families with an image VAE fold the frames into the batch first."""
        return vae.encode(pixels).latent_dist

    def _from_codec(self, raw: Tensor, batch: int) -> Tensor:
        """What a posterior gave, in our layout."""
        return raw

    def _vae_decode(self, vae: Any, raw: Tensor) -> Tensor:
        """Unnormalised latents in our layout to pixels in our layout."""
        return vae.decode(raw, return_dict=False)[0]

    # -- text ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to conditioning, as the family's pipeline does it."""
        with self._own_precision():
            return self._encode_prompts(self._text_pipeline(), list(prompts))

    def unconditional(self, negative_prompt: str = "") -> Conditioning:
        """The conditioning of the unconditional branch, one sample long; encoded once."""
        if negative_prompt not in self._empty_text:
            self._empty_text[negative_prompt] = self.encode_text([negative_prompt])
        return self._empty_text[negative_prompt]

    @property
    def given_texts(self) -> set[str]:
        """Prompts of the unconditional branch that need no text encoder any more."""
        return set(self._empty_text)

    def give_unconditional(self, conditioning: Conditioning, negative_prompt: str = "") -> None:
        """Let this be the unconditional branch, rather than what the text encoder would make (a cache holds it)."""
        self._empty_text[negative_prompt] = conditioning

    # -- blocks, motion projections --------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of all networks, in order: the units of sharding and checkpointing."""
        found: list[nn.Module] = []
        for network in self.networks.values():
            for attribute in self.block_lists:
                part: Any = network.get_submodule(attribute)
                found.extend(part if isinstance(part, nn.ModuleList) else [part])
        return found

    def networks_between(self, low: float, high: float) -> list[str]:
        """Names of the networks that work somewhere in a range of times (families with experts have several)."""
        return self._present_networks()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass; gradients stay the same, whatever happens to adapters in between."""
        from muybridge.backbones.gates import recompute

        for network in self.networks.values():
            network.enable_gradient_checkpointing(recompute)  # type: ignore[operator]

    def motion_projections(self, which: Sequence[Projection] = ("v", "o")) -> str:
        """Full-match regex of the chosen projections of the motion-carrying attention."""
        unknown = [p for p in which if p not in self.projections]
        if unknown or not which:
            raise UsageError(
                f"projections {list(which)}", f"some of {', '.join(self.projections)}", "the default is [v, o]"
            )
        return f"(?:{self.temporal_attention})\\.(?:{'|'.join(self.projections[p] for p in which)})"

    def matching(self, pattern: str, name: Optional[str] = None) -> list[str]:
        """Names of the linear layers that a full-match regex hits; an error that names near misses if it hits none."""
        network = (
            self.networks[name] if name and self.networks else (self.network if self.networks else self.skeleton(name))
        )
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression ({error})", "a Python regex") from error
        names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
        hits = [n for n in names if compiled.fullmatch(n)]
        if not hits:
            near = [n for n in names if compiled.search(n)][:3] or names[:3]
            raise UsageError(
                f"the regex {pattern!r} hits no linear layer of {self.family}",
                f"a regex that matches whole names, such as {', '.join(near)}",
                "the family's own motion projections are: " + self.motion_projections(),
            )
        return hits

    # -- sampling --------------------------------------------------------------------------------------------------

    def steps_of(self, steps: int | Sequence[float]) -> int | Sequence[float]:
        """What a sampler runs: of a few-step student's checkpoint its own times, and no other number of them.

        Args:
            steps: As for :meth:`sample`.
        """
        own = trained_steps(self.checkpoint.config("scheduler")) if isinstance(steps, int) else None
        if own is None:
            return steps
        if steps != len(own):
            raise UsageError(
                f"{steps} steps of {self.checkpoint.given}, a student that was distilled to {len(own)}",
                f"{len(own)} steps, which are {own}, or any list of times",
                "ask for its own number, without guidance",
            )
        return own

    def inference_scheduler(self, steps: int, latents: Tensor) -> Any:
        """The checkpoint's own diffusers scheduler, set to ``steps`` timesteps."""
        import diffusers

        cls = getattr(diffusers, self.checkpoint.class_of("scheduler"))
        scheduler = cls.from_config(self.checkpoint.config("scheduler"))
        self._set_steps(scheduler, steps, latents)
        return scheduler

    def _set_steps(self, scheduler: Any, steps: int, latents: Tensor) -> None:
        """Give a scheduler its timesteps; families whose pipelines list their own noise levels do it here."""
        scheduler.set_timesteps(steps, device=latents.device)

    def _scheduler_step(self, generator: Optional[samplers.Generators]) -> samplers.SchedulerStep:
        """How one step of the family's scheduler is taken; a fresh one per sampling run, since it may hold state."""
        return functools.partial(samplers.plain_step, generator=generator)

    def _scheduler_time(self, label: Tensor) -> Tensor:
        """A scheduler's timestep label as our time."""
        return label

    def pair_unconditional(
        self, conditioning: Conditioning, unconditional: Optional[Conditioning] = None
    ) -> Conditioning:
        """The unconditional branch that goes with ``conditioning``; the empty prompt where none is given."""
        empty = unconditional if unconditional is not None else self.unconditional()
        return empty.expand(len(conditioning))

    def guided(
        self, conditioning: Conditioning, unconditional: Optional[Conditioning] = None, guidance: float = 1.0
    ) -> samplers.Denoiser:
        """A denoiser under standard guidance ``u + s (c - u)``; one network call where ``guidance`` is 1."""

        def denoise(noisy: Tensor, t: Tensor) -> Tensor:
            prediction = self.denoise(noisy, t, conditioning)
            if guidance == 1.0:
                return prediction
            empty = self.pair_unconditional(conditioning, unconditional)
            return guide(self.denoise(noisy, t, empty), prediction, guidance)

        return denoise

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        steps: int | Sequence[float] = 50,
        guidance: float = 1.0,
        unconditional: Optional[Conditioning] = None,
        generator: Optional[samplers.Generators] = None,
        on_step: Optional[samplers.OnStep] = None,
    ) -> Tensor:
        """Latents from noise; block by block where the backbone is causal.

        Args:
            noise: Standard normal latents (B, C, F, H, W).
            conditioning: One per sample.
            steps: A number runs the checkpoint's own scheduler for so many steps, as its diffusers pipeline would (of an
                exported few-step student it is its own number). A list of falling times runs the few-step sampler that
                re-noises between them.
            guidance: Standard guidance scale; 1 is none.
            unconditional: The other branch of guidance; the empty prompt where not given.
            generator: For the fresh noises of the few-step sampler, or of a scheduler that draws some, on the CPU.
            on_step: Called after each step with (index, count, time, latents); counted over all blocks of a causal clip,
                of which it is given the block at hand.
        """
        if not is_causal(self):
            denoise = self.guided(conditioning, unconditional, guidance)
            return self.run_sampler(denoise, noise, steps, generator, on_step)
        assert self.causal is not None
        blocks, made = len(self.causal.spans(noise.shape[2])), 0

        def counted(index: int, count: int, time: float, latents: Tensor) -> None:
            if on_step is not None:
                on_step(made * count + index, blocks * count, time, latents)

        def sample_block(denoise: samplers.Denoiser, noise: Tensor) -> Tensor:
            return self.run_sampler(denoise, noise, steps, generator, counted)

        parts = []
        for part in stream(self, noise, conditioning, sample_block, unconditional, guidance):
            parts.append(part)
            made += 1
        return torch.cat(parts, 2)

    def run_sampler(
        self,
        denoise: samplers.Denoiser,
        noise: Tensor,
        steps: int | Sequence[float],
        generator: Optional[samplers.Generators],
        on_step: Optional[samplers.OnStep],
    ) -> Tensor:
        """Latents from noise by any denoiser of this family's latents.

        Args:
            denoise: What predicts.
            noise: Standard normal latents (B, C, F, H, W).
            steps: A number runs the checkpoint's own scheduler, a list of falling times the few-step sampler.
            generator: As for :meth:`sample`.
            on_step: As for :meth:`sample`.
        """
        steps = self.steps_of(steps)
        if not isinstance(steps, int):
            return samplers.few_step(denoise, noise, self.schedule, steps, generator, on_step)
        scheduler = self.inference_scheduler(steps, noise)
        return samplers.many_step(
            denoise, noise, scheduler, self._scheduler_step(generator), self._scheduler_time, on_step
        )
