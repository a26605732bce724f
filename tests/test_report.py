"""A report is one file that asks for nothing from outside, whatever its words are."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from muybridge.errors import UsageError
from muybridge.metrics.base import Estimate
from muybridge.report import (
    Command,
    Grid,
    Histogram,
    Picture,
    Portion,
    Report,
    Section,
    Table,
    Video,
    number,
    render,
    write_report,
)
from muybridge.video import write_image, write_video

HOSTILE = 'a <script>alert("x")</script> & `code` of "quotes" \'and\' </section>'
VOID = {"meta", "img", "br", "link", "input"}
LOADS = {"src", "href", "srcset", "poster", "action", "data", "background", "xlink:href"}


class Strict(HTMLParser):
    """Refuses tags that are not closed in order; keeps what there is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Video, Picture]:
    rng = np.random.default_rng(0)
    video = write_video(tmp_path / "a.mp4", rng.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), 8.0)
    picture = write_image(tmp_path / "a.png", rng.integers(0, 255, (8, 9, 3), dtype=np.uint8))
    return Video.read(video, HOSTILE), Picture.read(picture, HOSTILE)


def page(video: Video, picture: Picture) -> Report:
    grid = Grid(("one", HOSTILE), ((HOSTILE, (video, None)), ("b", (video, video))), HOSTILE)
    table = Table((HOSTILE, "share"), ((HOSTILE, Estimate(0.5, 0.25, 0.75, 9)), ("none", HOSTILE), ("c", Portion(0.5))))
    bars = Histogram((-1.0, -0.9, 0.5), HOSTILE, 4)
    section = Section(
        HOSTILE, (HOSTILE,), (grid, table, picture, bars), (Command(f"muybridge judge '{HOSTILE}'", 3.2),)
    )
    return Report(HOSTILE, HOSTILE, (section, Section("empty")))


def test_it_is_well_formed_whatever_its_words_are(parts: tuple[Video, Picture]):
    reader = Strict()
    reader.feed(render(page(*parts)))
    reader.close()
    assert reader.open == []
    names = [tag for tag, _ in reader.tags]
    assert names.count("video") == 3
    assert names.count("img") == 1
    assert names.count("section") == 2
    assert "script" not in names
    # Words come out as they went in; backticks are no words.
    assert reader.text.count('alert("x")') >= 8
    videos = [attributes for tag, attributes in reader.tags if tag == "video"]
    assert all({"autoplay", "loop", "muted", "playsinline"} <= set(v) for v in videos), (
        "it plays by itself, as phones allow"
    )
    targets = {a["id"] for _, a in reader.tags if "id" in a}
    assert {a["href"] for tag, a in reader.tags if tag == "a"} == {f"#{target}" for target in targets}


def test_it_asks_for_nothing_from_outside(parts: tuple[Video, Picture]):
    text = render(page(*parts))
    reader = Strict()
    reader.feed(text)
    loaded = [str(value) for _, attributes in reader.tags for name, value in attributes.items() if name in LOADS]
    assert loaded
    assert all(value.startswith(("data:video/mp4;base64,", "data:image/png;base64,", "#")) for value in loaded)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)
    assert "http" not in text.replace("http-equiv", "")


def test_what_it_holds_are_the_files_and_little_else(parts: tuple[Video, Picture]):
    video, picture = parts
    text = render(page(video, picture))
    held = [base64.b64decode(found) for found in re.findall(r'base64,([^"]*)"', text)]
    assert held == [video.mp4, video.mp4, video.mp4, picture.png]
    assert len(text.encode()) < 4 / 3 * (3 * len(video.mp4) + len(picture.png)) + 12_000


def test_the_same_report_is_the_same_file(parts: tuple[Video, Picture], tmp_path: Path):
    report = page(*parts)
    assert write_report(tmp_path / "deep/report.html", report).read_text(encoding="utf-8") == render(report)
    assert render(report) == render(page(*parts))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_videos_too_many_for_one_file_are_linked_as_the_page_sees_them(tmp_path: Path):
    name = 'odd "name" & #1.mp4'
    linked = Video.linked(tmp_path / "videos" / name, tmp_path / "out/report.html", name)
    rows = (("a", (linked, Video(label="lost"))),)
    reader = Strict()
    reader.feed(render(Report("", "", (Section("", (), (Grid(("one", "two"), rows),)),))))
    (video,) = [attributes for tag, attributes in reader.tags if tag == "video"]
    (tmp_path / "out").mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / name).touch()
    assert (tmp_path / "out" / unquote(str(video["src"]))).is_file()
    assert "?" not in str(video["src"])
    assert "#" not in str(video["src"])
    assert "no video known" in reader.text
    assert "lost" in reader.text


def test_bars_count_the_values_and_those_below_zero_are_marked():
    reader = Strict()
    bars = Histogram((-1.0, -0.9, -0.8, 1.0), "", 4)
    reader.feed(render(Report("", "", (Section("", (), (bars,)),))))
    found = [a for tag, a in reader.tags if tag == "rect"]
    heights = [float(str(a["height"])) for a in found]
    assert [h / max(heights) for h in heights] == pytest.approx([1.0, 0.0, 0.0, 1 / 3], abs=0.01)
    assert [a.get("class") for a in found] == ["harm", "harm", None, None]
    with pytest.raises(ValueError, match="histogram of no values"):
        Histogram(())


def test_rows_have_as_many_cells_as_there_are_columns(parts: tuple[Video, Picture]):
    with pytest.raises(ValueError, match="'a' has not as many videos"):
        Grid(("one", "two"), (("a", (parts[0],)),))
    with pytest.raises(ValueError, match="'a' has not as many cells"):
        Table(("one", "two"), (("a",),))
    with pytest.raises(UsageError, match="does not exist"):
        Video.read("nowhere.mp4")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.9341, "0.934"),
        (1.0, "1.000"),
        (0.0, "0.000"),
        (-0.25, "-0.250"),
        (0.99999, "1.000"),
        (1.004, "1.00"),
        (9.999, "10.0"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.0, "12345"),
        (float("nan"), "–"),
    ],
)
def test_numbers_are_short(value: float, shown: str):
    assert number(value) == shown
