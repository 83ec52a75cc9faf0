"""The Dockerfiles name what exists, cache what they can, and end in a small image that is not root.

No image is built here (that is `make images-check`); what a build would need from the repository is checked instead.
"""

import json
import re

import pytest

from tests.support.deployment import (
    DEPLOY,
    ROOT,
    SERVICES,
    TARGETS,
    Instruction,
    arguments,
    distributions,
    sent_to_builder,
    service_of,
    settings_class,
    settings_variables,
)
from tools.supply_chain import LOCKS

SOURCES = {"granq", "services", "protos", "pyproject.toml", "README.md", "hatch_build.py"}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def final(target: str) -> list[Instruction]:
    return TARGETS[target].chain(target)


@pytest.fixture
def installing(target: str) -> list[Instruction]:
    return TARGETS[target].chain(TARGETS[target].environment_of(target))


def extras(stage: list[Instruction]) -> list[str]:
    return re.findall(r"--extra (\w+)", " ".join(arguments(stage, "RUN")))


def test_every_service_has_an_image() -> None:
    with_main = {path.parent.name for path in (ROOT / "services").glob("*/__main__.py")}
    assert {service_of(target) for target in TARGETS} == with_main == set(SERVICES)


def test_tensorrt_is_the_version_whose_bindings_the_tests_check() -> None:
    locked = re.search(r"^tensorrt-cu13-bindings==(\S+)", (ROOT / "constraints" / "dev.txt").read_text(), re.MULTILINE)
    stage = TARGETS["evaluator-tensorrt"].chain("evaluator-tensorrt-environment")
    assert locked is not None
    assert arguments(stage, "ARG") == [f"TENSORRT_VERSION={locked[1]}"]
    assert any('"tensorrt==$TENSORRT_VERSION"' in run for run in arguments(stage, "RUN"))


def test_every_dockerfile_is_read() -> None:
    assert {path.name for path in (DEPLOY / "docker").glob("*ockerfile")} == {"Dockerfile", "jetson.Dockerfile"}


def test_copied_sources_exist_and_reach_the_builder(target: str) -> None:
    copies = [
        copy.split()[:-1]
        for stage in TARGETS[target].stages.values()
        for copy in arguments(list(stage.instructions), "COPY")
        if not copy.startswith("--from")
    ]
    sources = {source for copy in copies for source in copy}
    assert sources >= SOURCES, "the wheel needs all of these"
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert sent_to_builder(source), source


def test_the_builder_gets_nothing_else() -> None:
    for path in ("examples/fashion_mnist/train.py", ".git/HEAD", "granq/v1/jobs_pb2.py", "services/__pycache__/a.pyc"):
        assert not sent_to_builder(path), path
    assert sent_to_builder("services/common/models/cifar_resnet.py")


def test_dependencies_are_installed_before_sources_are_copied(installing: list[Instruction]) -> None:
    lines = [f"{instruction.name} {instruction.arguments}" for instruction in installing]
    installed = next(i for i, line in enumerate(lines) if "--requirements pyproject.toml" in line)
    before = [source for line in lines[:installed] if line.startswith("COPY") for source in line.split()[1:-1]]
    assert "pyproject.toml" in before
    assert not {"granq", "services", "protos"} & set(before)


def test_the_service_s_own_extra_is_installed(target: str, installing: list[Instruction]) -> None:
    assert service_of(target) in extras(installing)
    distributions(extras(installing))  # each is in pyproject.toml


def test_images_have_what_their_settings_and_metrics_need(target: str, installing: list[Instruction]) -> None:
    assert {"s3", "tracing"} <= set(extras(installing)), "any store, and traces by OTEL_… alone"
    assert ("oidc" in extras(installing)) == ("postgres" in extras(installing)) == (target == "coordinator")
    # NVML; a Jetson's GPU is not one that it tells of.
    assert ("gpu" in extras(installing)) == (
        target in ("generator", "quantizer", "evaluator-rtx", "evaluator-tensorrt")
    )


