"""Every sample exactly once an epoch: for any ranks, any batch size, and across an interruption at any point."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from support.counting import SaveAt, count
from support.ranks import run_ranks

from datamodules.clips import ClipData, ClipDataset
from datamodules.sampling import ResumableSampler
from muybridge.data.buckets import Bucket
from muybridge.data.clips import Clip
from muybridge.errors import UsageError

# -- the sampler alone --------------------------------------------------------------------------------------------------


def steps(
    size: int, batch: int, ranks: int, epochs: int = 1, enter: tuple[int, int] = (0, 0), **options: Any
) -> list[list[int]]:
    """The global batch of each step, each rank's samples in turn."""
    found: list[list[int]] = []
    samplers = [ResumableSampler(size, batch, ranks, rank, **options) for rank in range(ranks)]
    for sampler in samplers:
        sampler.enter(*enter)
    for _ in range(epochs):
        rows = [list(sampler) for sampler in samplers]
        assert len({len(row) for row in rows}) == 1
        found += [[i for row in rows for i in row[k : k + batch]] for k in range(0, len(rows[0]), batch)]
    return found


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [24, 29, 31])
def test_the_global_batch_of_a_step_is_the_same_set_for_any_number_of_ranks(size: int, drop_last: bool) -> None:
    one = [sorted(step) for step in steps(size, 8, 1, epochs=2, drop_last=drop_last)]
    for batch, ranks in ((4, 2), (2, 4), (1, 8)):
        assert [sorted(step) for step in steps(size, batch, ranks, epochs=2, drop_last=drop_last)] == one


@pytest.mark.parametrize(("size", "batch", "ranks"), [(24, 2, 3), (25, 2, 3), (5, 1, 4), (1, 2, 4), (7, 7, 1)])
def test_an_epoch_holds_every_sample_once_and_marks_what_fills_its_last_batch(
    size: int, batch: int, ranks: int
) -> None:
    flat = [i for step in steps(size, batch, ranks) for i in step]
    extra = -size % (batch * ranks)
    assert len(flat) == size + extra
    assert sorted(i for i in flat if i >= 0) == list(range(size))
    assert all(0 <= ~i < size for i in flat if i < 0)
    assert ResumableSampler(size, batch, ranks).fills == extra


def test_dropping_leaves_out_less_than_one_global_batch_and_never_repeats() -> None:
    flat = [i for step in steps(29, 4, 2, drop_last=True) for i in step]
    assert len(flat) == len(set(flat)) == 24


def test_epochs_differ_and_are_functions_of_the_seed_and_the_epoch() -> None:
    first, second = steps(16, 16, 1, epochs=2)
    assert first != second
    assert steps(16, 16, 1, enter=(1, 0)) == [second]
    assert steps(16, 16, 1, seed=1) != [first]
    assert steps(16, 16, 1, shuffle=False) == [list(range(16))]


@pytest.mark.parametrize("offset", [0, 8, 12, 23, 24])
@pytest.mark.parametrize(("batch", "ranks"), [(1, 1), (2, 2), (1, 4)])
def test_entering_an_epoch_goes_on_with_exactly_what_is_left_whatever_read_the_start(
    offset: int, batch: int, ranks: int
) -> None:
    order = ResumableSampler(24).order(3)
    flat = [i for step in steps(24, batch, ranks, enter=(3, offset)) for i in step]
    assert sorted(i for i in flat if i >= 0) == sorted(order[offset:])
    assert len(flat) == -(-(24 - offset) // (batch * ranks)) * batch * ranks


def test_the_length_stays_that_of_a_whole_epoch() -> None:
    sampler = ResumableSampler(24, 2, 2, 1)
    sampler.enter(0, 12)
    assert len(sampler) == 12
    assert len(list(sampler)) == 6
    assert sampler.steps_before(12) == 3


def test_too_few_samples_to_drop_the_last_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="less than one global batch"):
        ResumableSampler(5, 2, 4, drop_last=True)


# -- in a Trainer -------------------------------------------------------------------------------------------------------

EPOCHS: dict[str, Any] = dict(max_epochs=2)
STEPS: dict[str, Any] = dict(max_steps=12, max_epochs=-1)


