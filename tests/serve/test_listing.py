"""Which files a command line names, and where their annotated copies lie."""

from pathlib import Path

import pytest

from fer_dist.errors import UserError
from fer_dist.serve.listing import pictures, targets


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root: Path, *named: str, without: str | None = None) -> list[str]:
    found = pictures([root / name for name in named], without=root / without if without else None)
    return [source.path.relative_to(root).as_posix() for source in found.sources]


def test_files_are_listed_as_named_and_folders_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "f/z.JPG", "f/deep/a.webp", "f/text.txt", "f/.hidden.png", "f/.git/x.png", "odd.txt")
    found = listed(tmp_path, "b.png", "f", "missing.png", "odd.txt")
    assert found == ["b.png", "f/deep/a.webp", "f/z.JPG", "missing.png", "odd.txt"]
    folder = pictures([tmp_path / "f"])
    assert (folder.others, folder.problems) == (1, [])


def test_a_folder_without_pictures_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "f/text.txt")
    assert pictures([tmp_path / "f"]).problems == [(tmp_path / "f", "holds no picture")]


def test_links_that_loop_end(tmp_path: Path) -> None:
    touch(tmp_path, "f/a.png")
    for name, target in (("again", tmp_path / "f"), ("loop.png", "loop.png"), ("gone.png", "nowhere.png")):
        (tmp_path / "f" / name).symlink_to(target)
    assert listed(tmp_path, "f") == ["f/a.png", "f/gone.png", "f/loop.png"]


def test_the_folder_of_the_results_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "f/a.png", "f/out/a.png", "f/output/b.png")
    assert listed(tmp_path, "f", without="f/out") == ["f/a.png", "f/output/b.png"]
    assert listed(tmp_path, "f", without="elsewhere") == ["f/a.png", "f/out/a.png", "f/output/b.png"]
    found = pictures([tmp_path / "f"], without=tmp_path / "f")
    assert found.problems == [(tmp_path / "f", "is the folder of the results, too")]


def test_copies_lie_as_their_sources_did(tmp_path: Path) -> None:
    touch(tmp_path, "f/a.png", "f/a.jpg", "f/deep/a.gif", "g/a.PNG", "g/x.y.jpeg")
    found = targets(pictures([tmp_path / "f", tmp_path / "g"]).sources, tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jpg", "a.png", "deep/a.png", "a-2.png", "x.y.jpg"]


@pytest.mark.parametrize("out", ["f", "link", "f/../f"])
def test_a_source_is_never_replaced(out: str, tmp_path: Path) -> None:
    touch(tmp_path, "f/a.png")
    (tmp_path / "link").symlink_to("f")
    sources = pictures([tmp_path / "f" / "a.png"], without=tmp_path / out).sources
    with pytest.raises(UserError, match=r"would replace .*a\.png"):
        targets(sources, tmp_path / out)
