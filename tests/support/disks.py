"""Disks that are really full: small file systems in memory, which only the command that is run on them sees."""

import shutil
import subprocess
from pathlib import Path

import pytest

SIZE = "320k"  # smaller than any engine, larger than the graphs of tests


def on_a_small_disk(at: Path, then: str = "") -> list[str]:
    """Return a command that runs its arguments with a disk of 320 KiB at a folder; skips where none can be mounted.

    Args:
        at: The folder, which exists.
        then: Shell command to run on that disk afterwards; "$0" is the folder. The exit code is that of the arguments.
    """
    unshare = shutil.which("unshare")
    mount = f'mount -t tmpfs -o size={SIZE} none "$0" && '
    script = mount + (f'{{ "$@"; code=$?; {then}; exit $code; }}' if then else 'exec "$@"')
    command = [unshare or "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(at)]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of its own")
    return command
