"""The recipes: each loads, says where it comes from, what to expect and what to type, and is what its source says."""

import re
import shlex
from typing import Any

import pytest

from fer_dist.commandline import parse
from fer_dist.config import Config, load_config
from fer_dist.options import RECIPES, recipes
from fer_dist.spec import IMAGENET_MEAN, IMAGENET_STD, LabelSet

NAMED = ("demo", "patt_lite", "patt_lite_128", "patt_lite_best", "patt_lite_plus", "vit", "vit_mae")
"""Those to train with; `search` is what a search without arguments begins with."""


def header(name: str) -> dict[str, str]:
    """The comments at the top: `Source: ...` and the like, and the line before them as `About`."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[0] != "#")]]
    return {"About": comments[0], **dict(line.split(": ", 1) for line in comments[1:])}


def values(config: Config, *names: str) -> list[Any]:
    plain = config.to_dict()
    found = []
    for name in names:
        value: Any = plain
        for part in name.split("."):
            value = value[part]
        found.append(value)
    return found


def test_there_are_seven_and_one_to_search_with() -> None:
    assert recipes() == sorted((*NAMED, "search"))


@pytest.mark.parametrize("name", NAMED)
def test_header_says_source_expected_result_and_command(name: str) -> None:
    said = header(name)
    assert list(said) == ["About", "Source", "Reported", "Command"]
    assert all(len(text) > 20 for text in said.values())
    if name != "demo":
        assert re.search(r"arXiv:\d{4}\.\d{5}", said["Source"])
    assert re.search(r"\d+(\.\d+)?%|README", said["Reported"])


@pytest.mark.parametrize("name", NAMED)
def test_command_of_the_header_starts_this_recipe(name: str) -> None:
    words = shlex.split(header(name)["Command"])
    module = words.index("fer_dist.train")
    assert words[0] == "torchrun"
    assert words[module - 1] == "-m"
    config = parse(words[module + 1 :], prog="train", about="")
    assert config == load_config(name, {"data.path": config.data.path, "model.weights": config.model.weights})
    (ranks,) = (int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node="))
    assert config.train.global_batch % ranks == 0
    assert (config.data.path is None) == (name == "demo")


@pytest.mark.parametrize("name", NAMED)
def test_recipe_sets_what_is_not_the_default_only_where_it_matters(name: str) -> None:
    """It loads, leaves the machine's own settings alone, and divides among the usual numbers of ranks."""
    config = load_config(name)
    machine = ("run", "data.path", "data.cache_dir", "model.weights", "train.device", "train.micro_batch", "seed")
    assert values(config, *machine) == values(Config(), *machine)
    assert all(config.train.global_batch % ranks == 0 for ranks in (1, 2, 4, 8))


def test_search_needs_nothing() -> None:
    """It is small, and leaves the machine's own settings alone."""
    said, config = header("search"), load_config("search")
    assert list(said) == ["About", "Source", "Reported", "Command"]
    assert re.search(r"\d+(\.\d+)?%", said["Reported"])
    assert said["Command"] == "python -m tune.search"
    machine = ("run", "data.path", "data.cache_dir", "model.weights", "train.device", "seed")
    assert values(config, *machine) == values(Config(), *machine)
    assert (config.model.arch, config.model.pretrained, config.model.freeze_depth) == ("patt_lite", False, 0)
    assert (
        config.train.epochs * config.data.embedded_train
        < load_config("demo").train.epochs * Config().data.embedded_train
    )


def test_demo_needs_nothing() -> None:
    demo = load_config("demo")
    assert load_config() == demo
    assert demo.data.path is None
    assert demo.model.arch == "patt_lite"
    assert not demo.model.pretrained
    assert demo.model.weights is None


def test_vit() -> None:
    """224 px, flips, rotation, translation, colour jitter, ReduceLROnPlateau, patience 3 on validation loss."""
    config = load_config("vit")
    assert config.model.arch == "vit"
    assert config.model.pretrained
    assert config.model.image_size == 224
    assert config.data.augment.flip == 0.5
    jitter = ("rotation", "translation", "brightness", "contrast")
    assert all(getattr(config.data.augment, name) > 0 for name in jitter)
    assert config.optim.schedule == "plateau"
    assert config.optim.plateau_factor < 1
    assert (config.train.patience, config.train.monitor) == (3, "loss")
    # The rate must be reduced, and tried, before the training stops.
    assert config.optim.plateau_patience + 1 < config.train.patience < config.train.epochs


def test_patt_lite() -> None:
    """Batch 128, Adam 1e-4, cross-entropy, flip and rotation, 15 epochs."""
    config = load_config("patt_lite")
    assert config.model.arch == "patt_lite"
    assert config.model.pretrained
    assert (config.train.global_batch, config.train.epochs) == (128, 15)
    assert (config.optim.name, config.optim.lr, config.optim.backbone_lr_scale) == ("adam", 1e-4, 1.0)
    assert (config.optim.schedule, config.optim.warmup, config.optim.weight_decay) == ("constant", 0.0, 0.0)
    assert (config.train.label_smoothing, config.train.class_weights) == (0.0, "none")
    varied = {name for name, value in config.data.augment.to_dict().items() if value}
    assert varied - {"erase_area", "mix_off"} == {"flip", "rotation"}


def test_vit_mae() -> None:
    """freeze_depth 4, AdamW 3e-5 with weight decay, cosine annealing, random crop and flip, ImageNet normalisation."""
    config = load_config("vit_mae")
    assert config.model.arch == "vit_mae"
    assert config.model.pretrained
    assert config.model.freeze_depth == 4
    assert (config.optim.name, config.optim.lr, config.optim.schedule) == ("adamw", 3e-5, "cosine")
    assert config.optim.weight_decay > 0
    varied = {name for name, value in config.data.augment.to_dict().items() if value}
    assert varied - {"erase_area", "mix_off"} == {"flip", "crop"}


@pytest.mark.parametrize(
    ("name", "side", "mean", "std"),
    [
        ("vit", 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("vit_mae", 224, IMAGENET_MEAN, IMAGENET_STD),
        ("patt_lite", 96, IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_size_and_normalisation_are_those_of_the_pretrained_network(
    name: str, side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    from fer_dist.models import build_spec

    config = load_config(name)
    shown = build_spec(config.model, config.data.size, LabelSet()).input
    assert (shown.size, shown.image_size, shown.mean, shown.std) == (48, side, mean, std)
