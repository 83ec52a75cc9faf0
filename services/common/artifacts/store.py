"""Immutable blobs by their SHA-256, and small named references to them."""

import io
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import unquote, urlsplit

from granq.v1 import artifacts_pb2
from services.common.artifacts.backend import Backend, storage_operation
from services.common.artifacts.cache import CacheBackend, default_cache_dir
from services.common.artifacts.local import LocalBackend
from services.common.artifacts.names import blob_digest, blob_path, is_ref, not_found, ref_name, ref_path
from services.common.artifacts.reader import VerifyingReader, damaged
from services.common.artifacts.writer import ArtifactWriter
from services.common.errors import DataLossError, InvalidArgumentError, NotFoundError
from services.common.security import SecuritySettings
from services.common.settings import CACHE_BYTES, ServerSettings

# Not all that fsspec knows: it would fetch from web servers, and chain URLs (::) into each other.
_BUCKETS = ("s3", "gs", "gcs", "memory")
_CHUNK = 1024 * 1024


def _exhaust(stream: BinaryIO) -> None:
    while stream.read(_CHUNK):
        pass


def _state(path: Path) -> tuple[int, ...]:
    """Return what differs once a file was written to or replaced; no program can set the time of its last change."""
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class ArtifactStore:
    """Blobs and references at one URL, shared by processes and machines.

    All methods block on disk or network; call them in a thread from asyncio. They raise UnavailableError when the
    store cannot be reached, FailedPreconditionError when its bucket does not exist or refuses the credentials, and
    those that write raise ResourceExhaustedError when the disk is full.

    Args:
        url: Where: file:///folder, s3://bucket/prefix, gs://bucket/prefix, granq://host:port for the store of the
            coordinator there, or memory://name for tests. Credentials are not part of it: drivers take them from the
            environment, where no message or log repeats them.
        cache_dir: Local copies of a remote store's blobs. Default: granq in the user's cache folder.
        security: What is shown to the coordinator of a granq:// URL.
        cache_bytes: What these copies may take, beside those in use.
    """

    def __init__(
        self,
        url: str,
        cache_dir: Path | None = None,
        security: SecuritySettings | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.url = url
        self.cache_dir = cache_dir
        self._cache: CacheBackend | None = None
        self._verified: dict[str, tuple[int, ...]] = {}
        self._backend: Backend
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            # Not repeated here: whatever stands there may be a secret.
            message = "an artifact URL is scheme://bucket/prefix alone; set credentials in the driver's environment"
            raise InvalidArgumentError(message, field="artifact_url")
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                raise InvalidArgumentError(f"a file URL is file:///absolute/folder, got {url!r}", field="artifact_url")
            self._backend = self._files = LocalBackend(Path(unquote(parts.path)))
        elif parts.scheme == "granq":
            if not parts.netloc or parts.path not in ("", "/"):
                message = f"a coordinator's store is granq://host:port, got {url!r}"
                raise InvalidArgumentError(message, field="artifact_url")
            from services.common.artifacts.coordinated import CoordinatedBackend  # a device's alone, as below

            folder = cache_dir or default_cache_dir()
            self._files = self._cache = CacheBackend(folder, cache_bytes)
            self._backend = CoordinatedBackend(parts.netloc, folder, self._cache, security)
        elif parts.scheme in _BUCKETS and "::" not in url:
            # Here, because fsspec would cost every server and job with a local store its time to load.
            from services.common.artifacts.remote import RemoteBackend

            self._files = self._cache = CacheBackend(cache_dir or default_cache_dir(), cache_bytes)
            self._backend = RemoteBackend(url, self._files)
        else:
            message = f"an artifact URL begins with file://, s3://, gs:// or granq://, got {url!r}"
            raise InvalidArgumentError(message, field="artifact_url")

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """Return the store that a server's settings name."""
        return cls(settings.artifact_url, settings.cache_dir, settings, settings.cache_bytes)

    def writer(self, name: str = "", media_type: str = "") -> ArtifactWriter:
        """Begin a blob. Use in a with statement, and call `commit` on the result at its end."""
        return ArtifactWriter(self._backend.stage(), name, media_type)

    def put_bytes(self, data: bytes, name: str = "", media_type: str = "") -> artifacts_pb2.Artifact:
        """Store bytes and return their artifact; the same bytes give the same digest."""
        with self.writer(name, media_type) as writer:
            writer.write(data)
            return writer.commit()

    def put_file(self, path: Path, name: str = "", media_type: str = "") -> artifacts_pb2.Artifact:
        """Store a copy of a file and return its artifact, named as the file is unless `name` is given."""
        with path.open("rb") as file, self.writer(name or path.name, media_type) as writer:
            while chunk := file.read(_CHUNK):
                writer.write(chunk)
            return writer.commit()

    def stat(self, digest: str) -> artifacts_pb2.Artifact:
        """Return digest and size of a blob, or raise NotFoundError."""
        try:
            return artifacts_pb2.Artifact(digest=digest, size_bytes=self._backend.size(blob_path(digest)))
        except FileNotFoundError as error:
            raise not_found(digest) from error

    def exists(self, digest: str) -> bool:
        """Return whether the store holds a blob."""
        try:
            self.stat(digest)
        except NotFoundError:
            return False
        return True

    def open(self, digest: str, offset: int = 0) -> BinaryIO:
        """Open a blob to read from a byte offset.

        Read from its first byte in order, damage raises DataLossError with the last bytes, before they are returned.
        From another offset, a local copy is read whose every byte was verified before.

        Raises:
            NotFoundError: The store does not hold it.
            InvalidArgumentError: The offset is outside of 0 to its size.
            DataLossError: The stored bytes do not match the digest.
        """
        size = self.stat(digest).size_bytes
        if not 0 <= offset <= size:
            raise InvalidArgumentError(f"the offset {offset} is outside of the {size} bytes", field="offset")
        if offset:
            # Once it is open, it may lose its name.
            with self._cache.holding(blob_path(digest)) if self._cache else nullcontext():
                path = self._verified_file(digest)
                with storage_operation("open", OSError):
                    file = path.open("rb", buffering=_CHUNK)
            file.seek(offset)
            return file
        return self._reader(self._backend, digest)

    def _reader(self, backend: Backend, digest: str) -> BinaryIO:
        path = blob_path(digest)
        try:
            return io.BufferedReader(VerifyingReader(backend.open(path), backend.size(path), digest), _CHUNK)
        except FileNotFoundError as error:
            raise not_found(digest) from error

    def read_bytes(self, digest: str) -> bytes:
        """Return a whole blob, verified.

        Raises:
            NotFoundError: The store does not hold it.
            DataLossError: Its bytes do not match the digest.
        """
        with self.open(digest) as file:
            return file.read()

    def verify(self, digest: str) -> None:
        """Read a whole blob and compare; raises as `read_bytes` does."""
        with self.open(digest) as file:
            _exhaust(file)

    def local_path(self, digest: str) -> Path:
        """Return a file with a blob's content, not to be changed: the store's own, or a copy of a remote one.

        It is verified when it is asked for the first time, and again whenever the file has changed since. A copy that
        is damaged is replaced by a new one. The copy stays as long as this object lives, so servers, which live long,
        leave this call to the processes of their jobs.

        Raises:
            NotFoundError: The store does not hold it.
            DataLossError: The stored bytes do not match the digest.
        """
        if self._cache is not None:
            self._cache.hold(blob_path(digest))
        return self._verified_file(digest)

    def _verified_file(self, digest: str) -> Path:
        path = blob_path(digest)
        try:
            file = self._files.local_path(path)
            state = _state(file)
        except FileNotFoundError as error:
            if self._backend is self._files:
                raise not_found(digest) from error
            file = self._copy(digest)
            state = _state(file)
        if self._verified.get(digest) != state:
            try:
                with self._reader(self._files, digest) as stream:
                    _exhaust(stream)
            except DataLossError:
                if self._backend is self._files:
                    raise
                file = self._copy(digest)
                state = _state(file)
            self._verified[digest] = state
        return file

    def _copy(self, digest: str) -> Path:
        """Fetch a remote blob anew and return the copy, which was verified on its way."""
        with self.open(digest) as file, ArtifactWriter(self._files.stage(), "", "") as writer:
            while chunk := file.read(_CHUNK):
                writer.write(chunk)
            if writer.digest != digest:
                raise damaged(digest)
            writer.commit()
        return self._files.local_path(blob_path(digest))

    def set_ref(self, name: str, data: bytes) -> None:
        """Set a small named value, such as "jobs/<id>/checkpoint"; readers see the old or the new one, never a mix."""
        self._backend.replace(ref_path(name), data)

    def create_ref(self, name: str, data: bytes) -> bool:
        """Set a named value unless it is set; return whether this call did it. Of several at once, exactly one does."""
        return self._backend.create(ref_path(name), data)

    def get_ref(self, name: str) -> bytes | None:
        """Return a named value, or None where it is not set."""
        try:
            with self._backend.open(ref_path(name)) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def delete_ref(self, name: str) -> None:
        """Forget a named value; one that is not set is no error."""
        self._backend.delete(ref_path(name))

    def list_refs(self, prefix: str = "") -> list[str]:
        """Return all names that begin with a prefix, sorted."""
        return sorted(map(ref_name, filter(is_ref, self._backend.list(f"refs/{prefix}"))))

    def ref_ages(self, prefix: str = "") -> dict[str, float]:
        """Return all names that begin with a prefix, and how many seconds ago each was set."""
        return {ref_name(path): age for path, age in self._backend.ages(f"refs/{prefix}").items() if is_ref(path)}

    def blob_ages(self) -> dict[str, float]:
        """Return the digests of all blobs, and how many seconds ago each was stored, or stored again."""
        return {blob_digest(path): age for path, age in self._backend.ages("blobs/sha256/").items()}

    def delete_blob(self, digest: str, least_seconds: float) -> int | None:
        """Remove a blob that nobody refers to, unless it was stored again within the last seconds.

        Returns:
            The bytes that were freed; None when it stays or is not there.
        """
        path = blob_path(digest)
        try:
            size = self._backend.size(path)
            if self._backend.age(path) < least_seconds:
                return None
        except FileNotFoundError:
            return None
        self._backend.delete(path)
        self._files.delete(path)
        return size
