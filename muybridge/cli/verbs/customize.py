"""One motion from one clip, shown on new subjects: everything in one command."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, Optional

from muybridge.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from muybridge.backbones import Backbone
    from muybridge.customization.references import Reference
    from muybridge.diffusion.conditioning import Conditioning

RECIPES: dict[str, list[str]] = {
    "plain": ["Denoising"],
    "matching": ["MotionFeatureMatching"],
    "both": ["Denoising", "MotionFeatureMatching"],
    "residual": ["Denoising", "FrameResidual"],
    "debiased": ["AppearanceDebiased"],
}
"""Losses of every ``--recipe``."""
EPSILON = {"matching": {"eps": 1e-16}}
"""Gradients of maps alone are small against AdamW's usual epsilon of 1e-8, which would hold every step back."""


def customize(
    *,
    model: str,
    reference: str,
    caption: str,
    prompt: str,
    prompts: Optional[str] = None,
    out: str = "runs/customize",
    tau: Optional[float] = None,
    unit: Literal["timestep", "sigma", "logsnr", "fraction"] = "timestep",
    from_probe: Optional[str] = None,
    recipe: Literal["plain", "matching", "both", "residual", "debiased"] = "plain",
    updates: int = 400,
    learning_rate: float = 5e-4,
    rank: int = 4,
    projections: list[Literal["q", "k", "v", "o"]] = ["v", "o"],  # noqa: B006
    frames: Optional[int] = None,
    height: Optional[int] = None,
    width: Optional[int] = None,
    fps: Optional[float] = None,
    steps: int = 50,
    guidance: Optional[float] = None,
    beta: float = 0.0,
    samples: int = 1,
    compare: bool = True,
    keep_bar: bool = False,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Optional[str] = None,
) -> None:
    """Teach a model the motion of one clip, and make videos of new subjects that move so.

    Finds the boundary above which the adapter acts (published, given, or probed), trains, exports, samples. A run that was
    stopped after its training goes on with the sampling. The config it trains with lies beside the result, for ``muybridge fit``.

    Args:
        model: Directory of a diffusers pipeline, or a hub id.
        reference: The clip.
        caption: What it shows, subject and motion with a bar between: ``a man | runs to the left``.
        prompt: What to make: ``a robot | runs to the left``.
        prompts: A file with further ones, one a line.
        out: Folder for everything.
        tau: The boundary; the family's published one where not given, and where there is none a probe of the reference finds it.
        unit: What ``tau`` is in.
        from_probe: Folder of a finished ``muybridge probe``, instead of ``tau``.
        recipe: Losses: the ``plain`` denoising loss, motion feature ``matching``, ``both``, frame ``residual`` (VMC), or
            appearance ``debiased`` (MotionDirector).
        updates: Updates of training.
        learning_rate: Of AdamW.
        rank: Of the adapter; its scale is 1.
        projections: Which projections of the motion-carrying attention are adapted.
        frames: Frames of a clip; what the family was trained for where not given.
        height: Height in pixels; likewise.
        width: Width in pixels; likewise.
        fps: Frames per second; the reference's own where not given.
        steps: Steps of the sampler.
        guidance: Standard guidance; the family's usual one where not given.
        beta: How much of the reference's own inverted noise is in the noise that videos start from: 0 is none.
        samples: Videos of every prompt.
        compare: Make each video once more without the adapter.
        keep_bar: Give the text encoder captions with their bar, for models that were trained so.
        seed: Of training and of the videos' noise.
        dtype: Of the frozen network; ``auto`` is bfloat16 on a GPU.
        device: Such as ``cuda:1``; the first GPU where there is one, where not given.
    """
    from pathlib import Path

    from muybridge.backbones import pick_family
    from muybridge.backbones.adapters import LoRA, check_lora
    from muybridge.cli.devices import pick_device
    from muybridge.customization.references import clip_size, list_references, read_reference
    from muybridge.customization.tau import KNOWN, Tau
    from muybridge.diffusion.inversion import check_beta, ladder
    from muybridge.proving_ground.captions import split_caption

    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {what}", flush=True)

    if min(updates, samples, steps) < 1 or not learning_rate > 0:
        raise UsageError(
            f"{updates} updates, {samples} samples, {steps} steps, learning rate {learning_rate}",
            "1 or more, and a rate above 0",
        )
    check_beta(beta)
    wanted = [prompt, *_more(prompts)]
    subject = split_caption(caption)[0]
    same = [p for p in wanted if split_caption(p) == split_caption(caption)]
    if len(same) == len(wanted):
        raise UsageError(
            f"the prompt is the reference's own caption, {caption!r}",
            f"another subject than {subject!r} with the same motion",
            'such as --prompt "a robot | runs to the left"',
        )
    where = pick_device(device)
    kind = dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32"
    described = pick_family(model)(path=model)
    check_lora(described, LoRA(rank=rank, projections=list(projections)))
    if beta > 0.0:
        ladder(described.schedule, steps)
    size = clip_size(described, frames, height, width)
    clip = list_references(reference, caption)[0]
    shown = read_reference(clip, size, fps)
    root = Path(out)
    settings: dict[str, Any] = {"value": tau, "unit": unit, "from_probe": from_probe}
    published = KNOWN[described.family].tau if described.family in KNOWN else None
    if tau is None and from_probe is None and published is None:
        from muybridge.cli.verbs.probe import probe

        say(f"no boundary is published for {described.family}: a probe of the reference")
        probe(
            model=model,
            videos=reference,
            out=str(root / "probe"),
            caption=caption,
            subject=split_caption(wanted[0])[0],
            steps=max(4, min(steps, 50)),
            boundaries=max(4, min(steps, 10)),
            frames=[size[0]],
            height=size[1],
            width=size[2],
            fps=fps,
            keep_bar=keep_bar,
            seed=seed,
            dtype=kind,
            device=device,
        )
        settings["from_probe"] = str(root / "probe")
    boundary = Tau(**settings).resolve(described)
    say(f"{described.family}, clips of {size[0]}x{size[1]}x{size[2]}: the adapter acts from time {boundary.value:g} on")

    usual = KNOWN[described.family].guidance if described.family in KNOWN else 5.0
    strength = usual if guidance is None else guidance
    clock = {"frame_rate": shown.fps} if hasattr(described, "frame_rate") else {}
    config = {
        "seed_everything": seed,
        "trainer": {
            "accelerator": "gpu" if where.type == "cuda" else where.type,
            "devices": [where.index or 0] if where.type == "cuda" else 1,
            "precision": "bf16-mixed" if where.type == "cuda" else "32-true",
            "max_steps": updates,
            "log_every_n_steps": 10,
            "default_root_dir": str(root / "run"),
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}],
        },
        "model": {
            "class_path": "MotionCustomization",
            "init_args": {
                "backbone": {
                    "class_path": described.family if clock else "Pretrained",
                    "init_args": {
                        "path": model,
                        "dtype": kind,
                        "gradient_checkpointing": where.type == "cuda",
                        **clock,
                    },
                },
                "losses": [{"class_path": name} for name in RECIPES[recipe]],
                "tau": {"value": boundary.value},
                "adapter": {"rank": rank, "projections": list(projections)},
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": learning_rate, "weight_decay": 0.01, **EPSILON.get(recipe, {})},
                },
                "keep_bar": keep_bar,
                "sampling": {
                    "steps": steps,
                    "guidance": strength,
                    "frames": size[0],
                    "height": size[1],
                    "width": size[2],
                    "fps": shown.fps,
                },
                "seed": seed,
            },
        },
        "data": {
            "class_path": "VideoData",
            "init_args": {
                "videos": str(clip.path),
                "caption": caption,
                "frames": size[0],
                "height": size[1],
                "width": size[2],
                "fps": fps,
                "repeats": updates,
                "on_error": "raise",
                "num_workers": 0,
            },
        },
    }
    files = train(root, config, say)
    ours = [file for file in files if "comfyui" not in file.name]
    videos = Videos(root, model, kind, str(where), ours, shown, steps, strength, seed, samples, keep_bar)
    sheet = videos.make(wanted, beta, compare)
    say("done")
    print(f"videos:        {root / 'videos'}")
    print(f"contact sheet: {sheet}")
    print(f"adapter:       {', '.join(str(f) for f in files)}")
    print(f"config:        {root / 'customize.yaml'}")