def test_what_is_installed_is_locked(installing: list[Instruction]) -> None:
    locks = re.findall(r"--constraint constraints/(\w+)\.txt", " ".join(arguments(installing, "RUN")))
    assert locks
    # TensorRT is NVIDIA's index's, whose versions the image takes within the bounds of pyproject.toml.
    wanted = set(extras(installing)) - {"tensorrt"}
    assert wanted <= {extra for lock in locks for extra in LOCKS[lock]}
    fixed = [re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"constraints/{lock}.txt").read_text(), re.M) for lock in locks]
    assert distributions(sorted(wanted)) <= {name for lock in fixed for name, _ in lock}
    for name in {name for lock in fixed for name, _ in lock}:
        versions = [{version for other, version in lock if other == name} for lock in fixed]
        assert not versions[1:] or not all(versions) or versions[0] == versions[1], f"two locks differ in {name}"


def test_coordinator_and_evaluator_have_no_torch(target: str, installing: list[Instruction]) -> None:
    installed = distributions(extras(installing))
    assert ("torch" in installed) == (service_of(target) in {"generator", "quantizer"})
    if target == "coordinator":
        assert not installed & {"numpy", "onnx", "onnxruntime"}


@pytest.mark.parametrize(("image", "runtime"), [("evaluator-tensorrt", "tensorrt"), ("evaluator-rtx", "tensorrt-rtx")])
def test_an_evaluator_has_its_runtime_and_no_other(image: str, runtime: str) -> None:
    dockerfile = TARGETS[image]
    installed = distributions(extras(dockerfile.chain(dockerfile.environment_of(image))))
    assert installed & {"tensorrt", "tensorrt-rtx"} == {runtime}


def test_trainers_share_their_layers() -> None:
    dockerfile = TARGETS["quantizer"]
    assert dockerfile.stages["generator"].base == dockerfile.stages["quantizer"].base == "trainer"
    for name in ("generator", "quantizer"):
        assert not arguments(list(dockerfile.stages[name].instructions), "COPY")


def test_base_images_have_versions(target: str) -> None:
    for stage in TARGETS[target].stages:
        name = TARGETS[target].base_image(stage)
        assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+|nvcr\.io/nvidia/l4t-tensorrt:r[\d.]+-(devel|runtime)", name), (
            name
        )


def test_the_final_stage_installs_nothing_and_takes_only_the_environment(final: list[Instruction]) -> None:
    copied = {copy.split(maxsplit=1)[1] for copy in arguments(final, "COPY")}
    assert copied <= {"/opt/granq /opt/granq", "/opt/python /opt/python"}
    assert all(copy.startswith("--from=") for copy in arguments(final, "COPY"))
    assert not re.search(r"\b(apt|apt-get|pip|uv|gcc|build-essential)\b", " ".join(arguments(final, "RUN")))


def test_the_user_is_a_number_and_owns_data(final: list[Instruction]) -> None:
    assert arguments(final, "USER") == ["10001:10001"]
    commands = " ".join(arguments(final, "RUN"))
    assert "--uid 10001 " in commands
    assert "--owner=10001 --group=10001 /data" in commands


def test_the_entry_point_is_the_service_s_module(target: str, final: list[Instruction]) -> None:
    (entry,) = arguments(final, "ENTRYPOINT")
    assert json.loads(entry) == ["python", "-m", f"services.{service_of(target)}"]


def test_health_is_asked_by_a_module_that_exists(final: list[Instruction]) -> None:
    (check,) = arguments(final, "HEALTHCHECK")
    assert json.loads(check.partition("CMD ")[2]) == ["python", "-m", "services.common.rpc.health"]
    assert (ROOT / "services/common/rpc/health.py").is_file()


def test_exposed_ports_are_the_service_s_defaults(target: str, final: list[Instruction]) -> None:
    port = settings_class(service_of(target)).model_fields["port"].default
    assert arguments(final, "EXPOSE") == [f"{port} {port + 1000}"]
    assert f"GRANQ_PORT={port}" in " ".join(arguments(final, "ENV")).split()


def test_settings_in_the_image_are_known_to_the_service(target: str, final: list[Instruction]) -> None:
    variables = set(re.findall(r"\b(GRANQ_\w+)=", " ".join(arguments(final, "ENV"))))
    assert "GRANQ_LOG_FORMAT" in variables
    assert variables <= settings_variables(service_of(target))
