"""Distillation through the command: from a teacher to a pipeline that others load. All its stages are in test_stages.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.families import CASES
from torch import Tensor

from muybridge.backbones import load
from muybridge.backbones.base import Backbone
from muybridge.diffusion import FlowSchedule, keyed_generator, keyed_noise, samplers
from muybridge.errors import UsageError
from muybridge.export import export_pipeline
from muybridge.few_step_scheduler import stock
from muybridge.video import read_frames, to_frames, write_gif

from .conftest import Command

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]


@pytest.fixture
def options(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """What points the shipped tiny config at this test's files."""
    return [
        "-c=tiny/distill-stage1.yaml",
        f"--model.teacher.path={tiny_checkpoint('wan')}",
        "--model.teacher.max_text_length=16",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
        *QUIET,
    ]


def state(folder: Path) -> dict[str, Tensor]:
    file = max(folder.rglob("last.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    return torch.load(file, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def test_a_student_becomes_a_pipeline_that_samples_as_it_was_trained(
    command: Command, options: list[str], tmp_path: Path
):
    assert command("fit", *options, "--trainer.max_steps=4").code == 0
    rows = (tmp_path / "run/motion/motion.csv").read_text().splitlines()
    assert rows[0].startswith("update,amount,smoothness,amount_ratio,amount_of_teacher")
    assert [row.split(",")[0] for row in rows[1:]] == ["2"]
    assert {p.name for p in (tmp_path / "run/motion").iterdir()} >= {"teacher.png", "update-0000002.png"}

    assert command("export", *options, "--ckpt_path=last", "--out=student").code == 0
    averages = {n: w for n, w in state(tmp_path / "run").items() if n.startswith("average.")}
    student = load("student", max_text_length=16)
    for name, weight in student.named_parameters():
        assert torch.equal(weight, averages[f"average.own_student__{name.replace('.', '__')}"])

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("student")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *student.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(1))
    common = dict(latents=noise, height=32, width=32, num_frames=9, max_sequence_length=16, output_type="pt")
    torch.manual_seed(7)
    video = pipeline("a dog", num_inference_steps=3, guidance_scale=1.0, **common).frames
    torch.manual_seed(7)
    ours = student.decode(student.sample(noise, student.encode_text(["a dog"]), steps=[1000.0, 757.0, 522.0]))
    torch.testing.assert_close(video[0].permute(1, 0, 2, 3) * 2 - 1, ours[0], atol=2e-4, rtol=0)
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx([1000.0, 757.0, 522.0], abs=1e-3)

    Path("prompts.txt").write_text("a dog\nrain\n")
    sampling = [
        "sample",
        *options,
        "--ckpt_path=last",
        "--prompts=prompts.txt",
        "--out=videos",
        "--format=gif",
        "--seed=3",
    ]
    assert command(*sampling).code == 0
    made = {p.name: p.stat().st_mtime_ns for p in Path("videos").iterdir()}
    assert {"0000-a-dog.gif", "0001-rain.gif", "sheet.png"} <= set(made)
    # The sampler's clip in the student's steps, its noise a function of the seed and the id, as a file holds it.
    far, text = {}, student.encode_text(["a dog"])
    for seed in (3, 4):
        noise = keyed_noise(student.latent_shape(9, 32, 32), seed, "sample", "0000-a-dog")[None]
        drawn = [keyed_generator(seed, "sampler", "0000-a-dog")]
        clip = student.decode(student.sample(noise, text, steps=[1000.0, 757.0, 522.0], generator=drawn))[0]
        files = (write_gif("ours.gif", to_frames(clip)), "videos/0000-a-dog.gif")
        ours, theirs = (read_frames(file, range(9)).astype(float) for file in files)
        far[seed] = abs(ours - theirs).mean()
    assert far[3] < 0.1 * far[4]
    sheet = np.asarray(Image.open("videos/sheet.png")).astype(float)
    Path("videos/0001-rain.gif").unlink()
    assert command(*sampling).code == 0
    again = {p.name: p.stat().st_mtime_ns for p in Path("videos").iterdir()}
    assert again["0000-a-dog.gif"] == made["0000-a-dog.gif"]
    assert again["0001-rain.gif"] > made["0001-rain.gif"]
    completed = np.asarray(Image.open("videos/sheet.png")).astype(float)
    assert completed.shape == sheet.shape, "a row for every prompt, whenever its video was made"
    assert abs(completed - sheet).mean() < 3.0
    other = command(*sampling[:-1], "--seed=4")
    assert other.code == 2
    assert "the videos in videos were made under other settings" in other.message


