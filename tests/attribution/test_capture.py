"""Vectors are each clip's own, whoever computes them: one process, two ranks, sharded, in batches, in any order."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.backbones import small_call
from support.distilling import distillation, prompts
from support.jobs import LatentClips, finetuning, latents_for, trainer
from support.ranks import run_ranks
from support.strategies import strategy
from torch.utils.data import Subset

from callbacks import GradientCapture
from lightning_modules import MotionCustomization
from muybridge.attribution import CountSketchProjection, per_sample_gradients
from muybridge.attribution.projection import FastfoodProjection
from muybridge.attribution.store import InfluenceStore
from muybridge.backbones import Pretrained
from muybridge.backbones.adapters import LoRA
from muybridge.cli.jobs import Trainer
from muybridge.cli.verbs.attribute import attribute
from muybridge.customization.tau import Tau
from muybridge.diffusion import Boundary, DenoisingStep, shared_noise
from muybridge.diffusion.steps import denoising_step
from muybridge.errors import UsageError
from muybridge.losses import Denoising, MotionWeightedDenoising
from muybridge.tiny import MAKERS

Tiny = Callable[[str], Path]
assert MAKERS
Trainer.attribute = attribute  # type: ignore[attr-defined]


def capture_of(out: Path | str, **options: Any) -> GradientCapture:
    return GradientCapture(
        **{
            "out": str(out),
            "loss": MotionWeightedDenoising("ones"),
            "projection": FastfoodProjection(256),
            "times": [Boundary(300.0), Boundary(700.0)],
            **options,
        }
    )


def go(
    path: str, out: str, kind: str = "one", data: dict[str, Any] | None = None, job: Any = None, **options: Any
) -> Any:
    """`muybridge attribute` without its command line."""
    module = finetuning(path, **(job or {}))
    run(module, latents_for(module, **{"count": 5, "batch_size": 1, **(data or {})}), out, kind, **options)
    return sum(p.grad is not None for p in module.parameters())


def run(module: Any, clips: Any, out: str, kind: str = "one", **options: Any) -> None:
    """The same of any job, on any data."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    clips.setup("fit")
    quiet = dict(accelerator="cpu", devices=world, logger=False, enable_progress_bar=False, enable_model_summary=False)
    runner = Trainer(
        strategy=strategy(kind),
        inference_mode=False,
        callbacks=[capture_of(out, **options)],
        default_root_dir=out,
        **quiet,  # type: ignore[arg-type]
    )
    runner.attribute(module, clips)  # type: ignore[attr-defined]


def vectors(out: Path | str, part: Any = "train") -> dict[tuple[str, float], np.ndarray]:
    store = InfluenceStore(out)
    return {(n, k[1]): v for b in store.blocks(part) for n, k, v in zip(b.ids, b.keys, b.vectors, strict=True)}


