"""A cache gives back what the encoders made, notices every setting that changed, and never loses or doubles a clip."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.caches import PREPROCESSING, make_cache, make_clips, pixels

from datamodules.latents import LatentData
from muybridge.backbones import load
from muybridge.data.cache import Cache, Share, add_bad_clip, open_column, restore_texts, store_text, todo_clips
from muybridge.data.content import content_key, latents_key, size_of_key, text_encoder_key
from muybridge.diffusion.conditioning import Conditioning
from muybridge.diffusion.draws import keyed_noise
from muybridge.errors import UsageError

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def encoders(tiny_checkpoint: Tiny):
    return load(str(tiny_checkpoint("wan")), components=("vae", "text_encoder"), max_text_length=64)


@pytest.fixture(scope="module")
def made(encoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests only read."""
    root = tmp_path_factory.mktemp("cache")
    return make_cache(root / "cache", encoders, make_clips(root / "videos"))


def same(a: Conditioning, b: Conditioning) -> bool:
    pairs = [(a.text, b.text), (a.mask, b.mask), (a.pooled, b.pooled)]
    return all((x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


def restored(given: Conditioning) -> Conditioning:
    tensors, length = store_text(given)
    return restore_texts([tensors], [length])


# -- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "cogvideox", "latte", "unet3d", "hunyuan", "ltx", "mochi"])
def test_text_embeddings_come_back_bit_by_bit(tiny_checkpoint: Tiny, name: str) -> None:
    backbone = load(str(tiny_checkpoint(name)), components=("text_encoder",))
    for text in ("a dog runs", "", "x" * 500):
        wanted = backbone.encode_text([text])
        assert same(restored(wanted), wanted)


def test_padding_is_not_stored(encoders) -> None:
    tensors, length = store_text(encoders.encode_text(["a dog"]))
    assert length == 64
    assert len(tensors["text"]) == len("a dog") + 1  # bytes, and the end of the text


def test_half_precision_and_an_all_zero_text_come_back() -> None:
    for text in (torch.randn(1, 7, 4).bfloat16(), torch.zeros(1, 7, 4)):
        given = Conditioning(text, torch.ones(1, 7, dtype=torch.bool), torch.randn(1, 3))
        assert same(restored(given), given)


def test_a_clip_is_what_encoding_it_now_would_give(made: Path, encoders) -> None:
    clips, cache = make_clips(made.parent / "videos"), Cache(made)
    assert cache.ids == [c.id for c in clips]
    for clip in clips:
        batch = cache.clips([clip.id])
        assert (batch.ids, batch.prompts, batch.fps) == ([clip.id], [clip.caption], 8.0)
        assert torch.equal(batch.latents, encoders.encode(pixels(clip)))
        assert same(batch.conditioning, encoders.encode_text([clip.caption]))


def test_a_batch_is_its_clips_joined(made: Path) -> None:
    cache = Cache(made)
    ids = cache.ids[:3]
    batch, apart = cache.clips(ids), [cache.clips([i]) for i in ids]
    assert torch.equal(batch.latents, torch.cat([a.latents for a in apart]))
    assert same(batch.conditioning, Conditioning.cat([a.conditioning for a in apart]))
    assert (batch.ids, batch.prompts, batch.fps) == (ids, [p for a in apart for p in a.prompts], 8.0)


def test_writing_into_a_batch_leaves_the_cache_alone(made: Path) -> None:
    cache = Cache(made)
    batch = cache.clips(["clip-0"])
    batch.latents.zero_()
    batch.conditioning.text.zero_()
    assert cache.clips(["clip-0"]).latents.any()
    assert cache.clips(["clip-0"]).conditioning.text.any()


def test_the_unconditional_branch_has_its_reserved_name(made: Path, encoders) -> None:
    cache = Cache(made)
    assert "unconditional" in cache.texts
    assert cache.negative_prompts == [""]
    assert same(cache.unconditional(), encoders.unconditional())
    with pytest.raises(UsageError, match="no embedding of 'blurry'"):
        cache.unconditional("blurry")


def test_each_caption_is_encoded_once(made: Path) -> None:
    assert len(Cache(made).texts) == 3 + 1
    assert len(Cache(made).latents) == 4


def test_the_index_says_what_a_row_is(made: Path) -> None:
    row = Cache(made).latents.table.to_pylist()[1]
    assert row["source"] == content_key(made.parent / "videos" / "clip-1.mp4")
    assert (row["id"], row["position"], row["shape"]) == ("clip-1", 1, [16, 3, 2, 2])
    assert (row["frames"], row["height"], row["width"], row["fps"]) == (9, 16, 16, 8.0)
    assert row["caption_hash"] in Cache(made).texts


# -- keys ----------------------------------------------------------------------------------------------------------


def test_every_preprocessing_setting_that_differs_is_named_with_both_values(made: Path) -> None:
    cache = Cache(made)
    cache.check_preprocessing(PREPROCESSING)
    for name, value in {"frames": 13, "height": 32, "width": 32, "fps": None, "framing": "letterbox"}.items():
        with pytest.raises(UsageError, match=f"{name} is {PREPROCESSING.get(name)!r} there and {value!r} here"):
            cache.check_preprocessing({**PREPROCESSING, name: value})
    with pytest.raises(UsageError, match=r"frames is 9 there and 5 here; fps is 8\.0 there and 4\.0 here"):
        cache.check_preprocessing({**PREPROCESSING, "frames": 5, "fps": 4.0})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"vae_dtype": "bfloat16"}, "vae_dtype is 'float32' there and 'bfloat16' here"),
        ({"vae_tiling": True}, "vae_tiling is False there and True here"),
        ({"dtype": "bfloat16"}, "text_dtype is 'float32' there and 'bfloat16' here"),
        ({"text_dtype": "bfloat16"}, "text_dtype is 'float32' there and 'bfloat16' here"),
        ({"max_text_length": 32}, "max_text_length is 64 there and 32 here"),
    ],
)
def test_every_setting_of_the_encoders_is_part_of_the_key(
    made: Path, tiny_checkpoint: Tiny, option: dict, said: str
) -> None:
    backbone = load(
        str(tiny_checkpoint("wan")), **{"max_text_length": 64, "components": ("vae", "text_encoder"), **option}
    )
    with pytest.raises(UsageError, match=said):
        Cache(made).check_backbone(backbone)


