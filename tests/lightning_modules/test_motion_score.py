"""Equations 15, 16 and 17 on a real network: what it is given, what it is asked for, and what is made of its answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import SHAPES, latents_for, sgd, trainer
from torch import Tensor

from lightning_modules import Mixing, MotionScore, Rating, Sampling, Windows
from muybridge.backbones import Pretrained
from muybridge.backbones.motion_model import MotionModel
from muybridge.batch import Batch
from muybridge.diffusion import keyed_generator, keyed_noise
from muybridge.diffusion.differences import Differences
from muybridge.diffusion.likelihood import log_likelihood
from muybridge.diffusion.ode import ode_path, ode_times
from muybridge.errors import UsageError
from muybridge.losses import Denoising
from muybridge.metrics import MotionLikelihood, motion_likelihood

Tiny = Callable[[str], Path]
KINDS = {
    "15": Differences(context=0, scale=2.0),
    "16": Differences(context=1),
    "17": Differences(context=2, scale=3.0),
}


@pytest.fixture(scope="module")
def wan(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("wan")


def job(path: Path, name: str = "wan", clip: tuple[int, int, int] | None = None, **settings: Any) -> MotionScore:
    frames, height, width = clip or SHAPES[name]
    return MotionScore(
        **{
            "backbone": Pretrained(str(path), max_text_length=16 if name == "wan" else None),
            "losses": [Denoising()],
            "optimizer": sgd,
            "caption_dropout": 0.0,
            "sampling": Sampling(steps=3, guidance=1.0, frames=frames, height=height, width=width, fps=8),
            **settings,
        }
    )


def opened(path: Path, **settings: Any) -> MotionScore:
    module = job(path, **settings)
    module.configure_model()
    return module


def batch_of(shape: tuple[int, ...], count: int = 2) -> Batch:
    latents = torch.stack([keyed_noise(shape, 0, f"clip-{i}") for i in range(count)])
    return Batch(ids=[f"clip-{i}" for i in range(count)], latents=latents, prompts=["a dog", "a cat"][:count])


# -- one step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_given_clean_frames_and_noisy_differences(kind: str, wan: Path) -> None:
    module = opened(wan, clip=(17, 16, 16), differences=KINDS[kind])
    m, k = KINDS[kind], KINDS[kind].context
    batch = batch_of((16, 5, 2, 2))
    clean = module.clean_latents(batch, module.backbone)
    noise, t = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([300.0, 700.0])
    text = module.text(batch, module.backbone)
    given: list[tuple[Tensor, Tensor]] = []
    module.backbone.register_forward_pre_hook(lambda _, args: given.append(args[:2]))
    step = module.noised_forward(clean, noise, t, text, batch)
    [(sequence, times)] = given
    assert torch.equal(sequence[:, :, :k], clean[:, :, :k])
    assert torch.equal(sequence[:, :, k:], step.noisy)
    if k:
        assert bool((times[:, :k] == 0).all())
        assert bool((times[:, k:] == t[:, None]).all())
    else:
        assert torch.equal(times, t)
    # What is noised is the difference of frames; its noise is that of noisy frames.
    wanted = clean.diff(dim=2)[:, :, max(k - 1, 0) :] * m.scale
    assert torch.allclose(step.clean, wanted, rtol=0, atol=1e-6)
    frames_noise = noise.clone()
    frames_noise[:, :, :k] = 0.0
    assert torch.allclose(step.noise, frames_noise.diff(dim=2)[:, :, max(k - 1, 0) :] * m.scale, rtol=0, atol=1e-6)
    assert torch.equal(step.target, step.noise - step.clean)
    assert step.prediction.shape == step.clean.shape


def test_the_given_frames_change_what_is_said(wan: Path) -> None:
    module = opened(wan, clip=(17, 16, 16), differences=Differences(1))
    batch = batch_of((16, 5, 2, 2))
    text, z, t = module.text(batch, module.backbone), torch.randn(2, 16, 4, 2, 2), torch.full((2,), 500.0)
    with torch.no_grad():
        one, other = (module.model.denoise(z, t, text, c * torch.ones(2, 16, 1, 2, 2)) for c in (0.0, 1.0))
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match="2 given frames: expected 1"):
        module.model.denoise(z, t, text, torch.zeros(2, 16, 2, 2, 2))


@pytest.mark.parametrize(("name", "kind"), [("wan", "16"), ("cogvideox", "15")])
def test_every_family_trains_and_a_resumed_run_is_the_whole_one(
    name: str, kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    def fit(root: str, steps: int, ckpt_path: Any = None) -> dict[str, Tensor]:
        module = job(tiny_checkpoint(name), name, differences=KINDS[kind])
        runner = trainer(tmp_path / root, max_steps=steps, limit_val_batches=1)
        runner.fit(module, datamodule=latents_for(module, name, count=4), ckpt_path=ckpt_path)
        assert float(runner.callback_metrics["train/loss"]) > 0
        runner.save_checkpoint(tmp_path / root / f"{steps}.ckpt")
        return {n: p.detach().clone() for n, p in module.named_parameters()}

    whole = fit("whole", 3)
    fit("parts", 2)
    parts = fit("parts", 3, tmp_path / "parts" / "2.ckpt")
    assert all(torch.equal(parts[n], whole[n]) for n in whole)


def test_windows_are_drawn_over_the_clip_and_keyed(wan: Path, tmp_path: Path) -> None:
    module = job(wan, clip=(25, 16, 16), differences=Differences(2), window=2)
    seen: list[Tensor] = []
    real = module.noised_forward

    def watch(clean: Tensor, *rest: Any) -> Any:
        seen.append(clean)
        return real(clean, *rest)

    module.noised_forward = watch  # type: ignore[method-assign]
    runner = trainer(tmp_path, max_steps=12, limit_val_batches=0)
    data = latents_for(module, count=2)
    data.shape = (16, 7, 2, 2)
    runner.fit(module, datamodule=data)
    clips = [keyed_noise((16, 7, 2, 2), 0, f"clip-{i:03d}") for i in range(2)]
    starts = set()
    for clean in seen:
        assert clean.shape == (2, 16, 4, 2, 2)
        for part in clean:
            starts |= {s for s in range(4) for c in clips if torch.equal(c[:, s : s + 4], part)}
    assert starts == {0, 1, 2, 3}


# -- videos ------------------------------------------------------------------------------------------------------------


def test_no_weight_is_the_appearance_model_bit_for_bit_and_some_is_not(wan: Path) -> None:
    def latents(weight: float, form: str = "replace") -> Tensor:
        module = opened(
            wan, clip=(17, 16, 16), differences=KINDS["15"], appearance=Pretrained(str(wan), max_text_length=16),
            mixing=Mixing(weight, form),  # type: ignore[arg-type]
        )  # fmt: skip
        batch = Batch(ids=["a", "b"], prompts=["a dog", "a cat"])
        text = module.text(batch, module.backbone)
        made = module._appearance_clip(batch, module.sampling, text, None, module.mixing.weight)
        if weight == 0.0:
            assert module.appearance is not None
            plain = module.appearance.sample(module.noise_for(batch.ids, module.sampling), text, 3)
            assert torch.equal(made, plain)
        return made

    none, some, other = latents(0.0), latents(0.5), latents(0.5, "sum")
    assert bool(torch.isfinite(torch.stack([some, other])).all())
    assert not torch.allclose(some, none, atol=1e-4)
    assert not torch.allclose(other, some, atol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (2, None), (3, 1)])
def test_clips_go_on_from_given_frames_and_do_not_depend_on_their_batch(
    window: int | None, stride: int | None, wan: Path
) -> None:
    module = opened(
        wan, clip=(25, 16, 16), differences=Differences(1, scale=2.0), window=window, windows=Windows(stride)
    )
    batch = batch_of((16, 7, 2, 2))
    text = module.text(batch, module.backbone)
    with torch.no_grad():
        clip = module._continued(batch, module.sampling, text, None)
        alone = Batch(ids=batch.ids[1:], latents=batch.latents[1:], prompts=batch.prompts[1:])  # type: ignore[index]
        second = module._continued(alone, module.sampling, text[1], None)
    assert clip.shape == (2, 16, 7, 2, 2)
    assert torch.equal(clip[:, :, :1], batch.latents[:, :, :1])  # type: ignore[index]
    assert torch.allclose(second, clip[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("context", "window"), [(1, 6), (2, 2)])
def test_a_clip_goes_on_by_what_the_ode_says_of_the_frames_made_last(context: int, window: int, wan: Path) -> None:
    """Window by window, each from its own noise and the last frames; differences are summed up in the frames' own unit."""
    m = Differences(context, scale=2.0)
    count = 8 - context if window == 2 else 7 - context
    module = opened(wan, clip=(4 * (context + count) - 3, 16, 16), differences=m, window=window)
    batch = batch_of((16, context + count, 2, 2), count=1)
    text = module.text(batch, module.backbone)
    schedule = module.backbone.schedule
    with torch.no_grad():
        clip = module._continued(batch, module.sampling, text, None)
        made = batch.latents[:, :, :context]  # type: ignore[index]
        for number in range(count // window):
            noise = keyed_noise((16, window, 2, 2), module.sampling.seed, "window", number, "clip-0")[None]
            denoise = MotionModel(module.backbone, m).denoiser(text, made[:, :, -context:])
            # Noise of differences: that of each frame less that of the one before; the given frame has none.
            u = 2.0 * torch.cat([noise[:, :, :1], noise.diff(dim=2)], 2)
            *_, (_, said) = ode_path(denoise, u, schedule, ode_times(schedule, 3))
            made = torch.cat([made, m.restore(said, made[:, :, -1:])], 2)
    assert made.shape == clip.shape
    assert torch.allclose(clip, made, rtol=0, atol=1e-5)


def test_prompts_become_clips_through_the_appearance_models_first_frames(wan: Path) -> None:
    module = opened(wan, clip=(17, 16, 16), appearance=Pretrained(str(wan), max_text_length=16))
    pixels = module.make_videos(Batch(ids=["a"], prompts=["a dog"]), module.sampling)
    assert pixels.shape == (1, 3, 17, 16, 16)
    assert not any(p.requires_grad for p in module.appearance.parameters())  # type: ignore[union-attr]


# -- likelihood --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_clips_motion_is_rated_per_dimension_in_its_own_unit(kind: str, wan: Path) -> None:
    module, m = opened(wan, clip=(17, 16, 16), differences=KINDS[kind]), KINDS[kind]
    batch = batch_of((16, 5, 2, 2))
    text = module.text(batch, module.backbone)
    assert batch.latents is not None
    context = batch.latents[:, :, : m.context] if m.context else None
    u = m.apply(batch.latents[:, :, m.context :], None if context is None else context[:, :, -1:])
    generators = [keyed_generator(0, "likelihood", i) for i in batch.ids]
    nats = log_likelihood(
        MotionModel(module.backbone, m).denoiser(text, context), u, module.backbone.schedule, m.log_density_of_noise,
        4, 1, generators,
    )  # fmt: skip
    metric = MotionLikelihood(module.backbone, m, steps=4)
    metric.update(batch.latents, text, batch.ids)
    wanted = nats / u[0].numel() + torch.log(torch.tensor(m.scale))
    assert torch.allclose(metric.values, wanted, rtol=0, atol=1e-5)
    assert float(metric.compute()) == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert not metric.state_dict()
    alone = motion_likelihood(module.backbone, m, batch.latents[1:], text[1], batch.ids[1:], steps=4)
    assert torch.allclose(alone, wanted[1:], rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="one frame has no motion"):
        metric.update(batch.latents[:, :, : max(m.context, 1)], text, batch.ids)


def test_test_logs_the_rating_of_all_clips(wan: Path, tmp_path: Path) -> None:
    module = job(wan, rating=Rating(steps=3))
    data = latents_for(module)
    data.test_dataloader = data.val_dataloader  # type: ignore[method-assign]
    [found] = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    clips = torch.utils.data.default_collate([c.latents[0] for c in (data.train_dataset()[i] for i in range(4))])  # type: ignore[index]
    text = module.text(Batch(ids=list("abcd"), prompts=[f"a dog number {i % 3}" for i in range(4)]), module.backbone)
    ids = [f"clip-{i:03d}" for i in range(4)]
    wanted = motion_likelihood(module.backbone, module.differences, clips, text, ids, steps=3)
    assert found["test/motion_log_likelihood"] == pytest.approx(float(wanted.mean()), abs=1e-4)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("cogvideox", {"differences": Differences(1)}, "a family with per-frame times"),
        ("latte", {"differences": Differences(0)}, "positions for 4 alone"),
        ("wan", {"differences": Differences(3)}, "one frame has no motion"),
        ("wan", {"differences": Differences(1), "window": 5}, "at least 1 and at most 2"),
        ("wan", {"windows": Windows(stride=7)}, "a stride of 7"),
        ("wan", {"windows": Windows(weights=[1.0])}, "weights"),
        ("wan", {"sampling": Sampling([1000.0, 500.0], 1.0, "", 9, 16, 16)}, "a number of steps"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_load(
    name: str, settings: dict[str, Any], said: str, tiny_checkpoint: Tiny
) -> None:
    module = job(tiny_checkpoint(name), name, **settings)
    with pytest.raises(UsageError, match=said):
        module.check()
    assert not module.backbone.networks


def test_wrong_numbers_are_refused_at_once(wan: Path, tiny_checkpoint: Tiny) -> None:
    for wrong in (dict(weight=-1.0), dict(low=0.0), dict(high=1000.0), dict(low=500.0, high=400.0)):
        with pytest.raises(UsageError):
            Mixing(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1 of each"):
        Rating(steps=0)
    with pytest.raises(UsageError, match="one family"):
        job(wan, appearance=Pretrained(str(tiny_checkpoint("cogvideox"))))


def test_videos_without_a_frame_to_begin_with_are_refused(wan: Path) -> None:
    module = opened(wan)
    with pytest.raises(UsageError, match="no frame to begin with"):
        module.check_prompts(["a dog"], module.sampling)
    with pytest.raises(UsageError, match="give the job an appearance model"):
        module.make_videos(Batch(ids=["a"], prompts=["a dog"]), module.sampling)
