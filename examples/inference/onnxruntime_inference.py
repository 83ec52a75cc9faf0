"""Classify images with ONNX Runtime on the CPU.

    python onnxruntime_inference.py model_ort.onnx images.npy

images.npy: float32 N×C×H×W, normalized as for the model that was quantized. Needs onnxruntime and numpy.
"""

import argparse

import numpy as np
import onnxruntime
from numpy.typing import NDArray


def load(model: str) -> onnxruntime.InferenceSession:
    """Open a graph; model_ort.onnx runs INT8 kernels."""
    options = onnxruntime.SessionOptions()
    # On x86 CPUs without VNNI sums of 8-bit products saturate otherwise, and classes change. No cost on other CPUs.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def classify(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the class of each image."""
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    classes: NDArray[np.int64] = np.asarray(logits).argmax(1)
    return classes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("images")
    arguments = parser.parse_args()
    print(*classify(load(arguments.model), np.load(arguments.images).astype(np.float32)), sep="\n")
