"""What the replay of the images takes from the Dockerfiles and puts in place of NVIDIA's parts; no image is built."""

import base64
import csv
import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from benchmarks.images.__main__ import STAND_INS, TARGETS, WITH_TENSORRT
from benchmarks.images.builder import JETSON, default_argument, dockerfile
from benchmarks.images.stand_ins import tensorrt_libraries, write_wheel
from benchmarks.results_table import Table
from tests.support import deployment


def test_every_image_of_the_dockerfiles_is_built() -> None:
    assert set(TARGETS) == set(deployment.TARGETS)
    for target in TARGETS:
        assert target in deployment.Dockerfile(dockerfile(target)).stages


def test_what_stands_in_is_told_of_each_image_that_has_it() -> None:
    assert set(STAND_INS) == set(WITH_TENSORRT)


def test_what_is_replaced_is_in_the_jetsons_dockerfile() -> None:
    stages = deployment.JETSON.stages
    base = default_argument(dockerfile(JETSON), "L4T_TENSORRT")
    assert {deployment.JETSON.base_image(stage) for stage in stages} == {f"{base}-devel", f"{base}-runtime"}
    copies = deployment.arguments(list(stages["environment"].instructions), "COPY")
    assert "--from=bindings /bindings /bindings" in copies
    with pytest.raises(ValueError, match="no ARG NOTHING"):
        default_argument(dockerfile(JETSON), "NOTHING")


def test_a_wheel_lists_its_files_by_their_digests(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "some-project", "1.2", {"some/file.py": b"x = 1\n"}, "cp311-none-linux_x86_64")
    assert wheel.name == "some_project-1.2-cp311-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        rows = list(csv.reader(io.StringIO(archive.read("some_project-1.2.dist-info/RECORD").decode())))
        assert {row[0] for row in rows} == set(archive.namelist())
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            assert (digest, size) == (f"sha256={encoded.rstrip('=')}", str(len(data)))


def test_the_libraries_stand_in_has_no_module(tmp_path: Path) -> None:
    tensorrt_libraries(tmp_path)
    (wheel,) = tmp_path.glob("tensorrt_cu13_libs-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert all(".dist-info/" in name for name in archive.namelist())


def test_an_appended_table_leaves_what_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    for title, append in (("Old", False), ("Gone", False), ("First", False), ("Second", True)):
        Table(path, title, ("column",), (), append=append).add(title)
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# First", "# Second"]
    assert "| First |\n\n# Second" in text
