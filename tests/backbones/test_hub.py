"""What is downloaded of a hub id, and when. The hub is a folder here; everything that reads the files is the real thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Optional

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from support.families import CASES, PROMPT

from muybridge.backbones import Backbone, Pretrained, load
from muybridge.data.content import latents_key, text_encoder_key
from muybridge.errors import UsageError
from muybridge.export import export_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("wan22", "animatediff", "hunyuan", "latte")
"""Two networks; motion modules inside the UNet; two text encoders; a T5 with its tokenizer's vocabulary in a file."""


class Hub:
    """One repository, ``somebody/<name>``, whose files are copied into a local cache as they are asked for.

    Args:
        source: The repository's files.
        cache: Where they arrive, in a folder named by the commit.
    """

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.local = source, cache / "snapshots" / COMMIT
        self.repository = f"somebody/{source.name}"
        self.asked: list[tuple[Optional[str], set[str]]] = []
        self.offline = False

    def snapshot_download(self, repo_id: str, *, revision: Optional[str], allow_patterns: list[str]) -> str:
        self.asked.append((revision, set(allow_patterns)))
        if repo_id != self.repository or (self.offline and not self.local.exists()):
            raise LocalEntryNotFoundError(f"no {repo_id}")
        for file in [] if self.offline else self.source.rglob("*"):
            name = file.relative_to(self.source).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.local / name)
        return str(self.local)

    def open(self, **options: object) -> Backbone:
        """A backbone of the repository, nothing loaded yet."""
        return Pretrained(self.repository, **{**CASES[self.source.name].options, **options})  # type: ignore[arg-type]

    def news(self) -> list[set[str]]:
        """Which components were asked for since the last call of this, download by download."""
        assert {revision for revision, _ in self.asked} <= {COMMIT}, "weights of another commit than the configuration"
        found = [{pattern.split("/")[0] for pattern in patterns} for _, patterns in self.asked]
        self.asked.clear()
        return found

    @property
    def weights(self) -> set[str]:
        """Components whose weights have arrived."""
        return {file.parent.name for file in self.local.rglob("*.safetensors")}


