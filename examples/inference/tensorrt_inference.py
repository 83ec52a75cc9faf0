"""Classify images with TensorRT, or with TensorRT-RTX.

    python tensorrt_inference.py tensorrt model.engine images.npy      # or tensorrt_rtx, as the engine's manifest says

images.npy: float32 N×C×H×W, normalized as for the model that was quantized; N within the engine's batch profile.
Needs tensorrt or tensorrt-rtx, cuda-python and numpy, and a GPU. "granq engine check" says whether an engine fits.
"""

import importlib
import sys
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


def classify(trt: Any, plan: bytes, images: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the class of each image."""
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    source, target = sorted(tensors, key=lambda name: engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT)
    logits: NDArray[np.float32] = np.empty((len(images), engine.get_tensor_shape(target)[1]), np.float32)
    context.set_input_shape(source, images.shape)
    addresses = [must(cuda.cudaMalloc(array.nbytes)) for array in (images, logits)]
    for name, address in zip((source, target), addresses, strict=True):
        context.set_tensor_address(name, int(address))
    # Plain copies wait for the work of streams that were made without flags, and that work for them.
    must(cuda.cudaMemcpy(addresses[0], images.ctypes.data, images.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice))
    if not context.execute_async_v3(int(must(cuda.cudaStreamCreate()))):
        raise RuntimeError("the engine could not run; its log says why")
    must(cuda.cudaMemcpy(logits.ctypes.data, addresses[1], logits.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost))
    return np.asarray(logits.argmax(1))


if __name__ == "__main__":
    module, engine_file, images_file = sys.argv[1:]
    pixels = np.ascontiguousarray(np.load(images_file), np.float32)
    print(*classify(importlib.import_module(module), Path(engine_file).read_bytes(), pixels), sep="\n")
