"""Untrusted descriptions of models, in checkpoints and in folders of save_pretrained: refused before anything is built.

They point elsewhere, are endless JSON, claim networks of terabytes, or contradict their weights.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from fer_dist.config import Config
from fer_dist.engine.checkpoint import Checkpoint, _seal, load, save
from fer_dist.errors import UserError
from fer_dist.models import FaceModel, build, build_model
from fer_dist.spec import LabelSet, ModelSpec
from tests.helpers.malicious_pickles import ATTACKS, benign
from tests.helpers.tiny_models import tiny_model

# -- checkpoints, with a right checksum and plain values


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a checkpoint of a tiny patt_lite holds."""
    model, path = tiny_model("patt_lite"), tmp_path_factory.mktemp("spec") / "x.pth"
    save(path, Checkpoint(spec=model.spec, weights=dict(model.state_dict()), config={}, record={}, provenance={}))
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def changed(content: dict[str, Any], folder: Path, place: str, value: Any) -> Path:
    """Write the content with another value at a place, `spec/input/size`; its checksum is right."""
    *above, last = place.split("/")
    tree = content = copy.deepcopy(content)
    for name in above:
        tree = tree[name]
    tree[last] = value
    with (folder / "x.pth").open("w+b") as file:
        torch.save(content, file)
        _seal(file)
    return folder / "x.pth"


NAN, INF, MISFIT = float("nan"), float("inf"), "do not fit its own architecture"
FOREIGN = "is not a checkpoint of fer_dist"
BAD: dict[str, tuple[list[Any], str]] = {
    "format": ([torch.zeros(2), True, 2.0, "2" * 1000], r"has format .{1,20}, this version reads 2"),
    "spec/arch": ([3], FOREIGN),
    "spec/labels": ([[], ["a", "a"], [1, 2], [str(i) for i in range(1025)]], FOREIGN),
    "spec/input/size": ([10**6, True], FOREIGN),
    "spec/input/image_size": (["48"], FOREIGN),
    "spec/input/mean": (["0.5", [0.5, 0.5, NAN]], FOREIGN),
    "spec/input/std": ([[0.0, 1.0, 1.0]], FOREIGN),
    "spec/input/more": ([1], FOREIGN),
    "spec/smoothing": (["0.1", 1.0, -0.1, NAN], FOREIGN),
    "spec/temperature": (["1.0", True, 0.0, -1.0, NAN, INF, 1e30], FOREIGN),
    "spec/options": ([[1], {1: 2}], FOREIGN),
    "weights": ([7], FOREIGN),
    # of a good form, but no model can be built
    "spec/arch/": (["vitt"], "unknown architecture 'vitt'"),
    "spec/options/": ([{"dropout": 0.0}, {}], MISFIT),
    "spec/options/width_mult": ([1e4], "width_mult is 10000.0, expected at most 8"),
    "spec/options/separable": ([10**9], "separable is 1000000000, expected"),
    "spec/options/channels": ([2**40], "expected at most 8192"),
    "spec/options/cut": (["13"], "model.options.cut is '13', expected int"),
    "spec/options/dropout": (["much"], MISFIT),
    "weights/network.norm.bias": ([torch.zeros(32, dtype=torch.complex64)], MISFIT),
}
"""Place in a checkpoint -> (wrong values, message)."""


@pytest.mark.parametrize("place", BAD)
def test_a_wrong_spec_is_refused(place: str, content: dict[str, Any], tmp_path: Path) -> None:
    values, message = BAD[place]
    for value in values:
        path = changed(content, tmp_path, place.rstrip("/"), value)
        with pytest.raises(UserError, match=message) as caught:
            load(path).model()
        assert caught.value.fix


def test_a_good_one_is_built_and_an_old_spec_has_no_calibration(content: dict[str, Any], tmp_path: Path) -> None:
    spec = dict(content["spec"])
    assert load(changed(content, tmp_path, "spec", spec)).model().spec == tiny_model("patt_lite").spec
    assert (spec.pop("temperature"), spec.pop("smoothing")) == (1.0, 0.0)
    assert load(changed(content, tmp_path, "spec", spec)).spec == tiny_model("patt_lite").spec


# -- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of a tiny vit, its weights in shards."""
    folder = tmp_path / "vit"
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, patch_size=16, image_size=64))
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder


INDEX = "model.safetensors.index.json"


def load_folder(folder: Path) -> FaceModel:
    config = Config().override({"model.arch": "vit", "model.weights": str(folder)})
    return build_model(config.model, 48, LabelSet())


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    assert [word for word in words if word not in caught.value.problem] == [], caught.value.problem
    assert len(caught.value.problem) < 1000
    assert caught.value.fix


