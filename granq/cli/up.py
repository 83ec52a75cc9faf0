"""granq up: all four servers on this machine, by one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granq.cli.exits import Exit

if TYPE_CHECKING:
    from granq.local.plan import Plan
    from granq.local.supervisor import Supervisor


def up(
    data: Annotated[Path, typer.Option(help="Folder for artifacts, database and logs.")] = Path("granq-data"),
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=64500, help="Coordinator's port; the next three are the workers'. 0: any free.")
    ] = 50050,
    datasets: Annotated[
        Path | None,
        typer.Option(help="Folder below which labelled sets are found by path. Default: DATA/datasets.", exists=True),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="JSON file with the addresses, written once all four serve; for scripts.")
    ] = None,
) -> None:
    """Start coordinator, generator, quantizer and evaluator here, and keep them running until Ctrl-C or SIGTERM.

    They listen on loopback without authentication: everyone on this machine can use them. A server that dies is
    restarted. Their logs are in DATA/logs.
    """
    import asyncio
    import fcntl

    from granq.local.plan import Plan

    data = data.resolve()
    data.mkdir(parents=True, exist_ok=True)
    if datasets is None:
        datasets = data / "datasets"
        datasets.mkdir(exist_ok=True)
    plan = Plan(data, datasets.resolve(), host, port)
    with (data / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            typer.echo(f"granq: another 'granq up' uses {data}; choose another folder with --data", err=True)
            raise typer.Exit(Exit.REFUSED) from None
        raise typer.Exit(asyncio.run(_serve(plan, ready_file)))


async def _serve(plan: "Plan", ready_file: Path | None) -> Exit:
    """Start, watch and stop the servers; return the exit code."""
    import asyncio
    import signal

    from granq.local.supervisor import StartError, Supervisor

    supervisor = Supervisor(plan, lambda text: typer.echo(text, err=True))
    stop = asyncio.Event()

    def ask_to_stop() -> None:
        if stop.is_set():
            supervisor.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask_to_stop)
    stopped = asyncio.create_task(stop.wait())
    running = asyncio.create_task(_start_and_run(supervisor, plan, ready_file))
    try:
        await asyncio.wait([stopped, running], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        return Exit.OK
    except StartError as error:
        typer.echo(f"granq: {error}", err=True)
        return Exit.FAILED
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
        if stop.is_set():
            typer.echo("stopping; a second signal ends everything at once", err=True)
        running.cancel()
        stopped.cancel()
        await asyncio.gather(running, stopped, return_exceptions=True)
        await supervisor.stop()


async def _start_and_run(supervisor: "Supervisor", plan: "Plan", ready_file: Path | None) -> None:
    await supervisor.start()
    services = supervisor.describe()
    if ready_file is not None:
        _write_ready_file(ready_file, services)
    _print_table(plan, services)
    await supervisor.run()


def _write_ready_file(path: Path, services: dict[str, dict[str, object]]) -> None:
    """Write the addresses by way of a temporary file, so that a script that waits for it never reads half of it."""
    import json
    import os

    document = {"address": services["coordinator"]["address"], "pid": os.getpid(), "services": services}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    temporary.replace(path)


def _print_table(plan: "Plan", services: dict[str, dict[str, object]]) -> None:
    from rich.table import Table

    from granq.cli.session import DEFAULT_ADDRESS, console

    table = Table("service", "address", "metrics", box=None, pad_edge=False)
    for name, service in services.items():
        metrics = f"http://{plan.host}:{service['metrics_port']}/metrics"
        table.add_row(name, str(service["address"]), metrics)
    screen = console()
    screen.print(table)
    address = services["coordinator"]["address"]
    hint = "" if address == DEFAULT_ADDRESS else f"; use it with --address {address} or GRANQ_ADDRESS={address}"
    screen.print(f"data and logs in {plan.data}{hint}; Ctrl-C stops", markup=False)
