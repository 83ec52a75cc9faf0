"""The process behind `granq device` (`python -m services.evaluator.device_command`): no more in it than a device has.

It stands here, not in granq, because it builds engines as the evaluator does, and the client knows no server.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from granq.cli.exits import Exit

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from granq.v1 import packages_pb2, reports_pb2
    from services.common.errors import GranqError
    from services.common.package import DevicePackage

MISSING = "this needs the extra 'device' ({name} is missing): pip install 'granq-pipeline[device]'"
BUILD_SECONDS = 3600.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code, as granq.cli.exits lists them."""
    options = _parser().parse_args(arguments)
    try:
        from services.common.errors import GranqError
        from services.common.package import read_package
        from services.evaluator import device  # noqa: F401 - all that is needed is loaded here, or found missing
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("google", "numpy", "onnx"):
            raise
        return _fail(MISSING.format(name=error.name), Exit.USAGE)
    try:
        package = read_package(options.package)
        if options.command == "show":
            _show(package.manifest, options)
        else:
            _build(package, options)
    except GranqError as error:
        return _fail(error.message, exit_of(error))
    except OSError as error:
        return _fail(str(error), Exit.DATA)
    except KeyboardInterrupt:
        return _fail("interrupted", Exit.DETACHED)
    return Exit.OK


def exit_of(error: "GranqError") -> Exit:
    """Return the exit code of a failure; a package that cannot be used is a bad file, not a wrong argument."""
    from services.common.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError

    if error.reason in ("PACKAGE_INVALID", "DISK_FULL"):
        return Exit.DATA
    if isinstance(error, InvalidArgumentError):
        return Exit.USAGE
    return Exit.REFUSED if isinstance(error, (FailedPreconditionError, ResourceExhaustedError)) else Exit.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="granq device", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    show, build = (commands.add_parser(name, allow_abbrev=False) for name in ("show", "build"))
    for command in (show, build):
        command.add_argument("package", type=Path)
        command.add_argument("--json", action="store_true")
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--no-engine", action="store_true")
    build.add_argument("--target", metavar="JSON", help="granq.v1.EngineTarget; without, what runtime there is")
    build.add_argument("--seconds", type=float, default=BUILD_SECONDS, help="after which an engine build has failed")
    return parser


def _show(manifest: "packages_pb2.PackageManifest", options: argparse.Namespace) -> None:
    if options.json:
        _write_json(_to_dict(manifest))
        return
    weights = sum(weight.count for weight in manifest.weights)
    bits = sum(weight.count * weight.bits for weight in manifest.weights) / max(weights, 1)
    pixels = json.dumps(_to_dict(manifest.preprocessing)) if manifest.HasField("preprocessing") else "not known"
    rows = {
        "model": manifest.model_name or "–",
        "input": f"{' × '.join(map(str, manifest.input_shape))}; {manifest.num_classes} classes",
        "preprocessing": pixels,
        "package": f"{options.package.stat().st_size:,} bytes, by {manifest.producer}",
        "weights": f"{weights:,} in {len(manifest.weights)} layers, {bits:.2f} bits each on average",
        "model_trt.onnx": f"{manifest.onnx_trt.size_bytes:,} bytes, {manifest.onnx_trt.digest}",
        "model_ort.onnx": f"{manifest.onnx_ort.size_bytes:,} bytes, {manifest.onnx_ort.digest}",
    }
    # A package is not trusted: what it says must not reach a terminal as control characters.
    plain = {name: "".join(c if c.isprintable() else "�" for c in value) for name, value in rows.items()}
    sys.stdout.writelines(f"{name:<15} {value}\n" for name, value in plain.items())


def _build(package: "DevicePackage", options: argparse.Namespace) -> None:
    from services.evaluator.device import rebuild

    say = _writer(sys.stderr if options.json else sys.stdout)
    rebuild(package, options.out, say)
    engine = None if options.no_engine else _engine(package, options, say)
    if options.json:
        document = {"out": str(options.out), "package": _to_dict(package.manifest)}
        _write_json(document | {"engine": _to_dict(engine) if engine else None})


def _engine(
    package: "DevicePackage", options: argparse.Namespace, say: Callable[[str], None]
) -> "reports_pb2.EngineManifest | None":
    """Build the engine; return None where the graph is what runs, or where no runtime is and none was named."""
    from google.protobuf.json_format import Parse, ParseError

    from granq.v1 import common_pb2
    from services.common.errors import FailedPreconditionError, InvalidArgumentError
    from services.evaluator.device import ORT, Report, build_engine

    try:
        target = Parse(options.target or "{}", common_pb2.EngineTarget())
    except ParseError as error:
        raise InvalidArgumentError(f"--target is no granq.v1.EngineTarget: {error}") from error
    if target.runtime == common_pb2.RUNTIME_ONNXRUNTIME:
        say(f"no engine: ONNX Runtime loads {ORT} itself")
        return None
    try:
        return build_engine(package, options.out, target, options.seconds, Report(say))
    except FailedPreconditionError as error:
        if options.target or error.reason != "RUNTIME_NOT_INSTALLED":
            raise
        say("no engine: neither tensorrt nor tensorrt_rtx is installed here; the ONNX files are complete")
        return None


def _writer(stream: TextIO) -> Callable[[str], None]:
    def say(text: str) -> None:
        stream.write(f"{text}\n")
        stream.flush()

    return say


def _to_dict(message: "Message") -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


def _write_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _fail(text: str, code: Exit) -> Exit:
    sys.stderr.write(f"granq: {text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
