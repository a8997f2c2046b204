"""The page of the app and its API, made with Gradio: the only file that names it.

Gradio reads its settings from the environment when it is imported: `fer_dist.app` closes that first.

Gradio's own reading of pictures is not used: it decodes any size and any format, fetches addresses from the network,
and of a camera's frames believes any length. What arrives here is a file inside of the folder of uploads, or a frame.
"""

import base64
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fer_dist.data.decoding import MAX_PIXELS, Photo, decode_photo
from fer_dist.errors import UserError
from fer_dist.serve import pagehtml
from fer_dist.serve.measured import Measured
from fer_dist.serve.photos import PHOTO_SIDE, read_photo
from fer_dist.serve.predictor import cores
from fer_dist.serve.viewer import Stream, Viewer, plain

LOOPBACK = "127.0.0.1"
MOST_UPLOAD = 32 * 2**20
"""Largest picture that may be uploaded [bytes]."""
MOST_MESSAGE = 8 * 2**20
"""Longest message that is no upload, such as a frame of a camera [bytes]."""
MOST_WAITING = 64
"""Longest queue; whoever comes then is told so at once."""
CAMERAS = 4
"""Cameras at the same time."""
CAMERA_S = 3600
"""A camera is let go after so long [s]."""
FRAME_EVERY_S = 0.1
"""The page sends a frame so often, if the last one is answered [s]."""
KEPT_S = 600
"""Uploads are deleted after so long [s]."""

_SESSIONS = 256
_COLUMN = 300  # picture and result stand one below the other where there is less room for each [pixels]
_FONT = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))  # the 600 that it comes with has no letters
_LARGE_ENOUGH = {"video": {"width": {"ideal": 640}, "height": {"ideal": 480}}}

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]
_Given = Photo | UserError | None


class _Answers:
    """What the page and its API ask, answered by one viewer."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer, self._labels = viewer, viewer.predictor.labels

    def shown(self, given: _Given) -> str:
        if given is None:
            return pagehtml.NOTHING_YET
        try:
            photo = _photo(given)
            return pagehtml.result(
                self._viewer.shown(photo, self._viewer.predictor.photo(photo), heat=True), self._labels
            )
        except UserError as error:
            return pagehtml.problem(error.problem)

    def frame(self, given: _Given, stream: Stream | None) -> tuple[str, Stream]:
        stream = stream or Stream(labels=self._labels)
        if given is None:
            return pagehtml.NO_CAMERA_YET, stream
        try:
            photo = _photo(given)
            faces = stream.add(self._viewer.predictor.photo(photo), time.monotonic())
            return pagehtml.result(self._viewer.shown(photo, faces, heat=True), self._labels, rate=stream.rate), stream
        except UserError as error:
            return pagehtml.problem(error.problem), stream

    def predict(self, given: _Given) -> dict[str, Any]:
        """The faces of a picture: label, probabilities, box [pixels] and confidence of each."""
        try:
            if given is None:
                raise UserError("there is no picture")
            photo = _photo(given)
            return plain(self._viewer.predictor.photo(photo), photo, self._labels)
        except UserError as error:
            raise gr.Error(error.problem, print_exception=False) from None


def build(viewer: Viewer, known: Measured | None) -> gr.Blocks:
    """The page, not yet served.

    Args:
        known: what is known of the model's accuracy.
    """
    answers = _Answers(viewer)
    page: gr.Blocks = gr.Blocks(title="fer_dist", analytics_enabled=False, delete_cache=(60, KEPT_S))
    with page:
        gr.Markdown("# Which expression does a face show?")
        with gr.Tabs():
            with gr.Tab("Picture", id="picture"), gr.Row():
                with gr.Column(min_width=_COLUMN):
                    picture = _bounded(gr.Image(sources=["upload", "clipboard"], label="Picture", elem_id="picture"))
                with gr.Column(min_width=_COLUMN):
                    seen = gr.HTML(pagehtml.NOTHING_YET, elem_id="seen")
            with gr.Tab("Camera", id="camera"), gr.Row():
                with gr.Column(min_width=_COLUMN):
                    camera = _bounded(
                        gr.Image(
                            sources=["webcam"],
                            streaming=True,
                            format="jpeg",
                            label="Camera",
                            elem_id="camera",
                            webcam_options=gr.WebcamOptions(mirror=False, constraints=_LARGE_ENOUGH),
                        )
                    )
                with gr.Column(min_width=_COLUMN):
                    live = gr.HTML(pagehtml.NO_CAMERA_YET, elem_id="live")
        gr.HTML(pagehtml.about(viewer.predictor.runner, known), elem_id="about")
        stream = gr.State(None, time_to_live=CAMERA_S)
        answer, ask = gr.JSON(visible=False), gr.Button(visible=False)
        picture.change(
            answers.shown, picture, seen, api_visibility="private", concurrency_limit=cores(), show_progress="minimal"
        )
        camera.stream(
            answers.frame,
            [camera, stream],
            [live, stream],
            api_visibility="private",
            concurrency_limit=CAMERAS,
            stream_every=FRAME_EVERY_S,
            time_limit=CAMERA_S,
            show_progress="hidden",
        )
        ask.click(answers.predict, picture, answer, api_name="predict", concurrency_limit=cores())
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=cores())
    return page


def serve(page: gr.Blocks, *, port: int | None = None) -> str:
    """Serve the page on loopback from a thread; returns its address. `page.close()` ends it.

    Args:
        port: None: the first free one from 7860 on.

    Raises:
        UserError: the port, or every port that was tried, is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=LOOPBACK,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MOST_UPLOAD,
            allowed_paths=[],
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,  # it would keep what people show in the browser
            footer_links=["api"],
            state_session_capacity=_SESSIONS,
            css=pagehtml.STYLE,
            theme=gr.themes.Default(font=(_FONT, "system-ui", "sans-serif")),
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"]),
                    Middleware(OwnOrigin),
                    Middleware(BoundedMessages),
                ]
            },
        )
    except OSError as error:
        raise UserError(f"no port is free: {error}", "--port N with another number") from None
    return address


