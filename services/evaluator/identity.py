"""Who a device is, over the restarts of its evaluator."""

import fcntl
import os
import secrets
from pathlib import Path

from services.common.errors import FailedPreconditionError


class Identity:
    """A device's name, held by one process of this machine at a time.

    The lock goes with the process, however that ends. So who holds it knows that the instance before it, which the file
    names, has ended, and all jobs with it.

    Args:
        folder: Where files of this machine are kept.
        device_id: The name.

    Attributes:
        device_id: As given.
        instance_id: Of this process.
        previous: The instance that was registered last under this name from this machine; empty where none is known.

    Raises:
        FailedPreconditionError: Another process of this machine has the name.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, device_id: str) -> None:
        self.device_id = device_id
        self.instance_id = secrets.token_hex(16)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"device-{device_id}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise FailedPreconditionError(
                f"another evaluator of this machine is device {device_id!r}; give this one another device_id",
                reason="DEVICE_ID_TAKEN",
                field="device_id",
            ) from error
        self.previous = self._path.read_text("ascii", "replace").strip()

    def remember(self) -> None:
        """Note that this instance has registered; blocks on the disk."""
        os.pwrite(self._descriptor, self.instance_id.encode(), 0)
        os.ftruncate(self._descriptor, len(self.instance_id))
        os.fsync(self._descriptor)
        self.previous = self.instance_id

    def close(self) -> None:
        """Let the name go."""
        os.close(self._descriptor)