def same(found: dict[Any, np.ndarray], wanted: dict[Any, np.ndarray], tolerance: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name, vector in wanted.items():
        assert np.linalg.norm(found[name] - vector) <= tolerance * np.linalg.norm(vector), name


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one clip at a time."""
    out = tmp_path_factory.mktemp("reference") / "store"
    assert go(str(tiny_checkpoint("wan")), str(out)) == 0
    return out


def test_vectors_are_projections_of_autograds_gradients(reference: Path, tiny_checkpoint: Tiny) -> None:
    found = vectors(reference)
    assert len(found) == 10
    assert len(vectors(reference, "query")) == 8
    module = finetuning(tiny_checkpoint("wan"))
    backbone = module.backbone.materialize()
    backbone.networks.requires_grad_(True)
    data = latents_for(module, count=5)
    for index, t in ((1, 300.0), (4, 700.0)):
        clip = data.train_dataset()[index]
        assert clip.latents is not None
        noise = shared_noise(tuple(clip.latents.shape[1:]), 0)[None]
        text = module.text(clip, backbone)

        step_of = functools.partial(
            denoising_step, backbone, backbone.schedule, clip.latents, noise, torch.tensor([t]), text
        )

        def forward(step_of: Any = step_of, frames: int = clip.latents.shape[2]) -> torch.Tensor:
            step = step_of()
            return (step.prediction - step.target).square().flatten(1).mean(1) / frames

        gradients = per_sample_gradients(backbone.networks, forward)
        wanted = FastfoodProjection(256).project({n: g[0] for n, g in gradients.items()})
        assert np.allclose(found[clip.ids[0], t], wanted.numpy(), rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    # The same loss of other clips, or at another time, has other gradients: they are not all alike.
    stacked = np.stack(list(found.values()))
    assert np.linalg.matrix_rank(stacked / np.linalg.norm(stacked, axis=1, keepdims=True), tol=1e-3) == 10


class Reversed(LatentClips):
    """The same clips, the last one first."""

    def train_dataset(self) -> Any:
        return Subset(super().train_dataset(), range(self.count)[::-1])


@pytest.mark.parametrize("engine", ["parameter", "batched", "sharded"])
def test_batches_and_order_change_nothing(engine: Any, reference: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Eight clips at once, those of the reference in other slots and beside others."""
    module, wanted = finetuning(tiny_checkpoint("wan")), vectors(reference)
    clips = Reversed(latents_for(module).shape, count=8, batch_size=8)
    run(module, clips, str(tmp_path / "s"), engine=engine)
    found = vectors(tmp_path / "s")
    assert len(found) == 16
    same({key: found[key] for key in wanted}, wanted)
    same(vectors(tmp_path / "s", "query"), vectors(reference, "query"))


class Mixing(MotionWeightedDenoising):
    """A loss in which clips of a batch know of one another, as in a network that folds them into the wrong axis."""

    def forward(self, step: DenoisingStep) -> torch.Tensor:
        value = super().forward(step)
        return value.sum().expand(len(value))


def test_a_batch_in_which_clips_mix_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"in a batch, Wan gives a clip's gradient \d+% off what it is alone.*\n.*\n.*parameter"
    ):
        go(
            str(tiny_checkpoint("wan")),
            str(tmp_path / "s"),
            data={"count": 2, "batch_size": 2},
            engine="batched",
            loss=Mixing("ones"),
            times=[Boundary(300.0)],
        )
    assert not InfluenceStore(tmp_path / "s").files, "nothing wrong is stored"


def test_without_captions_all_clips_have_the_empty_one(reference: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path, options = str(tiny_checkpoint("wan")), {"data": {"count": 2}, "times": [Boundary(300.0)]}
    go(path, str(tmp_path / "without"), captions=False, **options)
    go(path, str(tmp_path / "empty"), **{**options, "data": {"count": 2, "prompt": ""}})
    found = vectors(tmp_path / "without")
    same(found, vectors(tmp_path / "empty"))
    assert all(not np.allclose(v, vectors(reference)[k], rtol=0.01) for k, v in found.items()), "captions tell"
    with pytest.raises(UsageError, match="captions is False there and None here"):
        go(path, str(tmp_path / "without"), **options)


class CountSends:
    """Counts the numbers that FSDP2 gathers and reduces."""

    def __init__(self) -> None:
        self.gathered = self.reduced = 0
        # What FSDP2 calls, in this and in earlier versions of torch.
        for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name), name.startswith("reduce")))

    def _counting(self, real: Any, reduces: bool) -> Any:
        def call(output: torch.Tensor, given: torch.Tensor, *rest: Any, **options: Any) -> Any:
            if reduces:
                self.reduced += given.numel()
            else:
                self.gathered += output.numel()
            return real(output, given, *rest, **options)

        def named(*arguments: Any, **options: Any) -> Any:
            pair = [options.pop(n) for n in ("output", "input", "output_tensor", "input_tensor") if n in options]
            return call(*arguments, *pair, **options)

        return named


def on_ranks(path: str, out: str, kind: str, options: dict[str, Any]) -> int:
    counter = CountSends()
    go(path, out, kind, **options)
    return counter.reduced


