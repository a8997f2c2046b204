"""A folder made by `save_pretrained`: what it says about the network, and where its weights are.

Such folders come from strangers, too: what is read is bounded, and no file outside of it is.
"""

import json
from pathlib import Path
from typing import Any

from fer_dist.errors import UserError
from fer_dist.tensors import first_line

MAX_JSON_BYTES, MAX_INDEX_BYTES = 2**20, 16 * 2**20
"""Largest config.json, and largest index of shards."""


def read_folder(model_type: str, folder: str) -> dict[str, Any]:
    """What `config.json` and `preprocessor_config.json` of a local folder say, sizes as plain integers.

    Raises:
        UserError: there is no config.json, it is no JSON of at most MAX_JSON_BYTES or of another
            architecture than `model_type`; a mean or deviation is none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"model.weights: {folder} is not a folder with a config.json",
            "--model.weights with a folder made by save_pretrained",
        )
    found = _read_json(path)
    for name in ("image_size", "patch_size"):
        if isinstance(found.get(name), list) and found[name]:
            found[name] = found[name][0]
    found = {name: _shown(value) for name, value in found.items()}
    if found.get("model_type") != model_type:
        raise UserError(
            f"model.weights: {folder} holds a {found.get('model_type')!r}, expected {model_type!r}",
            f"--model.arch {found.get('model_type')}, or another folder",
        )
    picture = Path(folder) / "preprocessor_config.json"
    shown = _read_json(picture) if picture.is_file() else {}
    for name in ("image_mean", "image_std"):
        if name in shown and not _is_colour(shown[name], 0.0 if name == "image_mean" else 1e-6):
            raise UserError(
                f"model.weights: {name} in {picture} is no list of three numbers in 0..1, above 0 for image_std",
                "put the folder right",
            )
    return found | {name: shown[name] for name in ("image_mean", "image_std") if name in shown}


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a local folder: one, or the shards that an index names.

    Raises:
        UserError: there are none; the index is no index, or names a file outside of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
            names = list(places.values()) if isinstance(places, dict) else []
            if not names or not all(isinstance(name, str) for name in names):
                raise UserError(f"model.weights: {index} names no files of weights", "put the folder right")
            return [_inside(folder, place, index) for place in sorted(set(names))]
    raise UserError(
        f"model.weights: {folder} holds no model.safetensors or pytorch_model.bin",
        "use a whole folder made by save_pretrained",
    )


def _inside(folder: Path, name: str, index: Path) -> Path:
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]  # the hub's cache links so
    try:
        path = (home / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # not there, a link to itself, no name at all
        path = None
    if path is None or not any(map(path.is_relative_to, homes)):
        raise UserError(
            f"model.weights: {index} names {name[:80]!r}, which is not in its folder",
            "put the folder right, and do not trust it if it came like this",
        )
    return path


def _shown(value: Any) -> Any:
    """A plain value; of others, and of long text, what an error can quote."""
    if isinstance(value, str):
        return value[:80]
    return value if isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _is_colour(value: Any, low: float) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(number, int | float) and low <= number <= 1 for number in value)
    )


def _read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        found = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.weights: {path} is not JSON ({first_line(error)})", "put the folder right") from None
    return found if isinstance(found, dict) else {}
