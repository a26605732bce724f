"""Keyed draws are a function of the key, and of nothing else."""

from __future__ import annotations

import torch

from muybridge.diffusion import keyed_generator, keyed_noise


def test_the_same_key_gives_the_same_noise_whatever_was_drawn_before() -> None:
    first = keyed_noise((4, 3), 0, "step", 7, "clip-a")
    torch.manual_seed(123)
    torch.randn(1000)
    keyed_noise((2,), 0, "step", 8, "clip-a")
    assert torch.equal(keyed_noise((4, 3), 0, "step", 7, "clip-a"), first)


def test_drawing_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    keyed_noise((100,), 0, 1)
    assert torch.equal(torch.randn(3), expected)


def test_every_part_of_the_key_matters() -> None:
    keys = [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (0, 11, "a"), (0, 1, "1a"), (0, "a", 1)]
    noises = [keyed_noise((16,), *key) for key in keys]
    for i, a in enumerate(noises):
        for b in noises[i + 1 :]:
            assert not torch.equal(a, b)


def test_keys_are_stable_across_processes() -> None:
    """Python's own hash is salted; a resumed run must see what the first one saw."""
    assert keyed_generator(0, "x", 3).initial_seed() == 4441522724647640182


def test_many_keys_together_are_standard_normal() -> None:
    noise = torch.stack([keyed_noise((64,), 0, i) for i in range(400)]).double()
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var().item() - 1) < 4 * (2 / noise.numel()) ** 0.5
    between = noise[:-1] * noise[1:]
    assert abs(between.mean().item()) < 4 / between.numel() ** 0.5
