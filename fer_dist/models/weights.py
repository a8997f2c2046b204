"""Pretrained weights: find them without waiting, and refuse those that do not fit.

A cache is asked first, the network only then, and only after a look whether anybody answers:
the clients of the hubs would retry for a minute before they gave up.
"""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from fer_dist.errors import UserError
from fer_dist.tensors import NotTensors, first_line, read_tensors

PROBE_SECONDS = 5.0
"""How long a hub may take to answer before it counts as out of reach."""

_WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIX = re.compile(r"^(_orig_mod\.)?(module\.)?(_orig_mod\.)?")


def unavailable(what: str, reason: str) -> UserError:
    """The one error for weights that are neither cached nor within reach: it names the three ways."""
    return UserError(
        f"the pretrained weights {what} are not in the cache and cannot be fetched ({reason})",
        "connect once so that they are cached, or --model.weights PATH (a local copy),"
        " or --model.pretrained false (random weights)",
    )


def out_of_reach(url: str) -> str | None:
    """Why a download from `url` cannot work, or None when somebody answers there (proxies included)."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # somebody answered; what they mind is for the real download to say
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None


def fetch_from_url(url: str) -> Path:
    """A file in torch.hub's cache (`$TORCH_HOME/hub/checkpoints`), downloaded and checked if need be.

    Raises:
        UserError: not cached, and nobody answers or the download fails.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    reason = out_of_reach(url)
    if reason is None:
        digest = re.search(r"-([a-f0-9]{8,})\.", path.name)  # torchvision's and timm's convention
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest and digest[1], progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = str(error)
    if reason is not None:
        raise unavailable(path.name, reason)
    return path


def fetch_from_hub(repository: str, filenames: Sequence[str]) -> Path:
    """The first of `filenames` that a Hugging Face repository has: from the cache, else downloaded.

    Raises:
        UserError: none is cached, and the hub is out of reach, switched off (`HF_HUB_OFFLINE`) or refuses.
    """
    for filename in filenames:
        cached = huggingface_hub.try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            return Path(cached)
    reason: str | None = "HF_HUB_OFFLINE is set"
    if not huggingface_hub.is_offline_mode():
        reason = out_of_reach(huggingface_hub.hf_hub_url(repository, filenames[0]))
    if reason is None:
        for filename in filenames:
            try:
                return Path(huggingface_hub.hf_hub_download(repository, filename))
            except Exception as error:  # the hub's HTTP client, and so its errors, changed twice
                reason = first_line(error)
    raise unavailable(repository, reason or "")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file of torch.save or safetensors, without the wrappings of training scripts.

    Taken off are dictionaries around it (`state_dict_ema`, `model_ema`, `state_dict`, `model`: the first
    that is there, as in timm), and `module.` and `_orig_mod.` in front of names.

    Raises:
        UserError: no such file, unreadable, refused as unsafe, or not a dictionary of names and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}", "--model.weights with the path of a .pth file")
    try:
        state = read_tensors(path)
    except OSError as error:
        raise UserError(f"model.weights: {path} cannot be read: {error.strerror}", "check its permissions") from None
    except NotTensors as error:
        raise UserError(
            f"model.weights: {path} is not a file of tensors that can be read safely: {error}",
            "use the original file of the weights, whole and saved as a state dict",
        ) from None
    wrapping = next(
        (name for name in _WRAPPINGS if isinstance(state, dict) and isinstance(state.get(name), dict)), None
    )
    state = state if wrapping is None else state[wrapping]
    if not state or not isinstance(state, dict) or not all(map(_is_entry, state.items())):
        raise UserError(f"model.weights: {path} is not a state dict (names and tensors)", "save model.state_dict()")
    return {_PREFIX.sub("", name): value for name, value in state.items()}


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `module`: every name and every shape must agree.

    Raises:
        UserError: names are missing or unknown, or shapes differ; says which and where they came from.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    require_fit(source, missing, unknown, sorted(shapes))
    module.load_state_dict(state)


def require_fit(source: str | Path, missing: Sequence[str], unknown: Sequence[str], shapes: Sequence[str]) -> None:
    """Raise unless the weights from `source` fit the backbone name by name.

    Raises:
        UserError: at least one list is not empty.
    """
    found = [
        f"{len(names)} {what} ({', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if found:
        raise UserError(
            f"the weights in {source} do not fit this network: {'; '.join(found)}",
            "use weights of the same architecture and options, or --model.pretrained false",
        )
