"""The recipes: each loads, says where it comes from, what to expect and what to type, and is what its source says."""

import re
import shlex
from operator import attrgetter

import pytest

from fer_dist.commandline import parse
from fer_dist.config import Config, load_config
from fer_dist.options import RECIPES, recipes

NAMED = ("demo", "patt_lite", "patt_lite_128", "patt_lite_best", "patt_lite_plus", "vit", "vit_mae")
"""Those to train with; `search` is what a search without arguments begins with."""
MACHINE = ("run", "data.path", "data.cache_dir", "model.weights", "train.device", "seed", "train.micro_batch")
"""Settings of a machine or of one run, which a recipe leaves alone."""


@pytest.mark.parametrize("name", [*NAMED, "search"])
def test_a_recipe_says_where_it_comes_from_and_its_command_starts_it(name: str) -> None:
    """It leaves the machine's own settings alone, and its batch divides among the usual numbers of ranks."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    about, *comments = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    said, loaded = dict(line.split(": ", 1) for line in comments[:3]), load_config(name)
    assert list(said) == ["Source", "Reported", "Command"]
    assert all(len(text) > 20 for text in (about, *said.values()))
    assert name in ("demo", "search") or re.search(r"arXiv:\d{4}\.\d{5}", said["Source"])
    assert re.search(r"\d+(\.\d+)?%|README", said["Reported"])
    assert [attrgetter(setting)(loaded) for setting in MACHINE] == [attrgetter(x)(Config()) for x in MACHINE]
    if name == "search":
        assert said["Command"] == "python -m tune.search"
        return
    launcher, rest = said["Command"].split(" -m fer_dist.train ")
    config = parse(shlex.split(rest), prog="train", about="")
    assert config == loaded.override({"data.path": config.data.path, "model.weights": config.model.weights})
    assert (config.data.path is None) == (name == "demo")
    ranks = re.fullmatch(r"torchrun .*--nproc_per_node=(\d+)", launcher)
    assert ranks is not None
    assert all(config.train.global_batch % n == 0 for n in (int(ranks[1]), 1, 2, 4, 8))


def test_demo_and_search_need_nothing() -> None:
    assert recipes() == sorted((*NAMED, "search"))
    demo, search = load_config(), load_config("search")
    assert demo == load_config("demo")
    for config in (demo, search):
        assert (config.model.arch, config.model.pretrained, config.model.freeze_depth) == ("patt_lite", False, 0)
    assert search.train.epochs * search.data.embedded_train < demo.train.epochs * Config().data.embedded_train


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
    if config.optim.schedule == "plateau":  # it reduces the rate before it stops
        assert config.optim.plateau_factor < 1
        assert config.optim.plateau_patience + 1 < config.train.patience < config.train.epochs
