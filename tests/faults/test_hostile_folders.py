"""Folders of save_pretrained from strangers: an index that points elsewhere, endless JSON, networks of terabytes."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from fer_dist.config import Config
from fer_dist.errors import UserError
from fer_dist.models import FaceModel, build, build_model
from fer_dist.models.hf import MAX_PARAMETERS
from fer_dist.spec import LabelSet, ModelSpec
from tests.helpers.malicious_pickles import ATTACKS, benign

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 16,
    "image_size": 64,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    ViTForImageClassification(ViTConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A good folder of a tiny vit, to be spoilt."""
    return shutil.copytree(original, tmp_path / "vit")


def load(folder: Path) -> FaceModel:
    config = Config().override({"model.arch": "vit", "model.weights": str(folder)})
    return build_model(config.model, 48, LabelSet())


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(folder)
    assert [word for word in words if word not in caught.value.problem] == [], caught.value.problem
    assert len(caught.value.problem) < 1000
    assert caught.value.fix


# -- shards


def sharded(folder: Path, place: str | None = None, suffix: str = "safetensors") -> dict[str, torch.Tensor]:
    """Turn the weights of a folder into two shards and an index; `place` is what the index calls the second."""
    state: dict[str, torch.Tensor] = ViTForImageClassification.from_pretrained(folder).state_dict()
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{1 + index % 2}-of-2.{suffix}" for index, name in enumerate(names)}
    for shard in set(places.values()):
        part = {name: state[name].contiguous() for name in names if places[name] == shard}
        save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
    if place is not None:
        places = {name: place if shard.startswith("model-2") else shard for name, shard in places.items()}
    index = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return state


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read(folder: Path, suffix: str) -> None:
    state = sharded(folder, suffix=suffix)
    name = "vit.layers.0.mlp.fc1.weight"
    assert torch.equal(load(folder).get_parameter(f"network.model.{name}"), state[name])


@pytest.mark.parametrize(
    "place",
    [
        "../elsewhere.safetensors",
        "/etc/passwd",
        "sub/../../elsewhere.safetensors",
        "link",
        "loop",
        "x\0y",
        "a" * 5000,
        ".",
    ],
)
def test_an_index_that_points_elsewhere(folder: Path, place: str) -> None:
    (folder.parent / "elsewhere.safetensors").write_bytes(benign())
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder.parent / "elsewhere.safetensors")
    (folder / "loop").symlink_to("loop")
    sharded(folder, place)
    refused(folder, str(folder))
    if place != ".":
        refused(folder, "which is not in its folder")


def test_the_hubs_cache_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    """A snapshot in the cache holds links; its shards lie two folders higher, and nowhere else."""
    sharded(folder)
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load(snapshot)
    (snapshot / "model-2-of-2.safetensors").unlink()
    (snapshot / "model-2-of-2.safetensors").symlink_to(folder / "model-2-of-2.safetensors")
    refused(snapshot, "which is not in its folder")


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_that_is_none(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json", "names no files of weights")


def test_transformers_opens_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may hold an adapter or a pickle beside the weights, which from_pretrained would find."""
    trace = folder.parent / "trace"
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(ATTACKS["in a state dict"].make(trace))
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    asked: list[Any] = []

    def watched(kind: Any, /, path: Any, **options: Any) -> Any:
        asked.append(path)
        return original(kind, path, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    load(folder)
    assert asked == [None]
    assert not trace.exists()


# -- config.json


def test_json_has_bounds(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit", "x": "' + "a" * 2**20 + '"}')
    refused(folder, "config.json is not JSON", "more than 1,048,576 bytes")
    for deep in ("[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900):
        (folder / "config.json").write_text('{"model_type": ' + deep + "}")
        refused(folder, str(folder))
    (folder / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")
    refused(folder, "config.json is not JSON")


HUGE = 10**4000
BAD_SIZES: dict[str, Any] = {
    "hidden_size": [2**20, HUGE, 0, -1, "32", 32.0, None, True, [32], {}],
    "num_hidden_layers": [1001, 10**9, HUGE],
    "intermediate_size": [10**10, HUGE],
    "num_attention_heads": [HUGE, 3, None],
    "patch_size": [10**6, HUGE, [], [[1]], [None]],
    "image_size": [10**8, HUGE, "64", 64.0, 0, -64, [], [[1]], None, True],
    "hidden_act": ["os.system", 3, "x" * 10**5],
    "qkv_bias": ["yes"],
    "layer_norm_eps": [-1, "x", 1e999],
    "model_type": [["vit"], "v" * 10**5, None],
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_sizes_that_are_none(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    for value in BAD_SIZES[name]:
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        start = time.monotonic()
        refused(folder)
        assert time.monotonic() - start < 5


def test_a_network_of_terabytes_is_refused_before_it_is_built(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2**20, "num_hidden_layers": 900}))
    refused(folder, "hidden_size 1048576", "more than 2,147,483,648 parameters or 1,000 layers")
    assert MAX_PARAMETERS == 2**31


@pytest.mark.parametrize(
    "options", [{"hidden_size": 2**20}, {"hidden_size": "32"}, {"num_hidden_layers": 10**6}, {"qkv_bias": []}]
)
def test_the_same_in_a_spec_from_a_checkpoint(options: dict[str, Any]) -> None:
    known = build_model(
        Config().override({"model.arch": "vit", "model.pretrained": False, **tiny()}).model, 48, LabelSet()
    )
    spec = known.spec.to_dict()
    with pytest.raises(UserError):
        build(ModelSpec.from_dict(spec | {"options": spec["options"] | options}))


def tiny() -> dict[str, Any]:
    return {f"model.options.{name}": size for name, size in SIZES.items() if name != "image_size"}


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
@pytest.mark.parametrize(
    "value", [[], [1, 2], [1, 1, 1, 1], "abc", [0.5, 0.5, "x"], [0.5, 0.5, -1], [1e999, 0, 0], 3, None]
)
def test_means_that_are_none(folder: Path, name: str, value: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({name: value}))
    refused(folder, name, "preprocessor_config.json")


def spoiled(folder: Path, names: Callable[[dict[str, torch.Tensor]], dict[Any, torch.Tensor]]) -> None:
    state = ViTForImageClassification.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(names(state), folder / "pytorch_model.bin")


def test_state_dicts_that_are_none(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "numbers")
    spoiled(tmp_path / "numbers", lambda state: dict(enumerate(state.values())))
    refused(tmp_path / "numbers", "not a state dict")
    spoiled(folder, lambda state: {name: value.reshape(-1)[:1] for name, value in state.items()})
    refused(folder, "of another shape")
