"""Scenes to pixels, and what is exactly true of them: flow, visibility, masks, tracks.

A part is drawn for all frames at once, inside the box that it can reach. Its places in the picture are carried into its own
coordinates, where shape and texture are defined; the same places carried on by the next frame's map are the flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np

from muybridge.proving_ground.appearance import REACH, brightness, distance
from muybridge.proving_ground.scene import Scene, Sprite
from muybridge.video import Frames


@dataclass(frozen=True)
class Truth:
    """What is true of a clip of T frames, in pixels.

    Args:
        flow: Where every pixel's middle goes until the next frame, (T-1, H, W, 2), x first.
        visible: Whether it is seen there: neither covered nor out of the picture, (T-1, H, W).
        mask: Whether a pixel is the sprite's, (T, H, W).
        tracks: Places of points of the sprite, (N, T, 2).
        track_visible: Whether they are seen, (N, T).
    """

    flow: np.ndarray
    visible: np.ndarray
    mask: np.ndarray
    tracks: np.ndarray
    track_visible: np.ndarray


@dataclass(frozen=True)
class _Box:
    """A part in its box: corners (T, 2), share of each pixel that it covers, brightness, and own coordinates, (T, h, w)."""

    corner: np.ndarray
    cover: np.ndarray
    light: np.ndarray
    own: tuple[np.ndarray, np.ndarray]


def render(scene: Scene) -> Frames:
    """The frames of a clip, (T, H, W, 3)."""
    return _draw(scene, False)[0]


def render_with_truth(scene: Scene, points: int = 64) -> tuple[Frames, Truth]:
    """The frames, and what is true of them.

    Args:
        scene: The clip.
        points: Number of tracks.
    """
    frames, truth = _draw(scene, True, points)
    assert truth is not None
    return frames, truth


def _draw(scene: Scene, with_truth: bool, points: int = 0) -> tuple[Frames, Optional[Truth]]:
    size, count = scene.size, scene.frames
    place = (np.arange(size) + 0.5) / size
    moving = bool(np.ptp(scene.camera, axis=0).any())
    seen = scene.camera if moving else scene.camera[:1]
    x = np.broadcast_to(place[None, None, :] - seen[:, 0, None, None], (len(seen), size, size))
    y = np.broadcast_to(place[None, :, None] - seen[:, 1, None, None], (len(seen), size, size))
    grey = np.broadcast_to(scene.ground(x, y, 1.0 / size), (count, size, size))
    boxes = [
        [_box(sprite, k, scene.camera, size) for k in range(len(sprite.trajectory.centre))] for sprite in scene.sprites
    ]
    pad = max(max(box.cover.shape[1:]) for row in boxes for box in row)
    picture = np.repeat(grey[..., None], 3, -1)
    owner = np.full((count, size + 2 * pad, size + 2 * pad), -1, np.int16)
    flow = np.zeros((count - 1, size + 2 * pad, size + 2 * pad, 2)) if with_truth else None
    if flow is not None:
        flow += (np.diff(scene.camera, axis=0) * size)[:, None, None]
    inner = (slice(None), slice(pad, pad + size), slice(pad, pad + size))
    number = 0
    for sprite, row in zip(scene.sprites, boxes, strict=True):
        cover = np.zeros((count, size + 2 * pad, size + 2 * pad))
        light = np.zeros_like(cover)
        for k, box in enumerate(row):
            target = _carried(sprite, k, scene.camera, size, box) if flow is not None else None
            height, width = box.cover.shape[1:]
            lit, solid = box.cover * box.light, box.cover > 0.5
            for t, (left, top) in enumerate(box.corner + pad):
                window = (t, slice(top, top + height), slice(left, left + width))
                cover[window] += box.cover[t]
                light[window] += lit[t]
                owner[window][solid[t]] = number
                if flow is not None and target is not None and t < count - 1:
                    flow[window][solid[t]] = target[t][solid[t]]
            number += 1
        cover, light = cover[inner], light[inner]
        # Neighbouring wedges share the pixels of their seam, so covers are added; where they overlap, they hide one another.
        over = np.maximum(cover, 1.0)
        picture *= (1.0 - cover / over)[..., None]
        picture += (light / over)[..., None] * np.asarray(sprite.colour)
    frames = (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    if flow is None:
        return frames, None
    owner = owner[inner]
    first = number - len(scene.sprites[-1].trajectory.centre)
    tracks, track_visible = _tracks(scene, owner, first, points)
    flow = flow[inner].astype(np.float32)
    return frames, Truth(flow, _still_seen(flow, owner), owner >= first, tracks, track_visible)


def _box(sprite: Sprite, part: int, camera: np.ndarray, size: int) -> _Box:
    way = sprite.trajectory
    centre, matrix = (way.centre[part] + camera) * size, way.matrix[part] * size
    parts = len(way.centre)
    # A wedge lies in a circle about a point of its middle line, which is smaller than the shape's.
    along, reach = (0.722, 0.725) if parts == 6 else (0.0, REACH)
    angle = (part + 0.5) * 2.0 * math.pi / parts
    middle = centre + along * (matrix @ np.array([math.cos(angle), math.sin(angle)]))
    half = reach * np.linalg.norm(matrix, axis=-1) + 1.0
    extent = np.ceil(2.0 * half.max(0)).astype(int) + 1
    corner = np.floor(middle - half).astype(int)
    # What is far outside is drawn into the margin, which is cut off.
    corner = np.clip(corner, -extent, size)
    dx = corner[:, :1] + 0.5 + np.arange(extent[0]) - centre[:, :1]
    dy = corner[:, 1:] + 0.5 + np.arange(extent[1]) - centre[:, 1:]
    inverse = np.linalg.inv(matrix)
    u = (inverse[:, 0, 0, None] * dx)[:, None, :] + (inverse[:, 0, 1, None] * dy)[:, :, None]
    v = (inverse[:, 1, 0, None] * dx)[:, None, :] + (inverse[:, 1, 1, None] * dy)[:, :, None]
    pixel = 1.0 / np.sqrt(np.abs(np.linalg.det(matrix)))[:, None, None]
    outside = distance(sprite.shape, u, v)
    if parts > 1:
        step = 2.0 * math.pi / parts
        low, high = part * step, (part + 1) * step
        outside = np.maximum(outside, math.sin(low) * u - math.cos(low) * v)
        outside = np.maximum(outside, -math.sin(high) * u + math.cos(high) * v)
    cover = np.clip(0.5 - outside / pixel, 0.0, 1.0)
    return _Box(corner, cover, brightness(sprite.texture, u, v, float(pixel.mean())), (u, v))


def _carried(sprite: Sprite, part: int, camera: np.ndarray, size: int, box: _Box) -> np.ndarray:
    """The flow of a part in its box, (T-1, h, w, 2)."""
    centre = (sprite.trajectory.centre[part] + camera)[1:] * size
    matrix = sprite.trajectory.matrix[part][1:] * size
    u, v = box.own[0][:-1], box.own[1][:-1]
    height, width = u.shape[1:]
    here_x = (box.corner[:-1, 0, None] + 0.5 + np.arange(width))[:, None, :]
    here_y = (box.corner[:-1, 1, None] + 0.5 + np.arange(height))[:, :, None]
    to = [
        matrix[:, i, 0, None, None] * u + matrix[:, i, 1, None, None] * v + centre[:, i, None, None] for i in range(2)
    ]
    return np.stack([to[0] - here_x, to[1] - here_y], -1)


def _still_seen(flow: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Whether the pixel that each goes to is in the picture and of the same part."""
    count, size = flow.shape[0], flow.shape[1]
    grid = np.arange(size) + 0.5
    x = np.floor(flow[..., 0] + grid[None, None, :]).astype(int)
    y = np.floor(flow[..., 1] + grid[None, :, None]).astype(int)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    there = owner[np.arange(1, count + 1)[:, None, None], y.clip(0, size - 1), x.clip(0, size - 1)]
    return inside & (there == owner[:-1])


def _tracks(scene: Scene, owner: np.ndarray, first: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Points spread evenly over the sprite that the caption speaks of."""
    sprite, size = scene.sprites[-1], scene.size
    way = sprite.trajectory
    parts = len(way.centre)
    # The plastic number's sequence fills the square evenly, and needs no random numbers.
    fill = np.arange(1, 64 * points + 1)[:, None] * np.array([0.7548776662466927, 0.5698402909980532])
    own = (np.mod(fill, 1.0) * 2.0 - 1.0) * REACH
    own = own[distance(sprite.shape, own[:, 0], own[:, 1]) < -0.08][:points]
    part = np.floor(np.mod(np.arctan2(own[:, 1], own[:, 0]) / (2.0 * math.pi), 1.0) * parts).astype(int) % parts
    tracks = (np.einsum("ntij,nj->nti", way.matrix[part], own) + way.centre[part] + scene.camera) * size
    cell = np.floor(tracks).astype(int)
    inside = ((cell >= 0) & (cell < size)).all(-1)
    cell = cell.clip(0, size - 1)
    there = owner[np.arange(scene.frames)[None], cell[..., 1], cell[..., 0]]
    return tracks.astype(np.float32), inside & (there == first + part[:, None])
