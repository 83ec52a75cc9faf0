"""granq devices: the coordinator's pool of devices that build and measure engines."""

from typing import TYPE_CHECKING, Annotated

import typer

from granq.cli.session import DEFAULT_ADDRESS, Address, AsJson, connect, console, to_dict, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from granq.v1.devices_pb2 import Device

app = typer.Typer(help="See the devices that build and measure engines.", no_args_is_help=True)


@app.command("list")
def list_(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the devices of the pool: what they are, whether they are there, and what they do."""
    with connect(address) as client:
        found = client.devices()
    if as_json:
        write_json([to_dict(device) for device in found])
    else:
        console().print(_table(found))


@app.command("remove")
def remove(
    device_id: Annotated[str, typer.Argument(help="Id of the device.")], address: Address = DEFAULT_ADDRESS
) -> None:
    """Forget a device that is gone for good, so that no pipeline waits for it; one that is there is refused."""
    with connect(address) as client:
        client.remove_device(device_id)


def _table(devices: "Sequence[Device]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from granq.v1.devices_pb2 import DeviceState

    columns = ("id", "state", "runtimes", "GPU", "platform", "memory", "for targets", "reached", "last seen (UTC)")
    table = Table(*columns, box=None, pad_edge=False)
    for device in devices:
        state = DeviceState.Name(device.state).removeprefix("DEVICE_STATE_")
        cells = (
            device.info.device_id,
            f"{state}: {device.detail}" if device.detail else state,
            _runtimes(device),
            _gpu(device),
            device.info.platform,
            _memory(device),
            ", ".join(device.info.targets) or "all it can",
            device.info.address or "it dials",
            device.last_seen_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S"),
        )
        # Devices name themselves, and rich would take brackets for markup.
        table.add_row(*map(Text, cells))
    return table


def _runtimes(device: "Device") -> str:
    from granq.cli.view import RUNTIMES

    return ", ".join(f"{RUNTIMES.get(r.runtime, '?')} {r.version}" for r in device.info.runtimes)


def _gpu(device: "Device") -> str:
    info = device.info
    driver = f", driver {info.driver_version}" if info.driver_version else ""
    return f"{info.gpu} (sm {info.compute_capability}{driver})" if info.gpu else "none"


def _memory(device: "Device") -> str:
    from granq.cli.view import size

    info = device.info
    gpu = f", GPU {size(info.gpu_memory_bytes)}" if info.gpu_memory_bytes else ""
    return f"{size(info.memory_bytes)}{gpu}" if info.memory_bytes else ""
