"""Build hook: compiles protos/ to Python stubs under granq/v1, and the CPU kernels, for wheels and editable installs.

The request rules (protovalidate options) stay in the descriptors as plain bytes, while the import of
buf/validate/validate.proto is dropped. So the generated modules need protobuf alone, a client installs nothing more,
and servers that have protovalidate still find the rules.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VALIDATE = "buf/validate/validate.proto"


def compile_contract(root: Path) -> bytes:
    """Compile protos/granq/v1 of ``root`` to a serialized FileDescriptorSet, comments and rules included."""
    import grpc_tools
    from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
    from grpc_tools import protoc
    from protovalidate import FieldPathPb

    files = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().ParseFromString(FieldPathPb.desc().file.proto.to_binary())
    with TemporaryDirectory() as folder:
        rules, contract = Path(folder, "rules.binpb"), Path(folder, "contract.binpb")
        rules.write_bytes(files.SerializeToString())
        arguments = [
            "protoc",
            f"--descriptor_set_in={rules}",
            f"-I{root / 'protos'}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            "--include_imports",
            "--include_source_info",
            f"-o{contract}",
            *sorted(str(p.relative_to(root / "protos")) for p in root.glob("protos/granq/v1/*.proto")),
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc failed on protos/granq/v1; its message is above")
        return contract.read_bytes()


def without_rules_import(contract: bytes) -> bytes:
    """Return the descriptor set without the file that declares the rules and without imports of it."""
    from google.protobuf import descriptor_pb2

    files = descriptor_pb2.FileDescriptorSet.FromString(contract)
    kept = descriptor_pb2.FileDescriptorSet()
    for file in files.file:
        if file.name == VALIDATE:
            continue
        if VALIDATE in file.dependency:
            file.dependency.remove(VALIDATE)
        kept.file.append(file)
    return kept.SerializeToString()


def generate(root: Path) -> None:
    """Write granq/v1/*_pb2.py, *_pb2_grpc.py and their .pyi files under ``root``."""
    from grpc_tools import protoc

    output = root / "granq" / "v1"
    output.mkdir(exist_ok=True)
    # protoc finds the plugin for typed gRPC stubs beside the interpreter, also when that folder is not on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with TemporaryDirectory() as folder:
        contract = Path(folder, "contract.binpb")
        contract.write_bytes(without_rules_import(compile_contract(root)))
        names = sorted(f"granq/v1/{p.name}" for p in (root / "protos" / "granq" / "v1").glob("*.proto"))
        arguments = ["protoc", f"--descriptor_set_in={contract}"]
        arguments += [f"--{plugin}_out={root}" for plugin in ("python", "pyi", "grpc_python", "mypy_grpc")]
        if protoc.main([*arguments, *names]) != 0:
            raise RuntimeError("protoc could not write the stubs; its message is above")
    (output / "__init__.py").write_text('"""Stubs generated from protos/granq/v1."""\n')


def compile_kernels(root: Path) -> bool:
    """Compile the CPU kernels beside their sources; return whether there are all of them now.

    A machine without a C++ compiler gets none, and the services compute the same in plain PyTorch, more slowly.
    """
    header = root / "services" / "common" / "kernels" / "values.h"
    sources = sorted(root.glob("services/*/kernels/*.cpp"))
    # Named by its source, so that a library of other source is never loaded.
    missing = {}
    for source in sources:
        digest = hashlib.sha256(header.read_bytes() + source.read_bytes()).hexdigest()[:12]
        library = source.with_name(f"_{source.stem}_{digest}.so")
        if not library.exists():
            missing[source] = library
    if not missing:
        return True
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        sys.stderr.write("no C++ compiler (Debian: g++): the CPU kernels are left out\n")
        return False
    # A compiler may know one source's instructions and not the other's.
    compiled = [_compile(compiler, root, source, library) for source, library in missing.items()]
    return all(compiled)


def _compile(compiler: str, root: Path, source: Path, library: Path) -> bool:
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-exceptions", "-fno-rtti", f"-I{root}"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    # GCC peels loops over 8 and 16 columns before it could make vectors of them, which takes up to four times as long.
    flags += ["--param=max-completely-peel-times=7"]
    with TemporaryDirectory(dir=source.parent) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        # In two steps, so that OpenMP's library is not linked: PyTorch brings its own.
        steps: list[list[str | Path]] = [[*flags, "-c", source, "-o", compiled], ["-shared", compiled, "-o", linked]]
        for arguments in steps:
            run = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
            if run.returncode != 0:
                sys.stderr.write(f"{source.name} does not compile and is left out:\n{run.stderr}")
                return False
        for old in source.parent.glob(f"_{source.stem}_*.so"):
            old.unlink(missing_ok=True)
        linked.replace(library)
    return True


class ContractBuildHook(BuildHookInterface[Any]):
    """Generates the stubs and compiles the kernels before hatchling collects the files."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run for every build of a wheel; an sdist carries the protos instead."""
        if self.target_name == "wheel":
            generate(Path(self.root))
            if compile_kernels(Path(self.root)):
                # The kernels know nothing of Python, only of the processor.
                build_data["pure_python"] = False
                platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    generate(Path(__file__).parent)
    compile_kernels(Path(__file__).parent)