class OwnOrigin:
    """ASGI: what a browser sends for a page from elsewhere is refused; Gradio would take its uploads.

    Programs that are no browser name no origin, and pages that only lead here read no answer.
    """

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            said = dict(scope["headers"])
            origin = said.get(b"origin")
            if origin is not None and origin != b"http://" + said.get(b"host", b""):
                await _refuse(send, 403, b"asked by a page from elsewhere")
                return
        await self._app(scope, receive, send)


class BoundedMessages:
    """ASGI: whoever sends more than a message may have is cut off before it is in memory."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = MOST_UPLOAD + 2**20 if scope["path"].rstrip("/").endswith("/upload") else MOST_MESSAGE
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said[:20]) > most:
            await _refuse(send, 413, b"more bytes than a message may have")
            return
        count = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            return {"type": "http.disconnect"} if count > most else message

        await self._app(scope, bounded, send)


async def _refuse(send: _Send, status: int, told: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": told})


def _bounded(image: gr.Image) -> gr.Image:
    """Read pictures ourselves. Not a subclass: Gradio writes a .pyi beside the file of each."""

    async def stay(path: str | Path | None) -> str | None:
        if path is None or "://" in str(path):  # an address: Gradio would fetch it
            raise gr.Error("upload the picture: addresses are not fetched", print_exception=False)
        return str(path)

    def preprocess(payload: Any) -> _Given:
        if payload is None:
            return None
        try:
            if payload.url and payload.url.startswith("data:"):
                return _frame(payload.url)
            return read_photo(_uploaded(payload.path or ""))
        except UserError as error:
            return error

    image.async_move_resource_to_block_cache = stay  # type: ignore[method-assign, assignment]
    image.preprocess = preprocess  # type: ignore[method-assign, assignment]
    return image


def _uploaded(path: str) -> Path:
    """The file of an upload. Gradio looks, too, but only at what says of itself that it is a file.

    Raises:
        UserError: it lies elsewhere.
    """
    found = Path(path).resolve()
    if not found.is_relative_to(Path(gr.utils.get_upload_folder()).resolve()):
        raise UserError("this is no upload")
    return found


def _frame(url: str) -> Photo:
    """A picture out of a data URL.

    Raises:
        UserError: it is none.
    """
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        raw = base64.b64decode(body, validate=True)
    except ValueError:
        raise UserError("a frame is no base64 picture") from None
    photo = decode_photo(raw, side=PHOTO_SIDE)
    if photo.width * photo.height > MAX_PIXELS:
        raise UserError(f"a frame of {photo.width}x{photo.height} pixels, over {MAX_PIXELS:,}")
    return photo


def _photo(given: Photo | UserError) -> Photo:
    if isinstance(given, UserError):
        raise given
    return given
