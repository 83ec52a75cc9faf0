"""Command line of the load tables.

python -m benchmarks.load cotrain --out benchmarks/results/load_cotrain.md
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results_table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What being a service costs, measured.")

Out = Annotated[Path | None, typer.Option(help="Markdown file to write, after each row.")]


@app.command("cotrain")
def cotrain_command(
    case: Annotated[list[str] | None, typer.Option(help="NETWORK@SIDExBATCH; repeatable.")] = None,
    cores: Annotated[list[int] | None, typer.Option(help="Cores that all processes share; repeatable.")] = None,
    threads: Annotated[int, typer.Option(help="Of each process.")] = 1,
    iterations: Annotated[int, typer.Option(help="In each round.")] = 20,
    rounds: Annotated[int, typer.Option(help="Turns of both ways.")] = 6,
    out: Out = None,
) -> None:
    """An iteration of joint training: in one process, and through a generator server."""
    # Each command imports what it needs alone: some must not pay for torch, and one measures imports.
    from benchmarks.load import joint

    notes = [
        "Both ways run the same Trainer with W4A4 students of dynamic ranges per sample and channel; rounds alternate.",
        f"{rounds} rounds of {iterations} iterations each, {threads} thread(s) in each process. "
        "Milliseconds from batch to batch: median (least).",
        "On one core, CPU and wall are what a service costs in all; on two, the steps of both overlap.",
        "CPU: all threads of trainer, server and stream process, least of the rounds' means.",
    ]
    table = Table(out, "Joint training as a service", joint.COLUMNS, notes)
    for text in case or ["resnet20@32x16", "resnet20@32x200", "resnet18@64x16"]:
        for count in cores or [1, 2]:
            table.add(*joint.measure(joint.Case.parse(text), threads, count, iterations, rounds))


@app.command("messages")
def messages_command(
    case: Annotated[list[str] | None, typer.Option(help="NETWORK@SIDExBATCH; repeatable.")] = None,
    iterations: Annotated[int, typer.Option(help="In each round.")] = 40,
    rounds: Annotated[int, typer.Option(help="Turns of both ways.")] = 3,
    out: Out = None,
) -> None:
    """The messages of joint training alone: a generator that computes nothing, and gRPC alone as the floor."""
    from benchmarks.load import joint, messages

    notes = [
        "An iteration's batch and gradients, there and back, with a stub in the generator's place. "
        "Milliseconds: median (least). CPU: all processes, least of the rounds' means.",
        f"{rounds} rounds of {iterations} iterations, in turn.",
        "Floor: the images' bytes alone through one gRPC stream between two processes, neither parsed nor passed on.",
    ]
    table = Table(out, "Messages of joint training", messages.COLUMNS, notes)
    for text in case or ["resnet20@32x16", "resnet20@32x200", "resnet18@224x16"]:
        table.add(*messages.measure(joint.Case.parse(text), iterations, rounds))


@app.command("startup")
def startup_command(
    repeats: Annotated[int, typer.Option(help="Of each start.")] = 5,
    idle_seconds: Annotated[float, typer.Option(help="How long idle servers are watched.")] = 30.0,
    out: Out = None,
) -> None:
    """Start-up of commands and servers, and the CPU that idle servers use."""
    from benchmarks.load import startup

    notes = [
        f"{repeats} starts each on warm file caches. Where the machine does other things meanwhile, wall time is "
        "longer than it would be; CPU time, of all processes, is what it comes down to on free cores.",
    ]
    startup.measure(repeats, idle_seconds, Table(out, "Start-up", startup.COLUMNS, notes).add)


@app.command("artifacts")
def artifacts_command(
    megabytes: Annotated[int, typer.Option(help="Size of the file, MiB.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Transfers each way.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where file and store are. Default: the system's.")] = None,
    out: Out = None,
) -> None:
    """Upload and download of a large file, and what hashing and copying it take by themselves."""
    from benchmarks.load import artifacts

    notes = [
        f"{megabytes} MiB, {rounds} rounds, client and coordinator on loopback of one machine, hashing at both ends.",
        "An upload hashes the file before it sends it: content that the server holds is not sent. CPU: client and "
        "server together; their sum over the cores at hand is the floor of the time.",
        "Before each, a file as large is written and removed, so that memory for the new one is at hand: a virtual "
        "machine gets pages that it has not used of late from its host, which can take longer than all else.",
    ]
    artifacts.measure(folder, megabytes, rounds, Table(out, "Transfers of artifacts", artifacts.COLUMNS, notes).add)


@app.command("submit")
def submit_command(
    database: Annotated[list[str] | None, typer.Option(help="sqlite or postgresql; repeatable.")] = None,
    queued: Annotated[int, typer.Option(help="Pipelines in the queue.")] = 1000,
    watchers: Annotated[int, typer.Option(help="Streams of events.")] = 200,
    clients: Annotated[int, typer.Option(help="Connections that submit.")] = 50,
    submits: Annotated[int, typer.Option(help="Pipelines of each later phase.")] = 500,
    out: Out = None,
) -> None:
    """A coordinator with a long queue, many watchers and many clients that submit."""
    from benchmarks.load import submit

    notes = [
        f"{clients} clients; {queued} pipelines queued first, then {submits} more in each phase; every tenth call "
        "repeats the one before with the same request id.",
        "No worker runs; PostgreSQL has fsync off. The clients share the machine with the coordinator, and others with "
        "both.",
        "Without a pause, latency is clients over throughput: the rate is the figure to read there.",
    ]
    table = Table(out, "A coordinator under load", submit.COLUMNS, notes)
    for name in database or ["sqlite", "postgresql"]:
        submit.measure(name, queued, watchers, clients, submits, table.add)


@app.command("throughput")
def throughput_command(
    workers: Annotated[list[int] | None, typer.Option(help="Number of workers; repeatable.")] = None,
    pipelines: Annotated[int, typer.Option(help="For each worker.")] = 6,
    computation: Annotated[float, typer.Option(help="Seconds of a pipeline, all jobs together.")] = 12.0,
    out: Out = None,
) -> None:
    """Pipelines a minute of one, two and four workers whose jobs only take their time."""
    from benchmarks.load import throughput

    notes = [
        f"**Simulated workers**: a pipeline's jobs compute nothing and take {computation:g} s together. All else is "
        "real: coordinator (SQLite), servers, a process for each job, checkpoints, events. One job at a time at each.",
        f"{pipelines} pipelines for each worker, submitted at once; seconds until the last has succeeded.",
        "Workers computing: share of all workers' time that is computation. The rest is starts of processes, messages, "
        "and the end, when there is less left than workers. CPU: coordinator, workers and their jobs' processes.",
    ]
    table = Table(out, "Throughput against workers", throughput.COLUMNS, notes)
    throughput.measure(workers or [1, 2, 4], pipelines, computation, table.add)


if __name__ == "__main__":
    app()
