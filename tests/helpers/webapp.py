"""Start the app as a process, and write pictures to show it."""

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.helpers.processes import TIMEOUT_S, Process, free_port
from tests.helpers.synthetic_scenes import scene


@contextmanager
def served(model: Path, folder: Path, **environment: str) -> Iterator[str]:
    """Run `python -m fer_dist.app` in a folder; yields its address."""
    words = ["-m", "fer_dist.app", "--model", str(model), "--no-browser", "--port", str(free_port())]
    app, until = Process([sys.executable, *words], cwd=folder, env=environment), time.monotonic() + TIMEOUT_S
    while not (found := re.search(r"^(http://127\.0\.0\.1:\d+/)  ", app.read()[0], re.M)):
        assert app.alive(), app.read()
        assert time.monotonic() < until, app.read()
        time.sleep(0.1)
    yield found[1]
    app.send(signal.SIGTERM)
    done = app.wait().ok()
    log = done.out + done.err  # what Gradio refuses by itself it notes with a traceback
    assert log.count("Traceback") == log.count("\ngradio.exceptions.InvalidPathError"), log


def pictures(folder: Path) -> Path:
    """Write one.png, none.png and several.png with faces, large.jpg (30 megapixels), giant.png (over the bound), and
    text.png, which is not a picture."""
    Image.fromarray(scene([200], 1).rgb_HW3).save(folder / "one.png")
    Image.fromarray(scene([], 2).rgb_HW3).save(folder / "none.png")
    Image.fromarray(scene([140, 120, 100], 3, width=960, height=640).rgb_HW3).save(folder / "several.png")
    (folder / "text.png").write_text("this is text")
    large = Image.fromarray(scene([200], 1).rgb_HW3).resize((6400, 4800), Image.Resampling.BILINEAR)
    large.save(folder / "large.jpg", quality=85)
    Image.new("L", (8000, 8000), 128).save(folder / "giant.png")
    return folder
