"""The recipes: each loads, says where it comes from, what to expect and what to type, and is what its source says."""

import re
import shlex
from operator import attrgetter
from typing import Any

import pytest

from fer_dist.commandline import parse
from fer_dist.config import Config, load_config
from fer_dist.options import RECIPES, recipes

NAMED = ("demo", "patt_lite", "patt_lite_128", "patt_lite_best", "patt_lite_plus", "vit", "vit_mae")
"""Those to train with; `search` is what a search without arguments begins with."""


def header(name: str) -> dict[str, str]:
    """The comments at the top: `Source: ...` and the like, and the line before them as `About`."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[0] != "#")]]
    return {"About": comments[0], **dict(line.split(": ", 1) for line in comments[1:])}


MACHINE = ("run", "data.path", "data.cache_dir", "model.weights", "train.device", "seed")
"""Settings of a machine or of one run, which a recipe leaves alone."""


def values(config: Config, *names: str) -> list[Any]:
    return [attrgetter(name)(config) for name in names]


def test_there_are_seven_and_one_to_search_with() -> None:
    assert recipes() == sorted((*NAMED, "search"))


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_says_where_it_comes_from_and_its_command_starts_it(name: str) -> None:
    """It leaves the machine's own settings alone, and its batch divides among the usual numbers of ranks."""
    said, loaded = header(name), load_config(name)
    assert list(said) == ["About", "Source", "Reported", "Command"]
    assert all(len(text) > 20 for text in said.values())
    assert name == "demo" or re.search(r"arXiv:\d{4}\.\d{5}", said["Source"])
    assert re.search(r"\d+(\.\d+)?%|README", said["Reported"])
    words = shlex.split(said["Command"])
    module = words.index("fer_dist.train")
    assert words[0] == "torchrun"
    assert words[module - 1] == "-m"
    config = parse(words[module + 1 :], prog="train", about="")
    assert config == loaded.override({"data.path": config.data.path, "model.weights": config.model.weights})
    (ranks,) = (int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node="))
    assert all(config.train.global_batch % n == 0 for n in (ranks, 1, 2, 4, 8))
    assert (config.data.path is None) == (name == "demo")
    own = (*MACHINE, "train.micro_batch")
    assert values(loaded, *own) == values(Config(), *own)


def test_search_needs_nothing() -> None:
    """It is small, and leaves the machine's own settings alone."""
    said, config, demo = header("search"), load_config("search"), load_config("demo")
    assert list(said) == ["About", "Source", "Reported", "Command"]
    assert re.search(r"\d+(\.\d+)?%", said["Reported"])
    assert said["Command"] == "python -m tune.search"
    assert values(config, *MACHINE) == values(Config(), *MACHINE)
    assert (config.model.arch, config.model.pretrained, config.model.freeze_depth) == ("patt_lite", False, 0)
    assert config.train.epochs * config.data.embedded_train < demo.train.epochs * Config().data.embedded_train


def test_demo_needs_nothing() -> None:
    demo = load_config("demo")
    assert load_config() == demo
    found = demo.data.path, demo.model.arch, demo.model.pretrained, demo.model.weights
    assert found == (None, "patt_lite", False, None)


SETTINGS = {
    "vit": "model.arch=vit model.pretrained=true model.image_size=224 data.augment.flip=0.5 "
    "optim.schedule=plateau train.patience=3 train.monitor=loss",
    "patt_lite": "model.arch=patt_lite model.pretrained=true model.image_size=none train.global_batch=128 "
    "train.epochs=15 optim.name=adam optim.lr=1e-4 optim.backbone_lr_scale=1 optim.schedule=constant optim.warmup=0 "
    "optim.weight_decay=0 train.label_smoothing=0 train.class_weights=none",
    "vit_mae": "model.arch=vit_mae model.pretrained=true model.image_size=224 model.freeze_depth=4 optim.name=adamw "
    "optim.lr=3e-5 optim.schedule=cosine",
}
"""Settings that the source of a recipe gives."""
VARIED = {
    "vit": {"flip", "rotation", "translation", "brightness", "contrast"},
    "patt_lite": {"flip", "rotation"},
    "vit_mae": {"flip", "crop"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_is_what_its_source_says(name: str) -> None:
    config = load_config(name)
    assert config.override(dict(pair.split("=") for pair in SETTINGS[name].split())) == config
    varied = {part for part, value in config.data.augment.to_dict().items() if value}
    assert varied - {"erase_area", "mix_off"} == VARIED[name]
    assert (config.optim.weight_decay > 0) == (name != "patt_lite")


def test_vit_reduces_the_rate_before_it_stops() -> None:
    vit = load_config("vit")
    assert vit.optim.plateau_factor < 1
    assert vit.optim.plateau_patience + 1 < vit.train.patience < vit.train.epochs
