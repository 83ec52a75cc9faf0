"""The Dockerfiles name what exists, cache what they can, and end in a small image that is not root.

No image is built here; what a build would need from the repository is checked instead.
"""

import json
import re

import pytest

from tests.support.deployment import (
    DEPLOY,
    PROJECT,
    ROOT,
    SERVICES,
    Instruction,
    distributions,
    read_dockerfile,
    sent_to_builder,
    settings_class,
    settings_variables,
    stages,
)


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def instructions(service: str) -> list[Instruction]:
    return read_dockerfile(DEPLOY / "docker" / f"{service}.Dockerfile")


@pytest.fixture
def builder(instructions: list[Instruction]) -> list[Instruction]:
    return stages(instructions)[0]


@pytest.fixture
def final(instructions: list[Instruction]) -> list[Instruction]:
    return stages(instructions)[-1]


def arguments(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.arguments for instruction in stage if instruction.name == name]


def extras(stage: list[Instruction]) -> list[str]:
    return re.findall(r"--extra (\w+)", " ".join(arguments(stage, "RUN")))


def test_every_service_has_a_dockerfile() -> None:
    with_main = {path.parent.name for path in (ROOT / "services").glob("*/__main__.py")}
    assert {path.name.removesuffix(".Dockerfile") for path in (DEPLOY / "docker").glob("*")} == with_main
    assert with_main == set(SERVICES)


def test_copied_sources_exist_and_reach_the_builder(builder: list[Instruction]) -> None:
    sources = [source for copy in arguments(builder, "COPY") for source in copy.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert sent_to_builder(source), source
    packages = {"granq", "services", "protos", "pyproject.toml", "README.md", "hatch_build.py"}
    assert packages <= set(sources), "the wheel needs all of these"


def test_the_builder_gets_nothing_else() -> None:
    for path in ("examples/fashion_mnist/train.py", ".git/HEAD", "granq/v1/jobs_pb2.py", "services/__pycache__/a.pyc"):
        assert not sent_to_builder(path), path
    assert sent_to_builder("services/common/models/cifar_resnet.py")


def test_dependencies_are_installed_before_sources_are_copied(builder: list[Instruction]) -> None:
    lines = [f"{instruction.name} {instruction.arguments}" for instruction in builder]
    installed = next(i for i, line in enumerate(lines) if "--requirements pyproject.toml" in line)
    assert [line for line in lines[:installed] if line.startswith("COPY")] == ["COPY pyproject.toml ./"]


def test_the_service_s_own_extra_is_installed(service: str, builder: list[Instruction]) -> None:
    assert service in extras(builder)
    assert set(extras(builder)) <= set(PROJECT["optional-dependencies"])


def test_coordinator_and_evaluator_have_no_torch(service: str, builder: list[Instruction]) -> None:
    installed = distributions(extras(builder))
    assert ("torch" in installed) == (service in {"generator", "quantizer"})
    if service == "coordinator":
        assert not installed & {"numpy", "onnx", "onnxruntime"}


@pytest.mark.parametrize("runtime", ["tensorrt", "rtx"])
def test_the_evaluator_s_runtimes_are_extras_and_need_no_torch(runtime: str) -> None:
    stage = stages(read_dockerfile(DEPLOY / "docker" / "evaluator.Dockerfile"))[0]
    assert "RUNTIME_EXTRA=none" in arguments(stage, "ARG")
    assert "torch" not in distributions(["evaluator", "s3", runtime])


def test_base_images_have_versions(instructions: list[Instruction]) -> None:
    defaults = dict(argument.split("=", 1) for argument in arguments(instructions, "ARG"))
    for image in arguments(instructions, "FROM"):
        name = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image.split()[0])
        assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", name), name


def test_the_final_stage_installs_nothing_and_takes_only_the_environment(final: list[Instruction]) -> None:
    assert arguments(final, "COPY") == ["--from=builder /opt/granq /opt/granq"]
    assert not re.search(r"\b(apt|apt-get|pip|uv|gcc|build-essential)\b", " ".join(arguments(final, "RUN")))


def test_the_user_is_a_number_and_owns_data(final: list[Instruction]) -> None:
    (user,) = arguments(final, "USER")
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", user)
    assert match is not None
    commands = " ".join(arguments(final, "RUN"))
    assert f"--uid {match[1]} " in commands
    assert f"--owner={match[1]} --group={match[2]} /data" in commands


def test_the_entry_point_is_the_service_s_module(service: str, final: list[Instruction]) -> None:
    (entry,) = arguments(final, "ENTRYPOINT")
    assert json.loads(entry) == ["python", "-m", f"services.{service}"]
    assert (ROOT / "services" / service / "__main__.py").is_file()


def test_exposed_ports_are_the_service_s_defaults(service: str, final: list[Instruction]) -> None:
    port = settings_class(service).model_fields["port"].default
    assert arguments(final, "EXPOSE") == [f"{port} {port + 1000}"]


def test_settings_in_the_image_are_known_to_the_service(service: str, final: list[Instruction]) -> None:
    variables = set(re.findall(r"\b(GRANQ_\w+)=", " ".join(arguments(final, "ENV"))))
    assert "GRANQ_LOG_FORMAT" in variables
    assert variables <= settings_variables(service)