@pytest.mark.parametrize(("component", "field"), [("vae", "vae"), ("text_encoder", "text_encoder")])
def test_retrained_encoders_are_noticed(made: Path, tiny_checkpoint: Tiny, tmp_path: Path, component, field) -> None:
    import shutil

    copy = tmp_path / "wan"
    shutil.copytree(tiny_checkpoint("wan"), copy)
    backbone = load(str(copy), components=("vae", "text_encoder"), max_text_length=64)
    Cache(made).check_backbone(backbone)  # a copy is the same
    [weights] = (copy / component).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match=f"{field} is '[0-9a-f]+' there and '[0-9a-f]+' here"):
        Cache(made).check_backbone(backbone)


def test_another_family_is_noticed(made: Path, tiny_checkpoint: Tiny) -> None:
    with pytest.raises(UsageError, match="family is 'Wan' there and 'CogVideoX' here"):
        Cache(made).check_backbone(load(str(tiny_checkpoint("cogvideox")), components=()))


def test_a_run_under_other_settings_does_not_add_to_a_cache(made: Path, encoders) -> None:
    with pytest.raises(UsageError, match=r"fps is 8\.0 there and 12\.0 here"):
        open_column(made, "latents", latents_key(encoders), {**PREPROCESSING, "fps": 12.0})


