import pytest
import torch

from cheaplunch.augmentation import augment, rotate
from cheaplunch.synthesis import Batch


def batch_of(height: int, width: int, side: int, count: int = 1) -> Batch:
    """Every pixel of an image is another grey, and its label says which half; beyond is padding."""
    images, labels = torch.zeros(count, 1, side, side), torch.zeros(count, side, side, dtype=torch.uint8)
    shown = 0.1 + 0.8 * torch.arange(height * width).reshape(height, width) / (height * width)
    images[:, 0, :height, :width] = shown
    labels[:, :height, :width] = (shown > 0.5).byte() + 1
    return Batch(images, labels, torch.tensor([[width, height]] * count))


def test_half_are_turned_and_flipped_half_of_the_rest_rotated_and_no_pixel_leaves_its_label():
    batch = batch_of(20, 30, 32, 400)
    done = augment(batch, [torch.Generator().manual_seed(n) for n in range(400)])
    kept = turned = 0
    sights = set()
    for n in range(400):
        width, height = done.sizes[n].tolist()
        image, label = done.images[n, 0], done.labels[n]
        assert not image[height:].any() and not image[:, width:].any() and not label[height:].any()
        shown = image[:height, :width]
        if torch.equal(shown.flatten().sort().values, batch.images[n, 0, :20, :30].flatten().sort().values):
            kept += torch.equal(image, batch.images[n, 0])
            turned += not torch.equal(image, batch.images[n, 0])
            sights.add((height, *shown[[0, 0, -1], [0, -1, 0]].tolist()))
            assert torch.equal(label[:height, :width], (shown > 0.5).byte() + 1)
        else:  # rotated about the middle, where it stays what it was
            assert (height, width) == (20, 30)
            assert shown[10, 15] == pytest.approx(batch.images[n, 0, 10, 15].item(), abs=0.03)
    assert 160 < turned < 240 and 70 < kept < 140
    assert len(sights) == 5  # a quarter turn and then a flip is one of four reflections; and as it was


def test_a_rotation_is_of_pixels_also_where_the_image_is_not_square():
    image, label = torch.zeros(1, 21, 41), torch.zeros(21, 41, dtype=torch.uint8)
    label[10, 30] = 3  # 10 px right of the middle
    image[0, 10, 30] = 1
    moved, outlined = rotate(image, label, 90.0)
    assert outlined.nonzero().tolist() in ([[0, 20]], [[20, 20]])  # 10 px above or below
    assert torch.equal(moved[0] > 0.5, outlined == 3)
    same, _ = rotate(image, label, 0.0)
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)


def test_the_same_generator_does_the_same():
    batch = batch_of(20, 30, 32)
    for seed in range(5):
        one, two = (augment(batch, [torch.Generator().manual_seed(seed)]) for _ in range(2))
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
