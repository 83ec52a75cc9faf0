import torch

from services.quantizer.flat_areas import SHARE, FlatAreas

BLACK, WHITE = torch.tensor([-0.8, -0.5, 0.0]), torch.tensor([2.7, 1.5, 1.0])


def test_a_rectangle_stays_and_the_rest_is_a_colour_that_a_pixel_can_have() -> None:
    images = torch.randn(256, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    flat = FlatAreas(BLACK, WHITE, seed=3)
    result = flat(images, 7)
    kept = (result == images).all(1)
    grounds: list[float] = []
    for image, mask in zip(result, kept, strict=True):
        if mask.all():
            continue
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert int(mask.sum()) == len(rows) * len(columns) >= 3 * 5
        ground = image[:, ~mask]
        assert (ground == ground[:, :1]).all()
        levels = (ground[:, 0] - BLACK) / (WHITE - BLACK)
        assert torch.allclose(levels, levels[0].expand(3), atol=1e-5)
        assert -1e-6 <= float(levels[0]) <= 1 + 1e-6
        grounds.append(round(float(levels[0]), 4))
    assert abs(len(grounds) / 256 - SHARE) < 0.12
    assert grounds.count(0.0) > grounds.count(1.0) > 0
    assert len(set(grounds)) > 10


def test_draws_follow_from_seed_and_number_alone() -> None:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    black, white = BLACK[:1], WHITE[:1]
    first = FlatAreas(black, white, seed=1)(images, 5)
    assert torch.equal(first, FlatAreas(black, white, seed=1)(images, 5))
    assert not torch.equal(first, FlatAreas(black, white, seed=2)(images, 5))
    assert not torch.equal(first, FlatAreas(black, white, seed=1)(images, 6))
