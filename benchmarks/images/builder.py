"""Builds images by buildah, which needs no daemon, from base images that are put together of Debian's packages."""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.images import stand_ins
from benchmarks.images.container import ImageConfig

ROOT = Path(__file__).resolve().parents[2]
JETSON = "evaluator-jetson"
_DOCKER = ROOT / "deploy" / "docker"
# Certificates of this machine, for builds behind a proxy that has its own.
_CERTIFICATES = "/etc/ssl/certs"
# Stands in for the image of this name, which this machine cannot pull: the same Debian and Python, from its packages.
BASE = "docker.io/library/python:3.11-slim-bookworm"
_BASE_PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
_BASE_FILE = """FROM scratch
ADD base.tar /
RUN ln -s python3 /usr/bin/python && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
"""


def dockerfile(target: str) -> Path:
    """Return the Dockerfile that makes an image."""
    return _DOCKER / ("jetson.Dockerfile" if target == JETSON else "Dockerfile")


def default_argument(file: Path, name: str) -> str:
    """Return the default of a Dockerfile's argument.

    Raises:
        ValueError: It has none of this name.
    """
    found = re.search(rf"^ARG {name}=(\S+)$", file.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{file.name} has no ARG {name}")
    return found[1]


class Builder:
    """Buildah with a storage of its own, which `remove` deletes.

    Args:
        folder: Where the images are kept.
        indexes: Python package indexes besides PyPI: URLs, or folders of this machine in the same form.
    """

    def __init__(self, folder: Path, indexes: list[str]) -> None:
        self.folder = folder
        self._indexes = indexes
        self._stand_ins = folder / "stand-ins"
        self._stand_ins.mkdir(parents=True, exist_ok=True)
        # Nothing is pulled, so there is nobody whose signature could be asked for.
        self._policy = folder / "policy.json"
        self._policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def _buildah(self, *arguments: str, quiet: bool = False) -> str:
        storage = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]
        storage += ["--storage-driver", "overlay"]
        command = ["buildah", *storage, *arguments]
        run = subprocess.run(command, check=False, text=True, cwd=ROOT, capture_output=quiet)  # noqa: S603
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr or ''}")
        return run.stdout if quiet else ""

    def make_bases(self, targets: Sequence[str]) -> None:
        """Make the base images of these targets, unless they are there, and what else stands in for theirs."""
        self._make_base()
        stand_ins.tensorrt_libraries(self._stand_ins)
        if JETSON in targets:
            # NVIDIA's have TensorRT, besides. It is missing here; what loads it has to say so.
            base = default_argument(dockerfile(JETSON), "L4T_TENSORRT")
            self._buildah("tag", BASE, f"{base}-devel", f"{base}-runtime")
            stand_ins.jetson_bindings(self._stand_ins, default_argument(dockerfile(JETSON), "TENSORRT_RELEASE"))
            with self.mounted(BASE) as root:
                stand_ins.python_archive(self._stand_ins, root)

    def _make_base(self) -> None:
        images = self._buildah("images", "--format", "{{.Name}}:{{.Tag}}", quiet=True)
        if BASE in images.split():
            return
        archive = self.folder / "base.tar"
        command = ["mmdebstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", "bookworm", str(archive)]
        subprocess.run(command, check=True)  # noqa: S603
        (self.folder / "Base").write_text(_BASE_FILE)
        build = ["build", "--isolation", "chroot", "--signature-policy", str(self._policy), "--tag", BASE]
        self._buildah(*build, "--file", str(self.folder / "Base"), str(self.folder))
        archive.unlink()

    def build(self, target: str) -> str:
        """Build one target of its Dockerfile and return the image's name."""
        name = f"granq-{target}:check"
        options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--layers", "--pull-never"]
        options += ["--signature-policy", str(self._policy)]
        options += ["--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"]
        options += [f"--volume={index}:{index}:ro" for index in self._indexes if os.path.isabs(index)]
        # Not in the Dockerfile: this machine's indexes are none of its business.
        options += ["--volume", f"{self._uv_settings(target)}:/etc/uv/uv.toml:ro"]
        options += ["--volume", f"{self._stand_ins}:{self._stand_ins}:ro"]
        if target == JETSON:
            options += ["--build-arg", f"PYTHON_VERSION={stand_ins.JETSON_PYTHON}"]
            # In place of the stage of this name, whose sources are out of reach.
            options += ["--build-context", f"bindings={self._stand_ins}"]
        file = str(dockerfile(target))
        self._buildah("build", *options, "--target", target, "--tag", name, "--file", file, str(ROOT))
        return name

    def _uv_settings(self, target: str) -> Path:
        path = self.folder / f"uv-{target}.toml"
        urls = [Path(index).as_uri() if os.path.isabs(index) else index for index in self._indexes]
        lines = [f'[[index]]\nurl = "{url}"\n' for url in urls]
        lines += ['[[index]]\nurl = "https://pypi.org/simple"\ndefault = true\n']
        settings = f'find-links = ["{self._stand_ins}"]\n'
        if target == JETSON:
            settings += f'python-downloads-json-url = "{(self._stand_ins / "python.json").as_uri()}"\n'
        path.write_text("\n".join([settings, *lines]))
        return path

    def config(self, image: str) -> ImageConfig:
        """Return how an image wants to be run."""
        found: dict[str, Any] = json.loads(self._buildah("inspect", "--type", "image", image, quiet=True))
        config = found["Docker"]["config"]
        check = config["Healthcheck"]["Test"]
        if check[0] != "CMD":
            raise ValueError(f"{image}: the health check is {check}, which needs a shell")
        return ImageConfig(
            tuple(config["Entrypoint"]),
            tuple(check[1:]),
            dict(pair.split("=", 1) for pair in config["Env"]),
            config["User"],
            config["WorkingDir"],
        )

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Within the block, the image's files lie in the yielded folder."""
        container = self._buildah(
            "from", "--pull-never", "--signature-policy", str(self._policy), image, quiet=True
        ).strip()
        try:
            yield Path(self._buildah("mount", container, quiet=True).strip())
        finally:
            self._buildah("umount", container, quiet=True)
            self._buildah("rm", container, quiet=True)

    def remove(self) -> None:
        """Delete all images and what they were built of."""
        self._buildah("rm", "--all", quiet=True)
        self._buildah("rmi", "--all", "--force", quiet=True)