def test_large_files_are_told_apart_by_what_they_hold_not_by_their_dates(tmp_path: Path) -> None:
    content = bytearray(torch.randint(0, 256, (3 * 2**20,), dtype=torch.uint8).numpy().tobytes())
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(content)
    second.write_bytes(content)
    assert content_key(first) == content_key(second)
    assert size_of_key(content_key(first)) == len(content)
    for place in (0, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        second.write_bytes(changed)
        assert content_key(first) != content_key(second)
    second.write_bytes(content + b"x")
    assert content_key(first) != content_key(second)


# -- going on ------------------------------------------------------------------------------------------------------


def test_nothing_is_encoded_twice_and_what_changed_is_encoded_anew(encoders, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "videos")
    out = make_cache(tmp_path / "cache", encoders, clips[:2])
    assert todo_clips(out, clips) == ([2, 3], [])
    make_cache(out, encoders, clips)
    assert todo_clips(out, clips) == ([], [])
    clips[1].path.write_bytes(b"VIDEO 1")
    assert todo_clips(out, clips) == ([1], [])
    make_cache(out, encoders, clips)
    assert Cache(out).ids == [c.id for c in clips]
    Cache(out).check_clips(clips)


def test_a_new_caption_leaves_the_latents_as_they_are(encoders, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "videos")
    out = make_cache(tmp_path / "cache", encoders, clips)
    before = Cache(out).clips(["clip-2"]).latents
    clips[2] = replace(clips[2], caption="new")
    assert todo_clips(out, clips) == ([], [2])
    with pytest.raises(UsageError, match=r"1 of 4 clips changed.*clip-2 \(its caption\)"):
        Cache(out).check_clips(clips)
    make_cache(out, encoders, clips)
    cache = Cache(out)
    assert cache.ids == [c.id for c in clips]
    batch = cache.clips(["clip-2"])
    assert batch.prompts == ["new"]
    assert torch.equal(batch.latents, before)
    assert same(batch.conditioning, encoders.encode_text(["new"]))
    cache.check_clips(clips)


def test_another_part_of_the_picture_is_encoded_anew(encoders, tmp_path: Path) -> None:
    """A crop is the one thing of a manifest that changes pixels and is neither in the file nor in the id."""
    plain = make_clips(tmp_path / "videos")
    out = make_cache(tmp_path / "cache", encoders, plain)
    cut = [*plain[:2], replace(plain[2], crop=(0, 8, 0, 8)), replace(plain[3], caption="new", crop=(0, 8, 0, 8))]
    moved = [*plain[:2], replace(cut[2], crop=(0, 8, 4, 12)), cut[3]]
    for before, now, others in ((plain, cut, [2, 3]), (cut, moved, [2]), (moved, plain, [2, 3])):
        assert todo_clips(out, before) == ([], [])
        assert todo_clips(out, now) == (others, [])
        with pytest.raises(UsageError, match=rf"{len(others)} of 4 clips changed.*clip-2 \(its crop\)"):
            Cache(out).check_clips(now)
        make_cache(out, encoders, now)
        Cache(out).check_clips(now)
    # The crop is no part of the file: a new caption keeps it, and a changed file is still told from it.
    make_cache(out, encoders, cut)
    renamed = [*cut[:2], replace(cut[2], caption="other"), cut[3]]
    assert todo_clips(out, renamed) == ([], [2])
    make_cache(out, encoders, renamed)
    Cache(out).check_clips(renamed)
    renamed[2].path.write_bytes(b"a longer video")
    with pytest.raises(UsageError, match=r"clip-2 \(its file\)"):
        Cache(out).check_clips(renamed)


def test_clips_whose_files_are_not_there_now_stay(encoders, tmp_path: Path) -> None:
    """A disk that is not mounted must not empty a cache."""
    clips = make_clips(tmp_path / "videos")
    out = make_cache(tmp_path / "cache", encoders, clips)
    for clip in clips:
        clip.path.unlink()
    assert todo_clips(out, clips) == ([], [])
    Cache(out).check_clips(clips)


def test_rows_kept_in_another_dtype_are_not_mixed_in(encoders, tmp_path: Path) -> None:
    with open_column(tmp_path, "latents", latents_key(encoders), PREPROCESSING, {"dtype": "float32"}):
        pass
    with pytest.raises(UsageError, match="dtype is 'float32' there and 'bfloat16' here"):
        open_column(tmp_path, "latents", latents_key(encoders), PREPROCESSING, {"dtype": "bfloat16"})


def test_a_validation_cache_of_other_encoders_is_noticed(made: Path, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    other = load(str(tiny_checkpoint("wan")), components=("vae", "text_encoder"), max_text_length=32)
    cache = make_cache(tmp_path / "cache", other, make_clips(tmp_path / "videos"))
    Cache(made).check_like(Cache(made))
    data = LatentData(str(made), str(cache))
    with pytest.raises(UsageError, match="max_text_length is 32 there and 64 here"):
        data.setup("fit")


def test_a_source_that_outgrew_its_cache_is_noticed(made: Path, tmp_path: Path) -> None:
    clips = make_clips(tmp_path, 7)
    with pytest.raises(UsageError, match="lacks 3 of 7 clips, such as clip-4, clip-5, clip-6"):
        Cache(made).check_clips(clips)
    clips[0].path.write_bytes(b"longer than before")
    with pytest.raises(UsageError, match=r"clip-0 \(its file\)"):
        Cache(made).check_clips(clips[:4])


def test_a_bad_clip_is_noted_and_tried_again(encoders, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "videos", 3)
    with open_column(tmp_path / "cache", "latents", latents_key(encoders), PREPROCESSING) as writer:
        add_bad_clip(writer, clips[1], 1, "truncated: no moov atom")
    cache = Cache(tmp_path / "cache")
    assert cache.bad == {"clip-1": "truncated: no moov atom"}
    assert cache.ids == []
    assert todo_clips(tmp_path / "cache", clips) == ([0, 1, 2], [])
    cache = Cache(make_cache(tmp_path / "cache", encoders, clips))
    assert cache.bad == {}
    assert cache.ids == [c.id for c in clips]


def test_broken_shards_are_made_again(encoders, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "videos")
    out = make_cache(tmp_path / "cache", encoders, clips, shard_rows=1)
    before = {i: Cache(out).clips([i]).latents.clone() for i in Cache(out).ids}
    shard = out / "latents" / "000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"000002(.|\n)*run the command that wrote them again"):
        _ = Cache(out).latents
    cache = Cache(make_cache(out, encoders, clips, shard_rows=1))
    assert cache.ids == list(before)
    assert all(torch.equal(cache.clips([i]).latents, x) for i, x in before.items())
    assert cache.verify() == {}


def test_ranks_share_the_work_without_talking() -> None:
    names = [f"clip-{i}" for i in range(1000)]
    shares = [[n for n in names if n in Share(rank, 3)] for rank in range(3)]
    assert sorted(n for share in shares for n in share) == sorted(names)
    assert all(250 < len(share) < 420 for share in shares)
    with pytest.raises(UsageError, match="rank 3 of 3"):
        Share(3, 3)


def test_a_further_column_leaves_every_other_byte_alone(encoders, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "videos")
    out = make_cache(tmp_path / "cache", encoders, clips)

    def digests() -> dict[str, str]:
        files = [p for p in out.rglob("*") if p.is_file() and p.parent.name != "weights"]
        return {str(p): f"{p.stat().st_mtime_ns} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files}

    before = digests()
    assert Cache(out).columns == ["latents", "text"]
    with pytest.raises(UsageError, match="holds latents, text"):
        _ = Cache(out).weights
    weights = {c.id: keyed_noise((1, 3, 2, 2), 0, "weights", c.id) for c in clips}
    with open_column(out, "weights", {"tracker": "lucas-kanade", "tracks": 64}) as writer:
        for name, w in weights.items():
            writer.add(name, {"weights": w})
    assert digests() == before
    cache = Cache(out)
    assert cache.columns == ["latents", "text", "weights"]
    assert all(torch.equal(cache.clips([i], weights=True).weights[0], w) for i, w in weights.items())
    with pytest.raises(UsageError, match="tracks is 64 there and 32 here"):
        open_column(out, "weights", {"tracker": "lucas-kanade", "tracks": 32})


@pytest.mark.parametrize("damage", ["no folder", "no column", "no manifest", "broken manifest", "other format"])
def test_what_is_no_cache_is_said(made: Path, tmp_path: Path, damage: str) -> None:
    path, column = tmp_path / "cache", tmp_path / "cache" / "latents"
    if damage != "no folder":
        (column if damage != "no column" else path).mkdir(parents=True)
    if damage == "broken manifest":
        (column / "manifest.json").write_text("{", encoding="utf-8")
    if damage == "other format":
        (column / "manifest.json").write_text(json.dumps({"format": 0}), encoding="utf-8")
    words = {"no folder": "does not exist", "no column": "is no cache", "no manifest": "has no manifest"}
    words |= {"broken manifest": "can't be read", "other format": "of format 0"}
    with pytest.raises(UsageError, match=words[damage]):
        Cache(path)


def test_a_folder_of_other_things_is_not_written_into(encoders, tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "thesis.tex").write_text("!", encoding="utf-8")
    with pytest.raises(UsageError, match="exists and holds no cache"):
        open_column(tmp_path, "latents", latents_key(encoders), PREPROCESSING)


def test_sharding_in_bfloat16_leaves_the_key_of_the_text(encoders) -> None:
    """``shard`` under ``param_dtype: bfloat16`` sets the dtype that the network computes in; the texts stay the same."""
    before, whole = text_encoder_key(encoders), encoders.dtype
    encoders.dtype = torch.bfloat16
    try:
        assert text_encoder_key(encoders) == before
    finally:
        encoders.dtype = whole


def test_keys_need_no_weights_in_memory(tiny_checkpoint: Tiny) -> None:
    backbone = load(str(tiny_checkpoint("wan")), components=())
    assert set(latents_key(backbone)) == {"family", "vae", "vae_dtype", "vae_tiling"}
    assert set(text_encoder_key(backbone)) == {"family", "text_encoder", "text_dtype", "max_text_length"}
    assert backbone._parts == {}
