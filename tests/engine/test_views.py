"""Log-probabilities: the same from any batches and world sizes; test-time augmentation averages over views."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fer_dist.data.faces import Faces
from fer_dist.data.feed import evaluation_blocks
from fer_dist.engine.score import VIEWS, answers, views
from fer_dist.errors import UserError
from fer_dist.world import World


def logits(images_N1SS: Tensor) -> Tensor:
    """A "network" of three classes: the grey levels of the first three pixels of the first row."""
    return images_N1SS[:, 0, 0, :3].float() / 16


def pictures(count: int, side: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)


FACES = Faces(
    images_NHW=pictures(20, 8).squeeze(1).numpy(),
    labels_N=np.zeros(20, np.int64),
    usage_N=np.zeros(20, np.int64),
    names=[str(i) for i in range(20)],
)


def test_views_of_each_kind() -> None:
    grey = torch.arange(48).view(1, -1) * 2 + torch.arange(48).view(-1, 1)  # rises by 2 a column and 1 a row
    image = grey.to(torch.uint8).view(1, 1, 48, 48)
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
    for side in (1, 2, 5, 64):
        assert all(view.shape[-1] == side for view in views(pictures(2, side), "ten_crop"))


def test_blocks_are_the_same_at_any_world_size() -> None:
    """Batches of 4 of 13 pictures: the same ones on 1, 2, 3 and 9 ranks, each once, in order."""
    rows_M = np.arange(3, 16)
    alone = list(evaluation_blocks(FACES, rows_M, batch=4, rank=0, size=1))
    assert [len(block) for block in alone] == [4, 4, 4, 1]
    assert np.array_equal(torch.cat(alone).squeeze(1).numpy(), FACES.images_NHW[3:16])
    for size in (2, 3, 9):
        ranks = (evaluation_blocks(FACES, rows_M, batch=4, rank=rank, size=size) for rank in range(size))
        shared = [block for blocks in ranks for block in blocks]
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_answers_average_the_views_in_the_order_of_the_rows() -> None:
    rows_M, done = np.array([7, 3, 19, 0, 1]), list[int]()
    images = torch.from_numpy(FACES.images_NHW[rows_M]).unsqueeze(1)
    for kind in VIEWS:
        found = answers(logits, FACES, rows_M, World(), batch=2, kind=kind, progress=done.append)
        expected = torch.stack([logits(view).double().softmax(1) for view in views(images, kind)]).mean(0)
        torch.testing.assert_close(found.exp(), expected, rtol=1e-12, atol=0)
    assert done == [2, 2, 1] * 3

    def broken(images_N1SS: Tensor) -> Tensor:
        raise UserError("broken", "repair it")

    with pytest.raises(UserError, match="broken"):
        answers(broken, FACES, rows_M, World(), batch=2)