@pytest.mark.parametrize("limits", [EPOCHS, STEPS], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("hook", "step", "interval"),
    [
        ("batch", 1, None),
        ("batch", 3, None),
        ("batch", 8, None),
        ("batch", 11, None),
        ("validation", 4, 4),
        ("validation", 8, None),
        ("epoch", 8, None),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    hook: str, step: int, interval: Any, limits: dict[str, Any], tmp_path: Path
) -> None:
    data = dict(size=24, batch_size=3, validation=hook != "epoch" or interval is not None)
    trainer = {**limits, "val_check_interval": interval}
    save = SaveAt(hook, step, str(tmp_path / "c.ckpt"))
    whole = count(data, trainer, [save])
    assert save.saved_after == step
    resumed = count(data, trainer, ckpt_path=save.path)
    assert resumed.seen == whole.seen[step:]
    # Lightning skips the validation due right after the step a checkpoint was written at, and no other.
    assert [step + n for n in resumed.validated] == [n for n in whole.validated if n > step]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_ahead_but_the_place_is_what_was_trained_on(workers: int, tmp_path: Path) -> None:
    save = SaveAt("batch", 3, str(tmp_path / "c.ckpt"))
    whole = count(dict(size=22, batch_size=2, num_workers=workers), EPOCHS, [save])
    resumed = count(dict(size=22, batch_size=2, num_workers=2 - workers), EPOCHS, ckpt_path=save.path)
    assert resumed.seen == whole.seen[3:]
    assert len(whole.seen) == 22


def test_a_run_stopped_inside_an_epoch_and_given_more_steps_stays_in_that_epoch(tmp_path: Path) -> None:
    whole = count(dict(size=24, batch_size=3), STEPS)
    for hook in ("epoch", "end"):
        save = SaveAt(hook, 5, str(tmp_path / f"{hook}.ckpt"))
        count(dict(size=24, batch_size=3), {**STEPS, "max_steps": 5}, [save])
        assert count(dict(size=24, batch_size=3), STEPS, ckpt_path=save.path).seen == whole.seen[5:]


def test_accumulation_counts_batches_not_updates(tmp_path: Path) -> None:
    trainer = {**EPOCHS, "accumulate_grad_batches": 2}
    save = SaveAt("batch", 2, str(tmp_path / "c.ckpt"))
    whole = count(dict(size=24, batch_size=3), trainer, [save])
    # The hook fires at the first batch end that finds two updates done, which is that of batch 4.
    assert save.saved_after == 4
    assert count(dict(size=24, batch_size=3), trainer, ckpt_path=save.path).seen == whole.seen[4:]


def test_a_limited_epoch_ends_at_its_limit_before_and_after(tmp_path: Path) -> None:
    trainer = {**EPOCHS, "limit_train_batches": 5}
    for step in (3, 5):
        save = SaveAt("batch", step, str(tmp_path / f"{step}.ckpt"))
        whole = count(dict(size=24, batch_size=3), trainer, [save])
        assert len(whole.seen) == 10
        assert count(dict(size=24, batch_size=3), trainer, ckpt_path=save.path).seen == whole.seen[step:]


@pytest.mark.parametrize("hook", ["batch", "validation", "epoch"])
def test_a_checkpoint_at_an_epochs_end_is_left_behind_by_another_batch_size(hook: str, tmp_path: Path) -> None:
    save = SaveAt(hook, 8, str(tmp_path / "c.ckpt"))
    count(dict(size=24, batch_size=3, validation=hook != "epoch"), STEPS, [save])
    resumed = count(dict(size=24, batch_size=6), {**STEPS, "max_steps": 12}, ckpt_path=save.path)
    order = ResumableSampler(24).order(1)
    assert resumed.seen == [order[i : i + 6] for i in range(0, 24, 6)]


NAMES = [f"clip-{i}" for i in range(24)]


@pytest.mark.parametrize(
    ("then", "now", "step", "said"),
    [
        (NAMES, NAMES, 3, None),
        (NAMES, ["new", *NAMES], 3, "epoch of 24 samples and goes on with 25"),
        (NAMES, NAMES[1:], 3, "epoch of 24 samples and goes on with 23"),
        (NAMES, [*NAMES[1:], NAMES[0]], 3, "epoch of 24 samples and goes on with 24"),
        (None, NAMES, 3, None),
        (None, ["new", *NAMES], 3, "epoch of 24 samples and goes on with 25"),
        (NAMES, ["new", *NAMES], 8, None),
    ],
    ids=["same", "added", "removed", "order", "nameless", "nameless added", "at an epoch's end"],
)
def test_going_on_inside_an_epoch_with_other_samples_is_said_once(
    then: Any, now: list[str], step: int, said: Optional[str], tmp_path: Path
) -> None:
    save = SaveAt("batch", step, str(tmp_path / "c.ckpt"))
    count(dict(size=24, batch_size=3, ids=then), EPOCHS, [save])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = count(dict(size=len(now), batch_size=3, ids=now), EPOCHS, ckpt_path=save.path)
    warned = [str(w.message) for w in caught if "stopped inside an epoch" in str(w.message)]
    assert len(warned) == (said is not None)
    assert said is None or said in warned[0]
    last = resumed.seen[-math.ceil(len(now) / 3) :]
    assert sorted(i for step in last for i in step) == list(range(len(now))), "the next epoch has all"


def test_a_checkpoint_that_does_not_say_its_samples_is_gone_on_from(tmp_path: Path) -> None:
    save = SaveAt("batch", 3, str(tmp_path / "c.ckpt"))
    whole = count(dict(size=24, batch_size=3), EPOCHS, [save])
    state = torch.load(save.path, weights_only=True)
    assert state["Numbers"].pop("samples") == 24
    del state["Numbers"]["digest"]
    torch.save(state, save.path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this run stopped inside an epoch")
        assert count(dict(size=24, batch_size=3, ids=NAMES), EPOCHS, ckpt_path=save.path).seen == whole.seen[3:]


def test_clips_are_told_apart_by_their_buckets_where_these_decide_the_order() -> None:
    clips = [Clip(name, Path(name)) for name in "ab"]
    wide, tall = Bucket(9, 16, 32), Bucket(9, 32, 16)
    data = ClipData()

    def names(buckets: list[Bucket], bucket_of: list[Optional[int]], places: Optional[list[int]] = None) -> list[str]:
        data.buckets = buckets
        return list(data.sample_names(ClipDataset(clips, buckets, bucket_of, places)))

    assert names([wide], [0, None]) == ["a", "b"]
    assert names([wide], [0, 0], [1, 1, 0]) == ["b", "b", "a"]
    two = [names([wide, tall], each) for each in ([0, 0], [0, 1], [0, None])]
    assert len({tuple(each) for each in two}) == 3


def fit_on_ranks(
    data: dict[str, Any], trainer: dict[str, Any], path: str, save_at: int, ckpt_path: Any
) -> list[list[int]]:
    from lightning.pytorch.strategies import DDPStrategy

    callbacks = [SaveAt("batch", save_at, path)] if save_at else []
    return count(data, {**trainer, "strategy": DDPStrategy(process_group_backend="gloo")}, callbacks, ckpt_path).seen


def merged(ranks: list[list[list[int]]]) -> list[list[int]]:
    return [sorted(i for rank in step for i in rank) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_ranks_may_change_inside_an_epoch(workers: int, tmp_path: Path) -> None:
    """Two ranks for three steps of four, then one rank in steps of two, and the other way round."""
    data = dict(size=24, batch_size=2, num_workers=workers)
    epochs = [ResumableSampler(24).order(epoch) for epoch in range(2)]
    path = str(tmp_path / "two.ckpt")
    two = merged(run_ranks(fit_on_ranks, data, EPOCHS, path, 3, None))
    assert two == [sorted(order[i : i + 4]) for order in epochs for i in range(0, 24, 4)]
    one = count(data, EPOCHS, ckpt_path=path)
    assert one.seen == [epochs[0][i : i + 2] for i in range(12, 24, 2)] + [
        epochs[1][i : i + 2] for i in range(0, 24, 2)
    ]

    save = SaveAt("batch", 3, str(tmp_path / "one.ckpt"))
    count(data, EPOCHS, [save])
    again = merged(run_ranks(fit_on_ranks, data, EPOCHS, path, 0, save.path))
    # Six samples are done, and 18 are left: four whole steps, and one of two samples and two slots that count for nothing.
    left = epochs[0][6:]
    assert again == [sorted(left[i : i + 4]) for i in range(0, 20, 4)] + [
        sorted(epochs[1][i : i + 4]) for i in range(0, 24, 4)
    ]


# -- leaving ------------------------------------------------------------------------------------------------------------

HOLDS = """
import sys
from datamodules.sampling import LateLoader, ResumableSampler, outlive_notice

loader = LateLoader(range(100), sampler=ResumableSampler(100), num_workers=1, worker_init_fn=outlive_notice)
held = iter(loader)
next(held)
sys.exit(7)
"""


def test_a_process_that_still_holds_an_iterator_can_end() -> None:
    """Python sends a worker that is left at the end one SIGTERM, and waits; our workers live through one."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", HOLDS], env=env, timeout=60).returncode == 7