def test_shards_are_read(folder: Path) -> None:
    """What a shard is goes by its content, whatever the name of the index says."""
    name = "vit.layers.0.mlp.fc1.weight"
    weight = ViTForImageClassification.from_pretrained(folder).get_parameter(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    for index in (INDEX, "pytorch_model.bin.index.json"):
        (folder / INDEX).rename(folder / index)
        assert torch.equal(load_folder(folder).get_parameter(f"network.model.{name}"), weight)


def test_an_index_that_points_elsewhere_is_refused(folder: Path) -> None:
    (folder.parent / "elsewhere.safetensors").write_bytes(benign())
    (folder / "link").symlink_to(folder.parent / "elsewhere.safetensors")
    (folder / "loop").symlink_to("loop")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for place in ("../elsewhere.safetensors", "/etc/passwd", "link", "loop", "x\0y", "a" * 5000):
        (folder / INDEX).write_text(json.dumps({"weight_map": {**index, "vit.layernorm.bias": place}}))
        refused(folder, str(folder), "which is not in its folder")
    for wrong in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'):
        (folder / INDEX).write_text(wrong)
        refused(folder, INDEX, "names no files of weights")
    (folder / INDEX).write_text('{"weight_map": {"a": "."}}')
    refused(folder, str(folder))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    """Its shards lie two folders higher, and nowhere else."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0123", tmp_path / "models--x" / "blobs"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_folder(snapshot)
    shard = next(snapshot.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(folder / shard.name)
    refused(snapshot, "which is not in its folder")


def test_transformers_opens_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may hold an adapter or a pickle, which from_pretrained would find."""
    trace = folder.parent / "trace"
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(ATTACKS["state dict"][0](trace))
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    opened: list[Any] = []

    def watched(kind: Any, /, path: Any, **options: Any) -> Any:
        opened.append(path)
        return original(kind, path, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    load_folder(folder)
    assert opened == [None]
    assert not trace.exists()


def test_json_has_bounds(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text('{"model_type": "vit", "x": "' + "a" * 2**20 + '"}')
    refused(folder, "config.json is not JSON", "more than 1,048,576 bytes")
    for wrong in ("[" * 100_000, "9" * 5000):
        path.write_text('{"model_type": ' + wrong + "}")
        refused(folder, "config.json is not JSON")
    path.write_text('{"model_type": ' + "[" * 900 + "]" * 900 + "}")
    refused(folder, "holds a 'a list', expected 'vit'")


HUGE = 10**4000
BAD_SIZES: dict[str, list[Any]] = {
    "hidden_size": [2**20, HUGE, 0, -1, "32", 32.0, None, True, [32], {}],
    "num_hidden_layers": [1001, HUGE],
    "intermediate_size": [10**10, HUGE],
    "num_attention_heads": [HUGE, 3, None],
    "patch_size": [10**6, HUGE, [], [[1]], [None]],
    "image_size": [10**8, HUGE, "64", 64.0, 0, -64, [], [[1]], None, True],
    "hidden_act": ["os.system", 3, "x" * 10**5],
    "qkv_bias": ["yes"],
    "layer_norm_eps": [-1, "x", 1e999],
    "model_type": [["vit"], "v" * 10**5, None],
}


def test_wrong_sizes_and_colours_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, values in BAD_SIZES.items():
        for value in values:
            path.write_text(json.dumps(config | {name: value}))
            refused(folder)
    path.write_text(json.dumps(config | {"hidden_size": 2**20, "num_hidden_layers": 900}))
    refused(folder, "hidden_size 1048576", "more than 2,147,483,648 parameters or 1,000 layers")
    path.write_text(json.dumps(config))
    wrong: list[Any] = [[], [1, 1, 1, 1], "abc", [0.5, 0.5, "x"], [0.5, 0.5, -1], [1e999, 0, 0], 3, None]
    for name in ("image_mean", "image_std"):
        for value in wrong:
            (folder / "preprocessor_config.json").write_text(json.dumps({name: value}))
            refused(folder, name, "preprocessor_config.json")


def test_wrong_sizes_in_a_spec_are_refused(folder: Path) -> None:
    spec = load_folder(folder).spec.to_dict()
    for name, value in (("hidden_size", 2**20), ("hidden_size", "32"), ("num_hidden_layers", 10**6), ("qkv_bias", [])):
        with pytest.raises(UserError):
            build(ModelSpec.from_dict(spec | {"options": spec["options"] | {name: value}}))


def test_wrong_state_dicts_are_refused(folder: Path) -> None:
    state = ViTForImageClassification.from_pretrained(folder).state_dict()
    (folder / INDEX).unlink()
    torch.save(dict(enumerate(state.values())), folder / "pytorch_model.bin")
    refused(folder, "not a state dict")
    torch.save({name: value.reshape(-1)[:1] for name, value in state.items()}, folder / "pytorch_model.bin")
    refused(folder, "of another shape")
