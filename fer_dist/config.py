"""Every setting with its default, its meaning and its bounds: YAML in, overrides, YAML out.

`Config` is frozen; `config.override({"optim.lr": 3e-4})` makes another. That one door serves
the command line, Ray Tune and the tests. Reading and parsing live in `fer_dist/options.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fer_dist.errors import UserError
from fer_dist.options import Section, option, read_yaml, section


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where a run is written, and how it reports."""

    name: str | None = option(None, "name of the run folder; none: architecture and start time")
    dir: str = option("runs", "folder that holds the run folders")
    resume: Literal["restart", "auto", "never"] = option(
        "restart",
        "auto: go on with run.name; restart: only when the launcher has started this run again; never: not even then",
    )
    keep: int = option(2, "checkpoints to go on from that stay in the run folder [files]", low=1)
    stop_signals: str = option(
        "SIGTERM,SIGUSR1,SIGINT,SIGHUP", "signals that make a run save after its step and leave with exit code 75"
    )
    timeout_seconds: float = option(
        600.0, "a rank that comes no further for so long leaves, with its stacks in the run folder [s]", above=0
    )
    tensorboard: bool = option(True, "also write TensorBoard events")
    progress: Literal["auto", "plain", "none"] = option(
        "auto", "auto: a live line on a terminal, plain lines elsewhere"
    )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """How training pictures are varied; 0 turns a part off."""

    flip: float = option(0.0, "mirrored pictures [probability]", low=0, high=1)
    rotation: float = option(0.0, "largest rotation either way [degrees]", low=0, high=180)
    translation: float = option(0.0, "largest shift either way [fraction of the side]", low=0, high=1)
    scale: float = option(0.0, "largest relative change of size either way [fraction]", low=0, high=0.9)
    crop: float = option(0.0, "largest part of the side that a random crop cuts away [fraction]", low=0, high=0.9)
    brightness: float = option(0.0, "largest change of brightness either way [fraction of 255]", low=0, high=1)
    contrast: float = option(0.0, "largest relative change of contrast either way [fraction]", low=0, high=1)
    blur: float = option(0.0, "largest Gaussian blur [pixels, standard deviation]", low=0, high=5)
    noise: float = option(0.0, "largest Gaussian noise [grey levels, standard deviation]", low=0, high=128)
    erase: float = option(0.0, "random erasing: a rectangle is erased [probability]", low=0, high=1)
    erase_area: float = option(0.2, "largest area of that rectangle [fraction of the picture]", low=0.01, high=1)
    mixup: float = option(0.0, "mixup: alpha of the Beta distribution of the weights, 0: off", low=0)
    cutmix: float = option(0.0, "cutmix: alpha of the Beta distribution of the areas, 0: off", low=0)
    mix_off: float = option(0.1, "last part of the epochs without mixup and cutmix [fraction]", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Which pictures, how they are read and kept."""

    path: str | None = option(
        None, "data set: CSV, class folders, .zip or parquet of FER2013; none: embedded drawn faces"
    )
    ferplus: str | None = option(None, "FER+ votes (fer2013new.csv) as soft targets for a CSV in the original order")
    cache_dir: str | None = option(
        None, "folder of decoded data sets; none: $FER_DIST_CACHE, or fer_dist in the user's cache"
    )
    size: int = option(48, "side of the stored pictures; larger ones are reduced [pixels]", low=16, high=512)
    on_error: Literal["stop", "skip"] = option("stop", "a bad picture stops the reading, or is counted and skipped")
    val_fraction: float = option(
        0.1, "part of train held out where no validation part is marked [fraction]", low=0.01, high=0.5
    )
    drop_copies: bool = option(False, "drop training pictures that are exact copies of evaluation pictures")
    embedded_train: int = option(6000, "embedded data set: training part [faces]", low=7)
    embedded_val: int = option(1400, "embedded data set: validation part, and as much test part [faces]", low=7)
    embedded_seed: int = option(0, "embedded data set: seed", low=0)
    augment: AugmentConfig = section(AugmentConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which network, from which weights."""

    arch: str = option("patt_lite", "architecture: vit, patt_lite, vit_mae or timm:<name>")
    pretrained: bool = option(True, "start from pretrained weights")
    weights: str | None = option(
        None, "local file or folder with pretrained weights, or a checkpoint to fine-tune; none: hub or cache"
    )
    image_size: int | None = option(
        None,
        "side that pictures are enlarged to inside the model; none: the backbone's [pixels]",
        low=16,
        high=1024,
    )
    freeze_depth: int = option(0, "0: train all; d: freeze stem or embeddings and the first d blocks [blocks]", low=0)
    dropout: float = option(0.0, "dropout before the head [probability]", low=0, high=0.95)
    options: dict[str, Any] = option(dict, "sizes of the architecture, e.g. --model.options.hidden_size 64")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """How the weights are moved."""

    name: Literal["adamw", "adam", "sgd"] = option("adamw", "optimizer: AdamW, Adam or SGD")
    lr: float = option(1e-3, "learning rate of the head", above=0)
    backbone_lr_scale: float = option(1.0, "learning rate of the backbone over that of the head [factor]", above=0)
    weight_decay: float = option(0.05, "weight decay; never on norms and biases", low=0)
    momentum: float = option(0.9, "momentum of SGD, beta1 of Adam and AdamW", low=0, high=0.9999)
    schedule: Literal["constant", "cosine", "one_cycle", "plateau"] = option(
        "cosine", "learning-rate schedule (scheduler)"
    )
    warmup: float = option(
        0.0, "linear warm-up; for one_cycle the rising part [fraction of all steps]", low=0, high=0.9
    )
    final_lr_scale: float = option(
        0.01, "last learning rate of cosine and one_cycle over the highest [factor]", low=0, high=1
    )
    plateau_factor: float = option(0.5, "plateau: on the learning rate [factor]", above=0, high=1)
    plateau_patience: int = option(2, "plateau: epochs without gain before it [epochs]", low=0)
    clip_norm: float = option(0.0, "gradient clipping: largest norm over all gradients, 0: off [L2 norm]", low=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long, on what, and by which score."""

    epochs: int = option(12, "passes over the training part [epochs]", low=1)
    global_batch: int = option(64, "global batch size: per optimizer step, over all ranks [pictures]", low=1)
    micro_batch: int | None = option(
        None, "per forward pass of a rank; under its share: gradient accumulation; none: its share [pictures]", low=1
    )
    eval_batch: int = option(256, "per forward pass of a rank in evaluation [pictures]", low=1)
    save_every_steps: int | None = option(
        None, "also save inside an epoch, after every so many steps; none: after each epoch only [steps]", low=1
    )
    max_skipped: int = option(
        5, "steps in a row that a NaN or infinity in loss or gradient may spoil, and that are skipped [steps]", low=0
    )
    steps_per_epoch: int | None = option(None, "stop an epoch after so many steps; none: all [steps]", low=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: GPUs (cuda) where there are any")
    precision: Literal["float32", "bfloat16", "float16", "float64"] = option(
        "float32", "bfloat16 and float16: mixed precision (amp, autocast), float16 with loss scaling"
    )
    channels_last: bool = option(True, "channels-last memory format of convolutions")
    compile: bool = option(False, "torch.compile the training step")
    deterministic: bool = option(True, "on GPUs only kernels that give the same bits each time")
    sync_batchnorm: Literal["auto", "always", "never"] = option(
        "auto", "synchronised batch norm, on GPUs; auto: when a rank sees fewer than 16 pictures at once"
    )
    ema: float = option(
        0.0,
        "EMA decay: of the moving average of the weights that is evaluated and saved, 0: off",
        low=0,
        high=0.99999,
    )
    label_smoothing: float = option(
        0.0, "label smoothing: part of a target spread over all classes [fraction]", low=0, high=0.9
    )
    class_weights: Literal["none", "balanced"] = option("none", "balanced: loss weights by inverse class frequency")
    monitor: Literal["loss", "accuracy", "macro_f1"] = option(
        "accuracy", "validation score that picks the best epoch, steps plateau and stops early"
    )
    patience: int = option(0, "early stopping: epochs without gain, 0: off [epochs]", low=0)
    flip_tta: bool = option(False, "evaluation averages the probabilities of a picture and its mirror image")


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All settings of a run."""

    seed: int = option(0, "seed of order, augmentation, initialisation and dropout", low=0, high=2**31 - 1)
    run: RunConfig = section(RunConfig)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)


def load_config(name_or_path: str = "demo", overrides: dict[str, Any] | None = None) -> Config:
    """A recipe by name or a YAML file by path, then dotted overrides.

    Raises:
        UserError: no such file, unknown setting, wrong type or value out of bounds.
    """
    tree = read_yaml(name_or_path)
    try:
        recipe = Config().override(tree)
    except UserError as error:  # say which file: the command line's own settings come after it
        raise UserError(f"{name_or_path}: {error.problem}", error.fix) from None
    return recipe.override(overrides or {})
