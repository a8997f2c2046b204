"""Which files a command line names, and where their annotated copies lie."""

from pathlib import Path

import pytest

from fer_dist.errors import UserError
from fer_dist.serve.listing import pictures, targets


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root: Path, *named: str, without: str = "elsewhere") -> list[str]:
    found = pictures([root / name for name in named], without=root / without)
    return [source.path.relative_to(root).as_posix() for source in found.sources]


def test_files_are_listed_as_named_and_folders_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "f/z.JPG", "f/deep/a.webp", "f/text.txt", "f/.hidden.png", "f/.git/x.png", "odd.txt")
    for name, target in (("again", tmp_path / "f"), ("loop.png", "loop.png")):
        (tmp_path / "f" / name).symlink_to(target)
    found = listed(tmp_path, "b.png", "f", "missing.png", "odd.txt")
    assert found == ["b.png", "f/deep/a.webp", "f/loop.png", "f/z.JPG", "missing.png", "odd.txt"]


def test_the_folder_of_the_results_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "f/a.png", "f/out/a.png", "f/output/b.png")
    assert listed(tmp_path, "f", without="f/out") == ["f/a.png", "f/output/b.png"]
    assert listed(tmp_path, "f") == ["f/a.png", "f/out/a.png", "f/output/b.png"]
    found = pictures([tmp_path / "f"], without=tmp_path / "f")
    assert found.problems == [(tmp_path / "f", "is the folder of the results, too")]


def test_copies_lie_as_their_sources_did(tmp_path: Path) -> None:
    touch(tmp_path, "f/a.png", "f/a.jpg", "f/deep/a.gif", "g/a.PNG", "g/x.y.jpeg")
    found = targets(pictures([tmp_path / "f", tmp_path / "g"]).sources, tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jpg", "a.png", "deep/a.png", "a-2.png", "x.y.jpg"]


def test_a_source_is_never_replaced(tmp_path: Path) -> None:
    """Not through a link either."""
    touch(tmp_path, "f/a.png")
    (tmp_path / "link").symlink_to("f")
    with pytest.raises(UserError, match=r"would replace .*a\.png"):
        targets(pictures([tmp_path / "f" / "a.png"]).sources, tmp_path / "link")
