"""Four real servers that are scraped and traced, and a tiny pipeline that runs through them."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

import granq
from granq import targets
from granq.v1 import coordinator_pb2
from tests.support.otlp import Collector, collector
from tests.support.prometheus import Prometheus, prometheus
from tests.support.servers import ServerProcess
from tests.support.tiny_pipelines import tiny_spec

SCRAPE_SECONDS = 60.0


@dataclass(frozen=True)
class Observed:
    """What a pipeline left behind, servers and Prometheus still running.

    Attributes:
        servers: By name.
        prometheus: Which scrapes them twice a second.
        spans: Takes their traces.
        pipeline: As it ended.
        begin: When Prometheus began to ask, shortly before the submission, in seconds since the epoch.
    """

    servers: dict[str, ServerProcess]
    prometheus: Prometheus
    spans: Collector
    pipeline: coordinator_pb2.Pipeline
    begin: float


@contextmanager
def observed(folder: Path) -> Iterator[Observed]:
    """Run a tiny pipeline, with an engine, to its end."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        spans = stack.enter_context(collector())
        stack.enter_context(patch.dict(os.environ, spans.environment()))
        servers: dict[str, ServerProcess] = {}

        def start(name: str, **settings: str) -> None:
            servers[name] = ServerProcess(name, folder, dataset_root=str(folder), **settings)
            stack.callback(servers[name].stop)
            servers[name].start()

        start("generator", synthesis_threads="1")
        start("evaluator", latency_repeats="2")
        start("quantizer", generator_address=servers["generator"].address)
        addresses = {f"{name}_address": server.address for name, server in servers.items()}
        start("coordinator", database_url=f"sqlite:///{folder / 'coordinator.sqlite'}", **addresses)
        scraped = {name: f"127.0.0.1:{server.metrics_port}" for name, server in servers.items()}
        asked = stack.enter_context(prometheus(folder, scraped, "500ms"))
        begin = time.time()
        deadline = time.monotonic() + SCRAPE_SECONDS
        while len(asked.query("up == 1")) < len(servers):
            assert time.monotonic() < deadline, asked.get("targets")
            time.sleep(0.05)
        client = stack.enter_context(granq.Client(servers["coordinator"].address))
        spec = tiny_spec(client, folder)
        spec.engines.extend(target.engine for target in targets.load_all(["rtx-ada"]))
        pipeline_id = client.submit(spec).pipeline_id
        for _ in client.watch(pipeline_id, timeout=600):
            pass
        yield Observed(servers, asked, spans, client.get(pipeline_id), begin)
