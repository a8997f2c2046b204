"""`python -m fer_dist.app`: a local page that finds the faces of pictures and of a camera and says what they show."""

import argparse
import os
import signal
import sys
import tempfile
import threading
import warnings
import webbrowser
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

from fer_dist.commandline import Parser, run
from fer_dist.errors import printable

PROG = "python -m fer_dist.app"
ABOUT = """\
Serves a page on this machine alone: upload or paste a picture, or turn on the camera, and see which expression each
face shows. Nothing leaves the machine; uploads are deleted. Ctrl-C ends it."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    given = _parse(argv)

    from fer_dist.serve.faces import YuNet
    from fer_dist.serve.measured import measured
    from fer_dist.serve.predictor import Predictor
    from fer_dist.serve.runner import open_runner
    from fer_dist.serve.shipped import default_model
    from fer_dist.serve.viewer import Viewer

    path = given.model or default_model()
    with (
        open_runner(path, device=given.device, provider=given.device) as runner,
        tempfile.TemporaryDirectory(prefix="fer_dist-", ignore_cleanup_errors=True) as uploads,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata, and what Gradio's packages say to each other
        known = measured(runner)
        closed_environment(Path(uploads), os.environ)
        from fer_dist.serve.page import build, serve  # not before: Gradio reads its settings when it is imported

        page = build(Viewer(Predictor(runner, YuNet(given.detail))), known)
        ended = threading.Event()
        before = {number: signal.signal(number, _ender(ended)) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            address = serve(page, port=given.port)
            print(f"model {printable(str(path))} ({runner.spec.arch}, {runner.precision}) on {runner.runs_on}")
            print(f"  {known or 'its accuracy is not known: its files do not say'}")
            print(f"{address}  (Ctrl-C ends it)", flush=True)
            if not given.no_browser and _has_screen():
                webbrowser.open(address)
            ended.wait()
        finally:
            page.close(verbose=False)
            for number, handler in before.items():
                signal.signal(number, handler)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(PROG, ABOUT)
    parser.add_argument("--model", metavar="FILE", type=Path, help=".pth, .onnx or .engine (the one that ships)")
    parser.add_argument("--port", metavar="N", type=_port, help="of 127.0.0.1 (the first free one from 7860 on)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page, only print its address")
    parser.add_argument("--detail", metavar="PIXELS", type=int, default=960, help="as in predict (960)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the model (auto)")
    return parser.parse_args(argv)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port within 1..65535")
    return int(text)


def closed_environment(uploads: Path, environment: MutableMapping[str, str]) -> None:
    """Take away every setting of Gradio's that a shell may hold, and set those that keep it at home."""
    for name in [name for name in environment if name.startswith("GRADIO_")]:
        del environment[name]
    environment.update(
        {
            "GRADIO_TEMP_DIR": str(uploads),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
    )


def _ender(ended: threading.Event) -> Callable[[int, FrameType | None], None]:
    return lambda number, frame: ended.set()


def _has_screen() -> bool:
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


if __name__ == "__main__":
    main()
