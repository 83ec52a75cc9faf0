"""The file in which a server says its ports."""

import json
import os
from pathlib import Path

from services.common.rpc.ready import write_ready_file


def test_ready_file_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "generator.json"
    write_ready_file(path, 1234, 2234)
    write_ready_file(path, 1235, 2235)
    assert json.loads(path.read_text()) == {"port": 1235, "metrics_port": 2235, "pid": os.getpid()}
    assert list(path.parent.iterdir()) == [path]