def sent_by_a_step_and_a_clip(path: str) -> tuple[int, int, int, int]:
    from torch.distributed.device_mesh import init_device_mesh

    from muybridge import backbones
    from muybridge.attribution.per_sample import ParameterEngine
    from muybridge.backbones.sharding import shard

    dist.init_process_group("gloo")
    backbone = backbones.load(path)
    backbone.networks.requires_grad_(True)
    shard(backbone, init_device_mesh("cpu", (2,)))
    call = small_call(backbone, 1)

    def losses() -> torch.Tensor:
        return backbone(*call).square().flatten(1).mean(1)

    counter = CountSends()
    losses().sum().backward()
    step = (counter.gathered, counter.reduced)
    for parameter in backbone.parameters():
        parameter.grad = None
    engine = ParameterEngine(backbone.networks)
    counter.gathered = counter.reduced = 0
    largest = 0

    def sink(name: str, gradient: torch.Tensor, start: int) -> None:
        nonlocal largest
        assert gradient.numel() == engine.sizes[name]
        # Nothing else is held: what is gathered of a gradient is one parameter's.
        largest = max(largest, sum(p.grad is not None for p in backbone.parameters()))

    engine.run(losses, sink)
    assert largest == 0
    return (*step, counter.gathered, counter.reduced)


def test_a_clip_sends_no_more_than_a_training_step(tiny_checkpoint: Tiny) -> None:
    for gathered, reduced, clip_gathered, clip_reduced in run_ranks(
        sent_by_a_step_and_a_clip, str(tiny_checkpoint("wan"))
    ):
        assert gathered > 0
        assert reduced > 0
        assert clip_gathered <= gathered
        assert clip_reduced == 0


