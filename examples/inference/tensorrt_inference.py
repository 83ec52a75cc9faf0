"""Classify images with TensorRT, or with TensorRT-RTX.

    python tensorrt_inference.py model.engine images.npy [--rtx]

images.npy: float32 N×C×H×W, normalized as for the model that was quantized; N within the engine's batch profile.
Needs tensorrt or tensorrt-rtx, cuda-python and numpy, and a GPU. "granq engine check" says whether an engine fits.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda  # cudart, of cuda-python
from numpy.typing import NDArray


def must(answer: tuple[Any, ...]) -> Any:
    """Return what a call gave beside its status, or raise."""
    if int(answer[0]):
        raise RuntimeError(str(answer[0]))
    return answer[1] if len(answer) > 1 else None


def classify(trt: Any, plan: bytes, images: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the class of each image."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    source, target = sorted(names, key=lambda name: engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT)
    logits = np.empty((len(images), engine.get_tensor_shape(target)[1]), np.float32)
    stream = must(cuda.cudaStreamCreate())
    addresses = [must(cuda.cudaMalloc(array.nbytes)) for array in (images, logits)]
    context.set_input_shape(source, images.shape)
    for name, address in zip((source, target), addresses, strict=True):
        context.set_tensor_address(name, int(address))
    to_gpu, to_host = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    must(cuda.cudaMemcpyAsync(addresses[0], images.ctypes.data, images.nbytes, to_gpu, stream))
    if not context.execute_async_v3(int(stream)):
        raise RuntimeError("the engine could not run; its log says why")
    must(cuda.cudaMemcpyAsync(logits.ctypes.data, addresses[1], logits.nbytes, to_host, stream))
    must(cuda.cudaStreamSynchronize(stream))
    classes: NDArray[np.int64] = logits.argmax(1)
    return classes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", type=Path)
    parser.add_argument("images")
    parser.add_argument("--rtx", action="store_true")
    arguments = parser.parse_args()
    module = importlib.import_module("tensorrt_rtx" if arguments.rtx else "tensorrt")
    pixels = np.ascontiguousarray(np.load(arguments.images), np.float32)
    print(*classify(module, arguments.engine.read_bytes(), pixels), sep="\n")
