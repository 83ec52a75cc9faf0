"""What this project installs, fixed and listed: `python tools/supply_chain.py lock|sbom|licenses|audit`.

lock writes `constraints/EXTRA.txt`, the version and the hashes of everything that an image's extras install, for Linux
on x86_64 and aarch64; torch is among them. sbom, licenses and audit look at the environment that runs this.
The tools are run by uv, each in an environment of its own at a fixed version.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {
    "coordinator": ("coordinator", "oidc", "postgres", "s3", "tracing"),
    "generator": ("generator", "gpu", "s3", "tracing"),
    "quantizer": ("quantizer", "gpu", "s3", "tracing"),
    "evaluator": ("evaluator", "gpu", "rtx", "s3", "tracing"),
    "dev": ("dev",),
}
"""Constraints files, and the extras that each fixes."""

TOOLS = {
    "cyclonedx-py": "cyclonedx-bom==7.5.0",
    "pip-licenses": "pip-licenses==5.5.5",
    "pip-audit": "pip-audit==2.10.1",
}
# LGPL and MPL are taken: they are used as they are, as modules of their own.
_REFUSED = ("GNU General Public License", "GPL-", "GPLv", "AGPL", "Affero")
_TAKEN = ("Lesser", "LGPL")


def _tool(name: str, *arguments: str) -> list[str]:
    return ["uv", "tool", "run", "--from", TOOLS[name], name, *arguments]


def _run(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603


def lock() -> None:
    """Resolve the newest versions that pyproject.toml admits, and write them with their hashes."""
    for name, extras in LOCKS.items():
        chosen = [argument for extra in extras for argument in ("--extra", extra)]
        command = ["uv", "pip", "compile", "--quiet", "pyproject.toml", *chosen, "--universal", "--generate-hashes"]
        command += ["--python-version", "3.11", "--upgrade"]
        command += ["--constraint", "constraints/tested.in", "--custom-compile-command", "make lock"]
        _run([*command, "--output-file", f"constraints/{name}.txt"])


def sbom() -> None:
    """Write `sbom.json`, a CycloneDX list of what is installed."""
    _run(
        _tool(
            "cyclonedx-py",
            "environment",
            sys.executable,
            "--output-file",
            "sbom.json",
            "--output-reproducible",
            "--no-validate",
        )
    )


def licenses() -> int:
    """Print the licence of each installed package; return 1 where one is the GPL's alone."""
    command = _tool("pip-licenses", f"--python={sys.executable}", "--format=json", "--from=mixed")
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)  # noqa: S603
    refused = []
    for package in found:
        print(f"{package['Name']} {package['Version']}: {package['License']}")
        # "GPL or MIT" leaves a choice; all of several must be refused for the package to be.
        names = [part for text in package["License"].split(";") for part in text.split(" OR ")]
        if all(any(w in name for w in _REFUSED) and not any(w in name for w in _TAKEN) for name in names):
            refused.append(package["Name"])
    if refused:
        print(f"under the GPL alone: {', '.join(refused)}", file=sys.stderr)
    return int(bool(refused))


def audit() -> None:
    """Ask PyPI for known vulnerabilities of what is installed."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        command = ["uv", "pip", "freeze", "--exclude-editable", "--python", sys.executable]
        frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
        listed.write("\n".join(line for line in frozen.splitlines() if "==" in line))
        listed.flush()
        _run(_tool("pip-audit", "--requirement", listed.name, "--no-deps", "--disable-pip", "--strict"))


def main() -> int:
    """Run the command that was named."""
    commands = {"lock": lock, "sbom": sbom, "licenses": licenses, "audit": audit}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    return commands[sys.argv[1]]() or 0


if __name__ == "__main__":
    sys.exit(main())
