"""What each call passes before its request is read: who calls, whether that is allowed, and whether there is room."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.errors import PermissionDeniedError
from services.common.principal import act_for
from services.common.rpc.authentication import Authenticator
from services.common.rpc.call import Call
from services.common.rpc.limits import CallLimits
from services.common.security import SecuritySettings


class Gate:
    """The way into one server.

    Args:
        settings: The server's settings.

    Raises:
        FailedPreconditionError: The file of principals is not readable.
    """

    def __init__(self, settings: SecuritySettings) -> None:
        self._authenticator = Authenticator(settings)
        self._limits = CallLimits(settings)
        self.max_stream_messages = settings.max_stream_messages

    @asynccontextmanager
    async def passed(self, call: Call) -> AsyncIterator[None]:
        """Around the handler: let the call in and hold a place for it.

        Raises:
            UnauthenticatedError: Who calls is not known.
            PermissionDeniedError: The caller lacks the scope of the method.
            ResourceExhaustedError: There is no place.
        """
        scope = call.rule.scope
        if scope is None:
            yield
            return
        principal = await self._authenticator.identify(call.metadata(), call.certificate)
        call.belongs_to(principal)
        if not principal.may(scope):
            raise PermissionDeniedError(
                f"{call.method.rpartition('/')[2]} needs the scope {scope.value!r}", reason="SCOPE_MISSING"
            )
        act_for(principal)
        with self._limits.taken(principal):
            yield
