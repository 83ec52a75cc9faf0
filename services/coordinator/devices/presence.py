"""What state a device is in, and how that is told."""

from datetime import UTC, datetime

from granq.v1 import devices_pb2
from services.coordinator.devices.table import DeviceRecord, Terms
from services.coordinator.transitions import now_us

State = devices_pb2.DeviceState


def state_of(device: DeviceRecord, terms: Terms, *, streams: bool) -> tuple[State, str]:
    """Return a device's state and a sentence about it, empty for READY.

    Args:
        device: The device.
        terms: Of its lease.
        streams: Whether its stream is open at this coordinator.
    """
    if not device.lease_end:
        return State.DEVICE_STATE_AWAY, "deregistered"
    if device.last_seen + terms.silent_us <= now_us():
        return State.DEVICE_STATE_AWAY, f"silent since {_clock(device.last_seen)}"
    if not device.info.address and not streams:
        return State.DEVICE_STATE_AWAY, "its stream is not open here"
    if device.job_id:
        return State.DEVICE_STATE_BUSY, f"has a job of pipeline {device.pipeline_id}"
    return State.DEVICE_STATE_READY, ""


def describe(device: DeviceRecord, state: State, detail: str) -> devices_pb2.Device:
    """Return a device for a user."""
    shown = devices_pb2.Device(
        info=device.info, state=state, detail=detail, job_id=device.job_id, pipeline_id=device.pipeline_id
    )
    shown.last_seen_time.FromMicroseconds(device.last_seen)
    shown.create_time.FromMicroseconds(device.create_time)
    if device.claim_time:
        shown.claim_time.FromMicroseconds(device.claim_time)
    return shown


def _clock(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
