"""The harness itself: what the other distributed tests rely on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks


def total(value: float) -> tuple[int, float]:
    dist.init_process_group("gloo")
    x = torch.tensor(value * (1 + dist.get_rank()))
    dist.all_reduce(x)
    return dist.get_rank(), float(x)


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count)


def one_raises() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("on purpose")
    time.sleep(30)


def one_dies() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(30)


def one_hangs() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def test_ranks_talk_and_answer_in_order() -> None:
    assert run_ranks(total, 2.0) == [(0, 6.0), (1, 6.0)]


def test_tensors_outlive_their_rank() -> None:
    [only] = run_ranks(numbers, 5, world=1)
    assert torch.equal(only, torch.arange(5))


def test_a_rank_that_raises_shows_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*on purpose"):
        run_ranks(one_raises)


def test_a_rank_that_dies_fails_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 died with exit code 3"):
        run_ranks(one_dies)
    assert time.monotonic() - start < 20


def test_a_rank_that_hangs_fails_after_the_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_ranks(one_hangs, timeout=3.0)