@pytest.mark.parametrize(
    ("kind", "options", "sends"),
    [
        ("ddp", {"data": {"batch_size": 2}}, False),
        ("file", {}, False),
        ("file", {"engine": "sharded"}, True),
    ],
    ids=["ddp", "fsdp2", "one clip over two shards"],
)
def test_two_ranks_give_the_vectors_of_one(
    kind: str, options: Any, sends: bool, reference: Path, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    begun = kind == "file" and not sends
    if begun:
        # A pass that was stopped in one process goes on in two.
        go(str(tiny_checkpoint("wan")), str(tmp_path / "s"), data={"count": 2})
        before = {p.name: p.read_bytes() for p in InfluenceStore(tmp_path / "s").files}
    counts = run_ranks(on_ranks, str(tiny_checkpoint("wan")), str(tmp_path / "s"), kind, options)
    assert all((count > 0) is sends for count in counts), "nothing is reduced where every rank keeps its own"
    for part in ("train", "query"):
        same(vectors(tmp_path / "s", part), vectors(reference, part))
    if begun:
        assert all((tmp_path / "s" / name).read_bytes() == content for name, content in before.items())
    # The digest of the weights is the same too, however they are sharded.
    assert InfluenceStore(tmp_path / "s").manifest == InfluenceStore(reference).manifest
    files = {p.name[:10] for p in InfluenceStore(tmp_path / "s").files}
    assert files == ({"part-00000"} if sends else {"part-00000", "part-00001"})


def test_every_job_is_attributed_to_by_what_it_trains(reference: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A customization's adapter, a distillation's student: a copy of its teacher, or an adapter on it."""
    path = str(tiny_checkpoint("wan"))
    lora = LoRA(rank=2)
    shapes = finetuning(path)
    jobs = {
        "customized": MotionCustomization(
            Pretrained(path, max_text_length=16), [Denoising()], tau=Tau(600.0), captions="free", adapter=lora
        ),
        "student": distillation(path),
        "on one base": distillation(path, student_lora=lora, critic_lora=lora),
    }
    for name, module in jobs.items():
        clips = latents_for(shapes, count=2, batch_size=1)
        run(module, clips, str(tmp_path / name), **({"times": [Boundary(700.0)]} if name == "customized" else {}))
    # A student that begins as its teacher has the gradients that finetuning the teacher has.
    wanted = vectors(reference)
    found = vectors(tmp_path / "student")
    same(found, {key: wanted[key] for key in found})
    assert len(found) == 4
    stores = {name: InfluenceStore(tmp_path / name) for name in jobs}
    assert all(len(store.ids("train")) == 2 and not store.excluded("train") for store in stores.values())
    # Below its boundary a customization's adapter does not act.
    with pytest.raises(UsageError, match=r"does not depend on .* that is trained.*\n.*\n.*inside it alone"):
        run(jobs["customized"], latents_for(shapes, count=1, batch_size=1), str(tmp_path / "below"))
    counts = {name: store.manifest["parameters"]["count"] for name, store in stores.items()}
    assert counts["customized"] < counts["student"]
    # On shared weights the student's adapter is attributed to, and not the critic's beside it.
    own = jobs["on one base"].trained("student").values()
    assert counts["on one base"] == sum(p.numel() for p in own) < counts["student"]
    # Prompts are no clips.
    texts = prompts(2)
    with pytest.raises(UsageError, match="latents"):
        run(jobs["student"], texts, str(tmp_path / "none"))


def test_another_model_is_refused(reference: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"loss is .* there and"):
        go(str(tiny_checkpoint("wan")), str(reference), loss=MotionWeightedDenoising("ones", per_frame=False))
    with pytest.raises(UsageError, match="projection is"):
        go(str(tiny_checkpoint("wan")), str(reference), projection=CountSketchProjection(256))
    with pytest.raises(UsageError, match="without motion weights"):
        go(str(tiny_checkpoint("wan")), str(tmp_path / "s"), loss=MotionWeightedDenoising())
    with pytest.raises(UsageError, match="matches none of"):
        go(str(tiny_checkpoint("wan")), str(tmp_path / "t"), parameters="nothing")


# -- during fit ----------------------------------------------------------------------------------------------------------------


def train(path: str, root: str, captured: bool, kind: str = "one", job: Any = None) -> dict[str, torch.Tensor]:
    world = int(os.environ.get("WORLD_SIZE", 1))
    module = finetuning(path, **(job or {}))
    clips = latents_for(module, count=4, batch_size=2 // world)
    capture = capture_of(f"{root}/store", at=[0], every=2, times=[Boundary(500.0)])
    runner = trainer(
        root,
        max_steps=3,
        devices=world,
        strategy=strategy(kind),
        limit_val_batches=0,
        callbacks=[capture] if captured else [],
    )
    runner.fit(module, clips)
    from muybridge.backbones.sharding import full, reshard

    reshard(module)
    return {n: full(p).detach().clone() for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["one", "ddp", "file"])
def test_a_pass_during_training_sees_the_weights_of_its_step_and_changes_no_training(
    kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    job = {"adapter": None, "trainable": r"transformer\..*attn1.*"}
    plain = train(path, str(tmp_path / "plain"), False, job=job)
    if kind == "one":
        (watched,) = [train(path, str(tmp_path / "run"), True, job=job)]
    else:
        watched = run_ranks(train, path, str(tmp_path / "run"), True, kind, job)[0]
    for name, weight in plain.items():
        torch.testing.assert_close(watched[name], weight, rtol=1e-4, atol=1e-6)
    store = InfluenceStore(tmp_path / "run" / "store")
    assert store.keys("train") == [(0, 500.0), (2, 500.0)]
    assert len(store.ids("train")) == 4
    rows = {(n, k[0]): v for b in store.blocks("train") for n, k, v in zip(b.ids, b.keys, b.vectors, strict=True)}
    assert all(np.linalg.norm(rows[n, 0] - rows[n, 2]) > 1e-3 * np.linalg.norm(rows[n, 0]) for n in store.ids("train"))


def test_another_training_run_does_not_mix_its_gradients_with_those_of_the_first(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    job = {"adapter": None, "trainable": r"transformer\..*attn1.*"}
    train(path, str(tmp_path), True, job=job)
    before = [file.name for file in InfluenceStore(tmp_path / "store").files]
    train(path, str(tmp_path), True, job=job)
    assert [file.name for file in InfluenceStore(tmp_path / "store").files] == before, "the same run adds nothing"
    # Another order of the samples' noises gives other weights at update 2, where there are rows; those of update 0 are the same.
    with pytest.raises(UsageError, match=r"gradients of update 2 under other weights.*\n.*\n.*remove part-") as refused:
        train(path, str(tmp_path), True, job={**job, "seed": 1})
    named = str(refused.value)
    assert 0 < sum(name in named for name in before) < len(before)
    for name in before:
        if name in named:
            (tmp_path / "store" / name).unlink()
    train(path, str(tmp_path), True, job={**job, "seed": 1})
    assert InfluenceStore(tmp_path / "store").keys("train") == [(0, 500.0), (2, 500.0)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_distillations_student_is_followed_through_its_training(
    shared: bool, reference: Path, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    """Its updates, not the critic's, and its weights as they are then."""
    path, lora = str(tiny_checkpoint("wan")), LoRA(rank=2)
    clips = latents_for(finetuning(path), count=2, batch_size=1)
    options = {"times": [Boundary(300.0)]}

    def fit(*callbacks: Any) -> Any:
        job = distillation(path, **({"student_lora": lora, "critic_lora": lora} if shared else {}))
        runner = trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=list(callbacks))
        runner.fit(job, clips)
        return job

    watched = fit(capture_of(tmp_path / "fit", at=[0], every=2, **options))
    assert (watched.updates, watched.iterations) == (2, 3)
    plain = fit().trained("student")
    for name, weight in watched.trained("student").items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-7)
    store = InfluenceStore(tmp_path / "fit")
    assert store.keys("train") == [(0, 300.0), (2, 300.0)]
    rows = {(n, k[0]): v for b in store.blocks("train") for n, k, v in zip(b.ids, b.keys, b.vectors, strict=True)}
    # What the trained student gives afterwards, and what its own weights give, by autograd and with no critic near.
    run(watched, clips, str(tmp_path / "after"), **options)
    same({(n, 300.0): v for (n, step), v in rows.items() if step == 2}, vectors(tmp_path / "after"))
    if shared:
        return
    same(
        {(n, 300.0): v for (n, step), v in rows.items() if step == 0},
        {k: v for k, v in vectors(reference).items() if k in vectors(tmp_path / "after")},
    )
    alone = finetuning(path)
    alone.backbone.materialize().networks.load_state_dict(watched.student.networks.state_dict())
    run(alone, clips, str(tmp_path / "alone"), **options)
    same(vectors(tmp_path / "alone"), vectors(tmp_path / "after"))


