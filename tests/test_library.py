"""As a library: `from fer_dist import Config, fit`, in one process, without a launcher."""

from pathlib import Path

from tests.helpers.processes import python

SCRIPT = """
from fer_dist import Config, UserError, fit

config = Config().override({
    "run": {"progress": "none", "tensorboard": False},
    "data": {"embedded_train": 64, "embedded_val": 21},
    "model": {"arch": "patt_lite", "pretrained": False, "image_size": 48},
    "model.options": {"width_mult": 0.25, "channels": 32, "cut": 3},
    "train": {"device": "cpu", "global_batch": 32, "epochs": 2},
})
heard = []
result = fit(config, on_epoch=lambda record: heard.append(record.epoch))
assert heard == [1, 2]
assert len(result.losses) == 4
assert len(result.records) == 2
assert result.best.count == 21
assert (result.folder / "best.pth").is_file()
assert result.folder.parts[0] == "runs"

again = fit(config)  # a notebook runs its cell twice
assert again.folder != result.folder
assert again.losses == result.losses

try:
    fit(config.override({"run.name": again.folder.name}))
except UserError as error:
    print("refused:", error.problem)

import torch.distributed
assert not torch.distributed.is_initialized()
"""


def test_fit_in_one_process(tmp_path: Path) -> None:
    done = python("-W", "error", "-c", SCRIPT, cwd=tmp_path).ok()
    assert "a run is never overwritten" in done.out
    assert done.err == ""