def _more(file: Optional[str]) -> list[str]:
    if file is None:
        return []
    from datamodules.prompts import read_prompts

    return read_prompts(file)[1]


def train(root: Path, config: dict[str, Any], say: Any) -> list[Path]:
    """Write the config, fit, export; the adapter's files. What a finished run left is kept."""
    import yaml

    from muybridge.cli.jobs import run_job
    from muybridge.whole import write_text

    file, adapter = root / "customize.yaml", root / "adapter"
    text = "# What `muybridge customize` trained with: muybridge fit -c THIS FILE\n" + yaml.safe_dump(
        config, sort_keys=False
    )
    if adapter.is_dir():
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            say(f"the adapter is in {adapter} already")
            return sorted(adapter.glob("*.safetensors"))
        raise UsageError(f"{root} holds an adapter of other settings", "a new folder", "choose another --out")
    write_text(file, text)
    say(f"muybridge fit -c {file}")
    if run_job("fit", ["-c", str(file)]):
        raise RuntimeError("fit failed; its message is above")
    give_back()
    say("muybridge export: the adapter, in diffusers' names and where there are such in ComfyUI's")
    if run_job("export", ["-c", str(file), "--ckpt_path=last", f"--out={adapter}"]):
        raise RuntimeError("export failed; its message is above")
    give_back()
    return sorted(adapter.glob("*.safetensors"))