def test_adapters_run_as_a_layer_over_the_first_stage(command: Command, options: list[str]):
    run = [options[0], "-c=tiny/distill-lora.yaml", *options[1:], "--trainer.max_steps=2"]
    assert command("fit", *run).code == 0
    result = command("export", *run, "--ckpt_path=last", "--out=student")
    assert result.code == 0
    assert load("student", max_text_length=16).family == "Wan"


def test_prompts_alone_and_their_cached_embeddings_are_enough(
    command: Command, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The text encoder, asked for the negative prompt and for what the monitor samples too, is not loaded."""
    options = [*options, "--trainer.max_steps=2", "--model.negative_prompt=static"]
    assert command("cache", *options, "--out=cache").code == 0
    encoded: list[object] = []
    monkeypatch.setattr(Backbone, "encode_text", lambda self, prompts: encoded.extend(prompts))
    cached = [*options, "--data.cache=cache", "--model.teacher.components=[denoiser, vae]"]
    assert command("fit", *cached).code == 0
    assert not encoded
    assert (tmp_path / "run/motion/motion.csv").exists() is False, "the student was updated once, and is sampled at two"
    lost = command("fit", *cached, "--model.negative_prompt=blurry")
    assert lost.code == 2
    assert "negative prompt 'blurry'" in lost.message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.steps=[1000, 757, 800]"], "the step list is [1000.0, 757.0, 800.0]"),
        (["--model.losses=[{class_path: MotionScoreMatching, init_args: {weight: -1}}]"], "weight (λ) is -1.0"),
        (["--model.clips.frames=1"], "two latent frames"),
        (["--data.texts=null", "--data.prompts=blank.txt"], "blank.txt holds blank lines: 2"),
        (["--trainer.gradient_clip_val=1.0"], "gradient_clip_val"),
        (
            ["--model.student=Pretrained", "--model.student.path={cogvideox}"],
            "the student is CogVideoX and the teacher Wan",
        ),
    ],
)
def test_bad_input_is_refused_before_weights_load(
    more: list[str],
    words: str,
    command: Command,
    options: list[str],
    loads: list[Backbone],
    tiny_checkpoint: Callable[[str], Path],
):
    Path("blank.txt").write_text("a dog\n\nrain\n")
    more = [word.replace("{cogvideox}", str(tiny_checkpoint("cogvideox"))) for word in more]
    result = command("fit", *options, *more)
    assert result.code == 2
    assert words in result.message
    assert not loads


# -- schedulers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        [1000.0],
        [1000.0, 500.0],
        [1000.0, 757.0, 522.0],
        [1000.0, 937.5, 2500.0 / 3.0, 625.0],
        [1000.0, 960.0, 8000.0 / 9.0, 8000.0 / 11.0],
        [1000.0, 750.0, 500.0, 250.0],
    ],
)
def test_published_steps_fit_a_scheduler_of_diffusers_own(steps: list[float]):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = stock(steps)
    assert config is not None
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(len(steps))
    assert scheduler.timesteps.tolist() == pytest.approx(steps, abs=1e-3)
    assert scheduler.sigmas.tolist() == pytest.approx([*(s / 1000.0 for s in steps), 0.0], abs=1e-6)


@dataclass(frozen=True)
class Call:
    """How a family's pipeline is asked for a clip, and where it differs from ours in the order in which noise is drawn.

    Args:
        frames: Name of the argument for the number of frames.
        more: Further arguments.
        drawn: Our latents' shape as the pipeline's scheduler sees it.
        ours: A latent of that shape in our layout.
    """

    frames: str = "num_frames"
    more: dict[str, Any] = field(default_factory=dict)
    drawn: Callable[[torch.Size], tuple[int, ...]] = tuple
    ours: Callable[[Tensor, torch.Size], Tensor] = lambda z, shape: z


FRAMES_FIRST = Call(
    more={"max_sequence_length": 32},
    drawn=lambda s: (s[0], s[2], s[1], *s[3:]),
    ours=lambda z, shape: z.transpose(1, 2),
)
CALLS = {
    "wan": Call(more={"max_sequence_length": 32}),
    # Its network has no working mask for padding: the pipeline crops instead, unless it is told not to.
    "latte": Call("video_length", {"mask_feature": False, "clean_caption": False, "negative_prompt": ""}),
    "cogvideox": FRAMES_FIRST,
    "cogvideox_rope": FRAMES_FIRST,
    "unet3d": Call(
        drawn=lambda s: (s[0] * s[2], s[1], *s[3:]),
        ours=lambda z, shape: z.unflatten(0, (shape[0], shape[2])).transpose(1, 2),
    ),
    # These three pipelines hand their scheduler noise levels of their own.
    "hunyuan": Call(more={"guidance_scale": 6.0}),
    "ltx": Call(
        drawn=lambda s: (s[0], s[2:].numel(), s[1]),
        ours=lambda z, shape: z.transpose(1, 2).unflatten(2, shape[2:]),
    ),
    "mochi": Call(),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_steps_come_with_a_scheduler_of_their_own(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Flow, v with zero terminal SNR, epsilon with some signal left: the pipeline makes the sampler's clip of the same noises."""
    case, call = CASES[name], CALLS[name]
    steps = {"wan": [900.0, 700.0, 650.0, 20.0]}.get(name, [999.0, 749.0, 249.0])
    student = case.open(tiny_checkpoint(name))
    if student.lays_own_levels:
        steps = [1000.0, 757.0, 522.0]
        assert stock(steps) is not None, "which only pipelines that ask for a number of steps can use"
    elif isinstance(student.schedule, FlowSchedule):
        assert stock(steps) is None
    out = export_pipeline(student, str(tmp_path / "student"), steps)

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = case.clip
    noise = case.noise(student)
    text = student.encode_text(["a dog"])
    prompt: dict[str, Any] = {"prompt": "a dog"}
    if name == "latte":
        prompt = {"prompt": None, "prompt_embeds": text.text}
        text = type(text)(text.text)
    torch.manual_seed(7)
    made = pipeline(
        **prompt, **{"guidance_scale": 1.0, call.frames: frames} | call.more, height=height, width=width,
        num_inference_steps=50, latents=case.to_pipeline(noise.clone()), output_type="latent",
    ).frames  # fmt: skip

    def drawn(like: Tensor, generator: Any) -> Tensor:
        return call.ours(torch.randn(call.drawn(like.shape)), like.shape)

    monkeypatch.setattr(samplers, "fresh_noise", drawn)
    torch.manual_seed(7)
    wanted = student.sample(noise, text, steps=steps)
    torch.testing.assert_close(case.from_pipeline(made, wanted.shape), wanted, atol=1e-4, rtol=1e-4)
    labels = [1000.0 - step for step in steps] if name == "mochi" else steps
    assert pipeline.scheduler.timesteps.tolist() == labels, "whatever number the pipeline is asked for"
    # Whoever trains on finds the noise schedule that the teacher had.
    again = case.open(out)
    t = torch.tensor([20.0, 500.0, 999.0])
    for mine, theirs in zip(again.schedule.coefficients(t), student.schedule.coefficients(t), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    assert again.schedule.prediction == student.schedule.prediction
    # Here a number of steps means the student's own, and no other.
    few = []
    for kind in (steps, len(steps)):
        torch.manual_seed(7)
        few.append(again.sample(noise, text, kind))
    assert torch.equal(*few)
    with pytest.raises(UsageError, match=f"50 steps of .* a student that was distilled to {len(steps)}"):
        again.sample(noise, text, 50)


def test_a_reopened_student_keeps_the_family_s_shift(tiny_checkpoint: Callable[[str], Path], tmp_path: Path):
    """Training draws its times by it; the shift in the scheduler's own place was solved for the student's steps."""
    teacher = CASES["wan"].open(tiny_checkpoint("wan"))
    again = load(str(export_pipeline(teacher, str(tmp_path / "student"), [1000.0, 757.0, 522.0])), max_text_length=32)
    assert again.checkpoint.class_of("scheduler") == "FlowMatchEulerDiscreteScheduler"
    assert again.schedule.shift == teacher.schedule.shift == 3.0
    noise, text = CASES["wan"].noise(again), again.encode_text(["a dog"])
    few = [again.sample(noise, text, kind, generator=keyed_generator(3)) for kind in ([1000.0, 757.0, 522.0], 3)]
    assert torch.equal(*few)


def test_more_steps_than_a_student_has_are_refused_before_training(
    command: Command, tiny_options: Callable[[str], list[str]], tiny_checkpoint: Callable[[str], Path]
):
    export_pipeline(CASES["wan"].open(tiny_checkpoint("wan")), "student", [1000.0, 757.0])
    more = ["--model.backbone.path=student", "--model.sampling.steps=50", "--trainer.logger=false"]
    more += ["--trainer.callbacks=[{class_path: Samples, init_args: {prompts: [a dog], every: 1}}]"]
    result = command("fit", *tiny_options("wan"), *more)
    assert result.code == 2
    assert "50 steps of student, a student that was distilled to 2" in result.message
