"""Test-time augmentation: which views there are, and how they are averaged; answers in order at any world size."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fer_dist.data.faces import Faces
from fer_dist.data.feed import evaluation_blocks
from fer_dist.engine.score import answers, log_probabilities, views
from fer_dist.errors import UserError
from fer_dist.world import World


def slope(side: int) -> Tensor:
    """Grey that rises by 2 a column and 1 a row: uint8 `[1, 1, side, side]`."""
    grey = torch.arange(side).view(1, -1) * 2 + torch.arange(side).view(-1, 1)
    return grey.to(torch.uint8).view(1, 1, side, side)


def logits(images_N1SS: Tensor) -> Tensor:
    """Of three classes: the grey of three pixels of the first row."""
    return images_N1SS[:, 0, 0, :3].float() / 16


def test_views_of_each_kind() -> None:
    image = slope(48)
    assert [torch.equal(view, image) for view in views(image, "none")] == [True]
    plain, mirrored = views(image, "flip")
    assert torch.equal(plain, image)
    assert torch.equal(mirrored, image.flip(-1))
    ten = list(views(image, "ten_crop"))
    assert len(ten) == 10
    assert {(view.shape, view.dtype) for view in ten} == {((1, 1, 48, 48), torch.uint8)}
    for even, odd in zip(ten[::2], ten[1::2], strict=True):
        assert torch.equal(odd, even.flip(-1))
    # 44 of 48 pixels: corners begin 0 or 4 pixels in, the middle 2; where a crop begins is its darkest pixel.
    assert [int(view[0, 0, 0, 0]) for view in ten[::2]] == [0, 8, 4, 12, 6]
    assert [int(view.max()) for view in ten[::2]] == [3 * 43 + start for start in (0, 8, 4, 12, 6)]


@pytest.mark.parametrize("side", [1, 2, 5, 64])
def test_crops_of_any_size(side: int) -> None:
    assert all(view.shape[-1] == side for view in views(torch.full((2, 1, side, side), 9).to(torch.uint8), "ten_crop"))


def test_probabilities_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 1, 12, 12), generator=generator, dtype=torch.uint8)
    expected = torch.stack([logits(view).double().softmax(1) for view in views(images, "ten_crop")]).mean(0)
    found = log_probabilities(logits, images, "ten_crop")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(found, log_probabilities(logits, images))


def some_faces(count: int) -> Faces:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    zeros = np.zeros(count, np.int64)
    return Faces(images_NHW=images, labels_N=zeros, usage_N=zeros, names=[str(i) for i in range(count)])


def test_blocks_are_the_same_at_any_world_size() -> None:
    """Batches of 4 of 13 pictures: the same ones on 1, 2, 3 and 9 ranks, each once, in order."""
    faces, rows = some_faces(20), np.arange(3, 16)
    alone = list(evaluation_blocks(faces, rows, batch=4, rank=0, size=1))
    assert [len(block) for block in alone] == [4, 4, 4, 1]
    assert np.array_equal(torch.cat(alone).squeeze(1).numpy(), faces.images_NHW[3:16])
    for size in (2, 3, 9):
        shared = [
            block for rank in range(size) for block in evaluation_blocks(faces, rows, batch=4, rank=rank, size=size)
        ]
        assert len(shared) == 4
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_answers_are_in_the_order_of_the_rows() -> None:
    faces, rows, told = some_faces(20), np.array([7, 3, 19, 0, 1]), list[int]()
    found = answers(logits, faces, rows, World(), batch=2, progress=told.append)
    images = torch.from_numpy(faces.images_NHW[rows]).unsqueeze(1)
    torch.testing.assert_close(found, logits(images).double().log_softmax(1))
    assert told == [2, 2, 1]


def test_an_error_of_the_model_comes_through() -> None:
    def broken(images_N1SS: Tensor) -> Tensor:
        raise UserError("broken", "mend it")

    with pytest.raises(UserError, match="broken"):
        answers(broken, some_faces(3), np.arange(3), World(), batch=2)