def give_back() -> None:
    """What a job that is over still holds in circles, and the GPU memory that was its own."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Videos:
    """The last part: videos of the prompts, with and without the adapter, and one sheet of all of them.

    Args:
        root: Where to.
        model: The pipeline.
        dtype: Of its network.
        device: Where it works.
        adapter: The trained file; of a model with two experts there may be two.
        shown: The reference.
        steps: Of the sampler.
        guidance: Standard guidance.
        seed: Of the noise.
        samples: Videos of every prompt.
        keep_bar: Give the text encoder captions with their bar.
    """

    def __init__(
        self,
        root: Path,
        model: str,
        dtype: Any,
        device: str,
        adapter: list[Path],
        shown: Reference,
        steps: int,
        guidance: float,
        seed: int,
        samples: int,
        keep_bar: bool,
    ) -> None:
        self.root, self.model, self.dtype, self.device, self.adapter = root, model, dtype, device, adapter
        self.shown, self.steps, self.guidance, self.seed = shown, steps, guidance, seed
        self.samples, self.keep_bar = samples, keep_bar

    def make(self, prompts: list[str], beta: float, compare: bool) -> Path:
        """Write all videos and the sheet; returns the sheet.

        Args:
            prompts: What to make.
            beta: Share of the reference's inverted noise.
            compare: Make each once more without the adapter.
        """
        from datamodules.prompts import prompt_id
        from muybridge.backbones.adapters import disabled, load_adapter
        from muybridge.cli.devices import open_model
        from muybridge.customization.references import spoken
        from muybridge.progress import Progress
        from muybridge.video import contact_sheet, to_frames, write_image, write_video

        backbone = open_model(self.model, self.dtype, self.device)
        backbone.set_frame_rate(self.shown.fps)
        start = self.start(backbone, beta)
        for file in self.adapter:
            load_adapter(backbone, file)
        texts = {words: backbone.encode_text([spoken(words, self.keep_bar)]) for words in prompts}
        if self.guidance != 1.0:
            backbone.unconditional()
        # It may take several times the network's memory, and everything is encoded.
        backbone.release("text_encoder")
        rows, names = [to_frames(self.shown.pixels)], ["the reference"]
        ways = ("base", "customized") if compare else ("customized",)
        with Progress("sampling steps", len(prompts) * self.samples * len(ways) * self.steps, every=10.0) as progress:
            for number, words in enumerate(prompts):
                for sample in range(self.samples):
                    for way in ways:
                        noise = start(number, sample)
                        if way == "base":
                            with disabled(backbone):
                                clip = self.sample(backbone, texts[words], noise, progress)
                        else:
                            clip = self.sample(backbone, texts[words], noise, progress)
                        name = f"{prompt_id(number, words)}-{sample}-{way}"
                        frames = to_frames(clip)
                        write_video(self.root / "videos" / f"{name}.mp4", frames, self.shown.fps)
                        rows.append(frames)
                        names.append(name)
        write_video(self.root / "videos" / "reference.mp4", rows[0], self.shown.fps)
        sheet = write_image(self.root / "sheet.png", contact_sheet(rows))
        print("rows of the sheet: " + "; ".join(names))
        return sheet

    def start(self, backbone: Backbone, beta: float) -> Any:
        """From a prompt's and a sample's number to the noise their videos start from."""
        from muybridge.customization.inverted import How, Inverted, about, invert_clip, write_inverted
        from muybridge.customization.references import spoken
        from muybridge.diffusion.draws import keyed_noise
        from muybridge.diffusion.inversion import mix_noise

        size = tuple(self.shown.pixels.shape[1:])
        shape = backbone.latent_shape(*size)
        inverted = None
        if beta > 0.0:
            how, words = How(self.steps), spoken(self.shown.caption, self.keep_bar)
            clean = backbone.encode(self.shown.pixels[None].to(backbone.device))
            path, _ = invert_clip(backbone, clean, words, how)
            inverted = path[-1][0]
            said = about(backbone, self.shown.id, words, how, size, caption=self.shown.caption)  # type: ignore[arg-type]
            write_inverted(self.root / "inverted.safetensors", Inverted(inverted, clean[0], said))

        def noise(number: int, sample: int) -> Any:
            fresh = keyed_noise(shape, self.seed, "customize", number, sample)[None].to(backbone.device)
            return fresh if inverted is None else mix_noise(inverted[None].to(fresh), fresh, beta)

        return noise

    def sample(self, backbone: Backbone, text: Conditioning, noise: Any, progress: Any) -> Any:
        """One clip, (3, F, H, W)."""
        latents = backbone.sample(
            noise,
            text,
            steps=self.steps,
            guidance=self.guidance,
            on_step=lambda *_: progress.advance(),
        )
        return backbone.decode(latents)[0]
