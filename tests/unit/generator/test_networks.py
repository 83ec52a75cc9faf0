import pytest
import torch
from torch.nn import functional as F

from services.generator.networks import LATENT, ConditionalBatchNorm2d, ConditionalGenerator, UpsampledConv2d


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 30, 30), (3, 224, 224), (3, 17, 9), (4, 12, 40)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    images = ConditionalGenerator(shape, 10)(torch.randn(4, LATENT), torch.arange(4))
    assert images.shape == (4, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    assert bool((images.var((0, 2, 3), correction=0) > 0.5).all())


@pytest.mark.parametrize(("num_classes", "conditional"), [(200, False), (201, True), (1000, True)])
def test_labels_matter(num_classes: int, conditional: bool) -> None:
    torch.manual_seed(0)
    generator = ConditionalGenerator((3, 8, 8), num_classes)
    assert generator.conditional is conditional
    if conditional:
        # At first all classes share scale 1 and shift 0; training tells them apart.
        assert isinstance(generator.norm0, ConditionalBatchNorm2d)
        torch.nn.init.normal_(generator.norm0.scale.weight)
    z = torch.randn(3, LATENT)
    one, other = generator(z, torch.tensor([0, 1, 2])), generator(z, torch.tensor([0, 1, 3]))
    assert not torch.equal(one[2], other[2])


def test_conditional_batch_norm() -> None:
    norm = ConditionalBatchNorm2d(2, 3, eps=1e-5)
    torch.nn.init.normal_(norm.scale.weight)
    torch.nn.init.normal_(norm.shift.weight)
    x, labels = torch.randn(4, 2, 3, 3), torch.tensor([0, 2, 2, 1])
    plain = torch.nn.functional.batch_norm(x, None, None, training=True)
    for sample, label in enumerate(labels):
        expected = plain[sample] * norm.scale.weight[label][:, None, None] + norm.shift.weight[label][:, None, None]
        torch.testing.assert_close(norm(x, labels)[sample], expected)


@pytest.mark.parametrize("size", [None, (10, 6), (9, 5), (7, 7)])
def test_upsampled_convolution(size: tuple[int, int] | None) -> None:
    layer = UpsampledConv2d(4, 6).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(F.interpolate(x, size=size or (10, 6)), layer.weight, layer.bias, padding=1)
    result = layer(x, size)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    for mine, theirs in zip(
        torch.autograd.grad((result * weights).sum(), [x, *layer.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_known_pixels_bound_the_images_and_both_ends_can_be_reached() -> None:
    black, white = torch.tensor([-2.1, -0.5, -1.0]), torch.tensor([2.6, 0.5, 3.0])
    generator = ConditionalGenerator((3, 8, 8), 10, (black, white))
    images = generator(torch.randn(4, LATENT), torch.arange(4))
    assert bool((images >= black.view(1, 3, 1, 1)).all())
    assert bool((images <= white.view(1, 3, 1, 1)).all())
    for bias, end in ((-100.0, black), (100.0, white)):
        torch.nn.init.constant_(generator.conv3.bias, bias)  # type: ignore[arg-type]
        images = generator(torch.randn(4, LATENT), torch.arange(4))
        torch.testing.assert_close(images, end.view(1, 3, 1, 1).expand_as(images))
