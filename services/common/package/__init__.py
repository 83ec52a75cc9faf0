"""The device package (.granq): a quantized model as small as its weights' bits allow. Format: docs/package.md."""

from services.common.package.device_package import MEDIA_TYPE, DevicePackage, read_package, write_package

__all__ = ["MEDIA_TYPE", "DevicePackage", "read_package", "write_package"]
