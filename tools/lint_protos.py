"""Lint protos/granq/v1 with buf, without network.

buf would fetch buf/validate/validate.proto from its registry. The build hook has it from a Python package already, so
this compiles the contract to an image, comments included, and has buf lint our files in that image.

    python tools/lint_protos.py
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hatch_build import compile_contract  # noqa: E402 - found by the line above


def find_buf() -> str:
    """Return the path of buf, looked for beside this interpreter first."""
    beside = Path(sys.executable).with_name("buf")
    found = str(beside) if beside.is_file() else shutil.which("buf")
    if found is None:
        raise SystemExit("buf is missing: pip install buf-bin")
    return found


def main() -> int:
    """Return buf's exit code; its findings go to standard output."""
    with TemporaryDirectory() as folder:
        image = Path(folder, "contract.binpb")
        image.write_bytes(compile_contract(ROOT))
        command = [find_buf(), "lint", str(image), "--config", str(ROOT / "buf.yaml"), "--path", "granq/v1"]
        return subprocess.run(command, check=False).returncode  # noqa: S603 - fixed command


if __name__ == "__main__":
    sys.exit(main())
