"""A picture brought to a clip's size: nothing stretched, nothing off centre."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.clips import number, numbered

from muybridge.data.framing import apply, decode_size, place

SOURCES = [(48, 64), (480, 854), (1080, 1920), (1920, 1080), (37, 51), (720, 720), (16, 300)]
TARGETS = [(48, 64), (480, 832), (832, 480), (256, 256), (32, 16)]


def test_crop_covers_and_loses_at_two_sides_only() -> None:
    for source, size in itertools.product(SOURCES, TARGETS):
        p = place(source, size, "crop")
        assert p.scaled[0] >= size[0]
        assert p.scaled[1] >= size[1]
        assert p.scaled[0] == size[0] or p.scaled[1] == size[1]
        left, right, top, bottom = p.source
        assert (bottom - top, right - left) == size
        # In the middle, to a pixel.
        assert abs(left - (p.scaled[1] - right)) <= 1
        assert abs(top - (p.scaled[0] - bottom)) <= 1
        assert p.target == (0, 0)


def test_letterbox_fits_and_pads_at_two_sides_only() -> None:
    for source, size in itertools.product(SOURCES, TARGETS):
        p = place(source, size, "letterbox")
        assert p.scaled[0] <= size[0]
        assert p.scaled[1] <= size[1]
        assert p.scaled[0] == size[0] or p.scaled[1] == size[1]
        assert p.source == (0, p.scaled[1], 0, p.scaled[0])
        assert abs(2 * p.target[0] + p.scaled[0] - size[0]) <= 1
        assert abs(2 * p.target[1] + p.scaled[1] - size[1]) <= 1


@pytest.mark.parametrize("framing", ["crop", "letterbox"])
def test_both_sides_are_scaled_alike_up_to_whole_pixels(framing: str) -> None:
    for source, size in itertools.product(SOURCES, TARGETS):
        p = place(source, size, framing)  # type: ignore[arg-type]
        scale = (max if framing == "crop" else min)(size[0] / source[0], size[1] / source[1])
        assert abs(p.scaled[0] - source[0] * scale) <= 1
        assert abs(p.scaled[1] - source[1] * scale) <= 1


def test_a_part_of_the_picture_is_all_that_is_seen() -> None:
    frames = np.full((2, 90, 120, 3), 255, np.uint8)
    frames[:, 20:68, 30:94] = numbered(2)
    region = (30, 94, 20, 68)
    exact = place((90, 120), (48, 64), "crop", region)
    assert exact.scaled == (90, 120)
    assert (apply(frames, exact) == numbered(2)).all()
    half = apply(frames, place((90, 120), (24, 32), "crop", region))
    assert [number(f) for f in half] == [0, 1]
    boxed = place((90, 120), (96, 256), "letterbox", region)
    assert boxed.target == (0, 64)
    assert [number(f[:, 64:192]) for f in apply(frames, boxed)] == [0, 1]
    for source, size in itertools.product(SOURCES, TARGETS):
        h, w = source
        p = place(source, size, "crop", (w // 4, w - w // 8, h // 8, h - h // 4))
        left, right, top, bottom = p.source
        assert 0 <= left < right <= p.scaled[1]
        assert 0 <= top < bottom <= p.scaled[0]
        assert (bottom - top, right - left) == size


def test_the_decoder_shrinks_and_never_enlarges() -> None:
    assert decode_size((1080, 1920), place((1080, 1920), (480, 832))) == (480, 854)
    assert decode_size((240, 320), place((240, 320), (480, 832))) == (240, 320)
    assert decode_size((1080, 1920), place((1080, 1920), (480, 832), "letterbox")) == (468, 832)


def test_frames_keep_their_content() -> None:
    frames = numbered(12)
    same = place((48, 64), (48, 64))
    assert (apply(frames, same) == frames).all()
    for size, framing in (((96, 128), "crop"), ((24, 32), "crop"), ((24, 32), "letterbox")):
        out = apply(frames, place((48, 64), size, framing))  # type: ignore[arg-type]
        assert out.shape == (12, *size, 3)
        assert [number(f) for f in out] == list(range(12))
    boxed = apply(frames, place((48, 64), (48, 96), "letterbox"))
    assert not boxed[:, :, :16].any()
    assert not boxed[:, :, 80:].any()
    assert (boxed[:, :, 16:80] == frames).all()
    # What was decoded at its final size already is only cut.
    cropped = place((48, 64), (24, 24))
    decoded = apply(frames, place((48, 64), cropped.scaled))
    assert (apply(decoded, cropped) == apply(frames, cropped)).all()
