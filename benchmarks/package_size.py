"""What a network weighs in each form, as a table.

    python -m benchmarks.package_size --bits 4 --bits 8

Weights are random and ranges calibrated on noise: sizes need no more. A package's size depends on the network and the
bits alone, save for what deflate makes of the scales.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer
from torch import nn

from benchmarks.results_table import Table
from granq.v1 import packages_pb2
from services.common.models.capture import capture
from services.common.models.cifar_resnet import resnet20
from services.common.onnx_runtime_flavour import to_onnx_runtime
from services.common.package import write_package
from services.quantizer.calibrate import calibrate
from services.quantizer.config import Quantization
from services.quantizer.integer import packed_bytes, to_integer
from services.quantizer.jobs import layer_reports
from services.quantizer.onnx_export import export_float, export_trt
from services.quantizer.student import build_student

SIDE, CHANNELS, IMAGES = 64, 3, 8
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": resnet20,
    "ResNet-18": torchvision.models.resnet18,
    "MobileNetV2": torchvision.models.mobilenet_v2,
}


def measure(network: Callable[[], nn.Module], bits: int) -> tuple[int, int, int, int]:
    """Return bytes of the float ONNX file, the ``trt`` one, the weights and scales alone, and the package."""
    shape = (CHANNELS, SIDE, SIDE)
    torch.manual_seed(0)
    model = capture(_settled(network()), shape)
    student = build_student(model, Quantization(bits, bits))
    calibrate(student, torch.randn(IMAGES, *shape))
    integer = to_integer(student)
    trt = export_trt(integer, shape)
    about = packages_pb2.PackageManifest(model_name="model.pt2", input_shape=shape, layers=layer_reports(integer))
    package = write_package(trt.SerializeToString(), to_onnx_runtime(trt).SerializeToString(), about)
    return export_float(model, shape).ByteSize(), trt.ByteSize(), packed_bytes(integer), len(package)


def _settled(network: nn.Module) -> nn.Module:
    """Draw BatchNorm's values, too: when created, all scales are alike and all biases zero, and deflate to nothing."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.uniform_(low, high)
    return network.eval()


def main(
    bits: Annotated[list[int], typer.Option(help="Of weights and activations, 2 to 8; repeatable.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write, after each row.")] = None,
) -> None:
    """Print sizes in bytes."""
    torch.set_num_threads(threads)
    columns = (
        "network",
        "bits",
        "float ONNX",
        "model_trt.onnx",
        "packed weights and scales",
        "package",
        "beyond packed",
    )
    notes = ("Bytes. Packed: weights at their bits, scales and biases in float32, nothing else.",)
    table = Table(out, "Sizes of device packages", columns, notes)
    for name, network in NETWORKS.items():
        for width in bits:
            sizes = measure(network, width)
            table.add(name, width, *(f"{size:,}" for size in sizes), f"{100 * (sizes[3] / sizes[2] - 1):+.1f} %")


if __name__ == "__main__":
    typer.run(main)
