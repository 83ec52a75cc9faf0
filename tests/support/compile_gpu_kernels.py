"""Compiles the GPU's kernels for the architectures named as arguments, without a GPU, and prints what came out.

A process of its own: it needs Triton's compiler, and tests may run Triton's interpreter.
"""

import json
import sys
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from services.quantizer.kernels import triton_kernels

_ACTIVATIONS = {"x": "*fp32", "y": "*fp32"}
_NARROW = {"x": "*bf16", "y": "*bf16"}
_RANGES = {"lo": "*fp32", "hi": "*fp32"}
_LIMITS = {"lo": "fp32", "hi": "fp32"}


def _whole(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


CASES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *(
        (
            "fake_quantize_groups",
            {**types, "bad": "*i32", **_whole("groups", "of", "after")},
            {"bits": 4, "side_by_side": side_by_side, "rows": 1024, "across": 16 if side_by_side else 2},
        )
        for types in (_ACTIVATIONS, _NARROW)
        for side_by_side in (True, False)
    ),
    ("round_to_grid", {**_ACTIVATIONS, **_RANGES, **_whole("count", "of", "after")}, {"bits": 4, "size": 2048}),
    (
        "codes",
        {"v": "*fp32", "inverse": "*fp32", "q": "*fp32", **_whole("count", "channels", "after"), **_LIMITS},
        {"size": 2048},
    ),
    *(
        (
            "codes_backward",
            {**dict.fromkeys(("grad", "v", "inverse", "out", "sums"), "*fp32"), **_whole("before", "channels", "after")}
            | _LIMITS,
            {"rows": 512, "across": 16 if wide else 1, "wide": wide},
        )
        for wide in (True, False)
    ),
]


def main() -> None:
    """Print a line of JSON for each kernel and architecture."""
    for architecture in map(int, sys.argv[1:]):
        for name, signature, constants in CASES:
            function = getattr(triton_kernels, name)
            source = ASTSource(
                fn=function,
                signature={n: signature.get(n, "constexpr") for n in function.arg_names},
                constexprs={(function.arg_names.index(n),): value for n, value in constants.items()},
            )
            target = GPUTarget("cuda", architecture, 32)
            found = compile_kernel(source, target=target, options={"enable_fp_fusion": False, "num_warps": 16})
            ptx = found.asm["ptx"]
            counts = {"fused": ptx.count("fma.rn.f32"), "approximate": ptx.count("div.full") + ptx.count("div.approx")}
            made = {"kernel": name, "architecture": architecture, "bytes": len(found.asm["cubin"])}
            sys.stdout.write(json.dumps({**made, **counts}) + "\n")


if __name__ == "__main__":
    main()
