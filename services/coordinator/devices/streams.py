"""The streams that devices have opened at this coordinator."""

from collections.abc import Iterable

from services.common.logs import get_logger
from services.coordinator.devices.links import StreamLink
from services.coordinator.devices.table import DeviceRecord

log = get_logger(__name__)


class Streams:
    """At most one stream for each device, the latest."""

    def __init__(self) -> None:
        self._open: dict[str, StreamLink] = {}

    def of(self, device: DeviceRecord) -> StreamLink | None:
        """Return the stream of a device's present instance, if one is open."""
        stream = self._open.get(device.device_id)
        return stream if stream is not None and stream.instance_id == device.instance_id else None

    async def add(self, stream: StreamLink) -> None:
        """Take a stream in, and end the earlier one of its device."""
        earlier, self._open[stream.device_id] = self._open.get(stream.device_id), stream
        if earlier is not None:
            await earlier.close()
        log.info("device connected", device_id=stream.device_id)

    async def end(self, stream: StreamLink) -> None:
        """Close and forget a stream."""
        await stream.close()
        if self._open.get(stream.device_id) is stream:
            del self._open[stream.device_id]
            log.info("device disconnected", device_id=stream.device_id)

    async def keep(self, devices: Iterable[DeviceRecord]) -> None:
        """End all streams but those of present devices: calls to one whose lease has ended would wait in vain."""
        instances = {device.device_id: device.instance_id for device in devices if not device.lapsed}
        for stream in list(self._open.values()):
            if instances.get(stream.device_id) != stream.instance_id:
                await self.end(stream)

    async def close(self) -> None:
        """End all streams."""
        await self.keep(())