@pytest.fixture
def hub(tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    def get(name: str) -> Hub:
        made = Hub(tiny_checkpoint(name), tmp_path / "cache")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return get


def texts_of(backbone: Backbone) -> set[str]:
    return {c for c in backbone.checkpoint.components if c.startswith(("tokenizer", "text_encoder"))}


@pytest.mark.parametrize("name", NAMES)
def test_weights_arrive_with_what_needs_them(name: str, hub: Callable, tiny_checkpoint: Callable) -> None:
    remote = hub(name)
    backbone = remote.open()
    assert all(asked == (None, {"*.json", "*.txt", "*.model"}) for asked in remote.asked)
    assert remote.weights == set()
    backbone.skeleton()
    remote.asked.clear()

    networks = set(backbone._present_networks())
    backbone.materialize()
    assert sorted(map(sorted, remote.news())) == sorted([n] for n in networks)
    assert remote.weights == networks

    local = CASES[name].open(tiny_checkpoint(name))
    for key, value in local.networks.state_dict().items():
        assert torch.equal(backbone.networks.state_dict()[key], value)

    pixels = torch.rand(1, 3, *CASES[name].clip, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode(pixels)
    assert remote.news() == [{"vae"}]
    assert torch.equal(latents, local.encode(pixels))

    said = backbone.encode_text([PROMPT])
    assert remote.news() == [texts_of(backbone)]
    assert torch.equal(said.text, local.encode_text([PROMPT]).text)
    assert remote.weights == networks | {"vae"} | {c for c in texts_of(backbone) if c.startswith("text_encoder")}

    backbone.materialize().decode(latents)
    backbone.release("text_encoder")
    backbone.encode_text([PROMPT])
    assert remote.news() == [], "nothing is asked for twice"


def test_a_job_with_the_denoiser_alone_downloads_it_alone(hub: Callable) -> None:
    remote = hub("wan")
    backbone = remote.open(components=("denoiser",)).materialize()
    for refused in (lambda: backbone.vae, lambda: backbone.encode_text([PROMPT])):
        with pytest.raises(UsageError, match="was given components"):
            refused()
    assert remote.weights == {"transformer"}


def test_animatediff_s_adapter_arrives_with_its_image_unet(
    hub: Callable, tiny_checkpoint: Callable, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    remote = hub("animatediff")
    remote.source = tmp_path / "animatediff"
    shutil.copytree(tiny_checkpoint("animatediff"), remote.source)
    shutil.rmtree(remote.source / "unet")
    UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(str(remote.source / "unet"))
    index = json.loads((remote.source / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (remote.source / "model_index.json").write_text(json.dumps(index))
    backbone = remote.open()
    remote.asked.clear()
    backbone.materialize()
    assert remote.news() == [{"unet", "motion_adapter"}]
    assert remote.weights == {"unet", "motion_adapter"}


def test_an_exported_pipeline_is_whole(hub: Callable, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    remote = hub("wan")
    backbone = remote.open(components=("denoiser",)).materialize()
    out = export_pipeline(backbone, str(tmp_path / "out"))
    assert remote.weights == {"transformer", "vae", "text_encoder"}
    assert {f.relative_to(out) for f in out.rglob("*.safetensors")} == {
        f.relative_to(remote.source) for f in remote.source.rglob("*.safetensors")
    }
    pipeline = DiffusionPipeline.from_pretrained(str(out))
    assert all(part is not None for part in (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer))


def test_keys_of_a_hub_id_are_those_of_its_directory(hub: Callable, tiny_checkpoint: Callable) -> None:
    backbone, local = hub("latte").open(), load(str(tiny_checkpoint("latte")), components=())
    assert latents_key(backbone) == latents_key(local)
    assert text_encoder_key(backbone) == text_encoder_key(local)


def test_weights_in_other_precisions_are_passed_over(hub: Callable, tmp_path: Path, tiny_checkpoint: Callable) -> None:
    """A repository often holds all weights twice; nothing here loads the second."""
    remote = hub("wan")
    remote.source = tmp_path / "wan"
    shutil.copytree(tiny_checkpoint("wan"), remote.source)
    extra = []
    for file in list(remote.source.rglob("*.safetensors")):
        extra += [
            file.with_name(f"{file.stem}.fp16.safetensors"),
            file.with_name(f"{file.stem}.fp16-00001-of-2.safetensors"),
        ]
        extra += [file.with_name(f"{file.stem}.safetensors.index.fp16.json")]
    assert len(extra) == 9
    for file in extra:
        file.write_text("{}")
    backbone, plain = remote.open().materialize(), CASES["wan"].open(tiny_checkpoint("wan"))
    assert (latents_key(backbone), text_encoder_key(backbone)) == (latents_key(plain), text_encoder_key(plain))
    arrived = {file.name for file in remote.local.rglob("*.safetensors")}
    assert len(arrived) == 2
    assert not any("fp16" in name for name in arrived)
    local = CASES["wan"].open(remote.source)
    assert (latents_key(local), text_encoder_key(local)) == (latents_key(plain), text_encoder_key(plain))
    out = export_pipeline(local, str(tmp_path / "out"))
    assert not [file for file in out.rglob("*") if "fp16" in file.name]
    assert len(list(out.rglob("*.safetensors"))) == 3


def test_an_exported_student_on_the_hub_keeps_its_scheduler_s_code(
    hub: Callable, tmp_path: Path, tiny_checkpoint: Callable
) -> None:
    remote = hub("cogvideox")
    remote.source = export_pipeline(CASES["cogvideox"].open(tiny_checkpoint("cogvideox")), str(tmp_path / "s"), [999.0])
    remote.repository = "somebody/student"
    again = export_pipeline(Pretrained("somebody/student", max_text_length=32).materialize(), str(tmp_path / "again"))
    assert {f.name for f in (again / "scheduler").iterdir()} == {"few_step.py", "scheduler_config.json"}


def test_a_published_t5_s_vocabulary_is_read(tiny_checkpoint: Callable, tmp_path: Path) -> None:
    """CogVideoX's and LTX's tokenizers are a sentencepiece model and no more; tiny ones otherwise take bytes."""
    import sentencepiece

    path = tmp_path / "cogvideox"
    shutil.copytree(tiny_checkpoint("cogvideox"), path)
    shutil.rmtree(path / "tokenizer")
    (path / "tokenizer").mkdir()
    text = tmp_path / "text"
    text.write_text(
        "\n".join(f"a {thing} runs to the {side}" for thing in ("dog", "horse") for side in ("left", "right"))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path / "tokenizer/spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
    )
    (path / "tokenizer/spiece.vocab").unlink()
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    (path / "model_index.json").write_text(json.dumps(index))
    backbone = CASES["cogvideox"].open(path)
    one, other = backbone.encode_text(["a dog runs to the left", "a horse runs to the left"]).text
    assert torch.isfinite(one).all()
    assert not torch.equal(one, other)
    tokenizer = backbone._text_pipeline().tokenizer
    said = tokenizer("a dog runs").input_ids
    assert said[-1] == 1
    assert 2 not in said, "known words"


def test_a_hub_id_that_can_not_be_reached_is_an_error_of_use(hub: Callable) -> None:
    remote = hub("wan")
    with pytest.raises(UsageError, match=r"'nobody/nothing' .* could be fetched \(LocalEntryNotFoundError"):
        Pretrained("nobody/nothing")
    backbone = remote.open()
    remote.offline = True
    with pytest.raises(UsageError, match="somebody/wan gave no weights for its transformer"):
        backbone.materialize()
    assert not backbone.networks
    remote.offline = False
    assert backbone.materialize().networks, "a failed download is tried again"


def test_the_real_client_without_a_connection_is_an_error_of_use() -> None:
    """Tests run with ``HF_HUB_OFFLINE=1``, and no such repository is in any cache."""
    with pytest.raises(UsageError, match="is neither a directory here nor a repository that could be fetched"):
        Pretrained("muybridge-tests/no-such-checkpoint")


def test_nothing_is_downloaded_for_a_directory(tiny_checkpoint: Callable, hub: Callable, tmp_path: Path) -> None:
    remote = hub("wan")
    backbone = load(str(tiny_checkpoint("wan")), max_text_length=32)
    backbone.encode_text([PROMPT])
    latents_key(backbone)
    export_pipeline(backbone, str(tmp_path / "out"))
    assert remote.asked == []