def distil(path: str, root: str, kind: str, shared: bool) -> None:
    """A distillation whose student is followed, on global batches of two."""
    world, lora = int(os.environ.get("WORLD_SIZE", 1)), LoRA(rank=2)
    job = distillation(path, **({"student_lora": lora, "critic_lora": lora} if shared else {}))
    clips = latents_for(finetuning(path), count=4, batch_size=2 // world)
    capture = capture_of(f"{root}/store", at=[0], every=2, times=[Boundary(300.0)])
    trainer(root, devices=world, strategy=strategy(kind), max_steps=3, limit_val_batches=0, callbacks=[capture]).fit(
        job, clips
    )


@pytest.mark.parametrize("shared", [False, True], ids=["copies", "adapters"])
def test_a_students_gradients_over_two_shards_are_those_of_one_process(
    shared: bool, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    path = str(tiny_checkpoint("wan"))
    distil(path, str(tmp_path / "one"), "one", shared)
    run_ranks(distil, path, str(tmp_path / "two"), "file", shared)
    one, two = (InfluenceStore(tmp_path / name / "store") for name in ("one", "two"))
    assert two.keys("train") == one.keys("train") == [(0, 300.0), (2, 300.0)]
    found, wanted = (
        {(n, k): v for b in s.blocks("train") for n, k, v in zip(b.ids, b.keys, b.vectors, strict=True)}
        for s in (two, one)
    )
    assert len(wanted) == 8
    same(found, wanted, 1e-3)


class Broken(MotionWeightedDenoising):
    """Not a number for one clip, and no gradient for another."""

    def forward(self, step: DenoisingStep) -> torch.Tensor:
        value = super().forward(step)
        kind = int(abs(float(step.clean[0, 0, 0, 0, 0])) * 1e4) % 3
        return value * (float("nan") if kind == 0 else 0.0 if kind == 1 else 1.0)


def test_clips_without_a_usable_gradient_are_counted(tiny_checkpoint: Tiny, tmp_path: Path, capsys: Any) -> None:
    go(
        str(tiny_checkpoint("wan")),
        str(tmp_path / "s"),
        loss=Broken("ones"),
        times=[Boundary(500.0)],
        data={"count": 12},
    )
    store = InfluenceStore(tmp_path / "s")
    states = set(store.excluded("train").values())
    assert states == {"zero", "not finite"}
    assert len(store.excluded("train")) + len(store.ids("train")) == 12
    assert "not finite" in capsys.readouterr().out
