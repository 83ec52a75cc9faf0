"""What stands in for parts of NVIDIA's images that no registry within reach has: wheels, and an archive of Python.

Nothing here imitates TensorRT. Its bindings are NVIDIA's own, as PyPI has them; its libraries are simply absent, so
that `import tensorrt` fails in these images, naming the library.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JETSON_PYTHON = "3.11"
"""Python of the Jetson's replay: Debian's, since the Dockerfile's own is downloaded from where nothing is reached."""
_LIBRARIES = "tensorrt-cu13-libs"
_BINDINGS = "tensorrt-cu12-bindings"


def write_wheel(
    folder: Path, project: str, version: str, files: Mapping[str, bytes], tag: str = "py3-none-any"
) -> Path:
    """Write a wheel without dependencies, and return it.

    Args:
        folder: Where it goes.
        project: Name of the distribution.
        version: Its version.
        files: Content of each file, by its path in site-packages.
        tag: Python, ABI and platform that it is for.
    """
    stem = f"{project.replace('-', '_')}-{version}"
    info = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode(),
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    content = {**files, **info}
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},{_record_hash(data)},{len(data)}" for name, data in content.items()]
    content[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def tensorrt_libraries(folder: Path) -> None:
    """Write an empty wheel in place of TensorRT's libraries; PyPI's package of that name fetches them from NVIDIA.

    Its version is that of the bindings in constraints/dev.txt, so that bindings and metapackage, which are PyPI's, fit.

    Raises:
        ValueError: The lock has no such bindings.
    """
    found = re.search(r"^tensorrt-cu13-bindings==(\S+)", (ROOT / "constraints/dev.txt").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError("constraints/dev.txt has no tensorrt-cu13-bindings")
    write_wheel(folder, _LIBRARIES, found[1], {})


def jetson_bindings(folder: Path, release: str) -> None:
    """Write the wheel that the Jetson's stage `bindings` compiles from NVIDIA's sources.

    Its files are NVIDIA's build of the same release for x86-64, taken from PyPI and packed under the names that the
    compiled ones have.

    Args:
        folder: Where it goes; also takes the download.
        release: TensorRT's release, such as "10.3".
    """
    tag = f"cp{JETSON_PYTHON.replace('.', '')}"
    with_version = f"{_BINDINGS}=={release}.*"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", with_version]
    command += ["--python-version", JETSON_PYTHON, "--platform", "manylinux_2_17_x86_64"]
    download = folder / "download"
    subprocess.run([*command, "--dest", str(download)], check=True)  # noqa: S603 - put together above
    (found,) = download.glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        inside = [name for name in archive.namelist() if name.startswith("tensorrt_bindings/")]
        files = {name.replace("tensorrt_bindings/", "tensorrt/", 1): archive.read(name) for name in inside}
    bindings = folder / "bindings"
    bindings.mkdir(exist_ok=True)
    write_wheel(bindings, "tensorrt", found.name.split("-")[1], files, f"{tag}-none-linux_x86_64")


def python_archive(folder: Path, root: Path) -> Path:
    """Pack Debian's Python as `uv python install` takes it, and return the list by which uv finds it.

    Args:
        folder: Where archive and list go.
        root: Files of a Debian that has this Python, whose libraries the images that use the archive have, too.
    """
    library = root / "usr/lib" / f"python{JETSON_PYTHON}"
    binary = root / "usr/bin" / f"python{JETSON_PYTHON}"
    archive = folder / "python.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
        packed.add(binary, f"python/bin/{binary.name}")
        for path in _files(library):
            packed.add(path, f"python/lib/{library.name}/{path.relative_to(library)}", recursive=False)
    patch = re.search(r"Python \d+\.\d+\.(\d+)", _version(root, binary.name))
    if patch is None:
        raise ValueError(f"{binary} does not tell its version")
    major, minor = JETSON_PYTHON.split(".")
    entry = {
        "name": "cpython",
        "arch": {"family": "x86_64", "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": int(major),
        "minor": int(minor),
        "patch": int(patch[1]),
        "prerelease": "",
        "url": archive.as_uri(),
        "sha256": None,
        "variant": None,
        "build": None,
    }
    listed = folder / "python.json"
    listed.write_text(json.dumps({f"cpython-{JETSON_PYTHON}.{patch[1]}-linux-x86_64-gnu": entry}))
    return listed


def _files(library: Path) -> Iterable[Path]:
    """Yield what uv unpacks: no links out of the archive, and not Debian's refusal to have packages installed."""
    for path in sorted(library.rglob("*")):
        if not path.is_symlink() and path.name != "EXTERNALLY-MANAGED" and "__pycache__" not in path.parts:
            yield path


def _version(root: Path, program: str) -> str:
    command = ["chroot", str(root), f"/usr/bin/{program}", "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
