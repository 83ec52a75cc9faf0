"""Who a call is made for, as the code behind the RPCs sees it; it knows no transport."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a principal may do. Scopes do not include each other, except that ADMIN includes all."""

    READ = "read"
    """See its own pipelines and download its own artifacts."""
    SUBMIT = "submit"
    """Upload artifacts; start, cancel, continue and delete its own pipelines."""
    SERVICE = "service"
    """Call workers directly; for the services among themselves."""
    ADMIN = "admin"
    """Everything, with the pipelines and artifacts of others."""


@dataclass(frozen=True)
class Principal:
    """Somebody who calls.

    Attributes:
        name: Name, unique and stable: pipelines belong to it. "" where nobody is asked for credentials.
        scopes: What the caller may do.
    """

    name: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Return whether the principal has a scope, ADMIN standing for every one."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def only_owner(self) -> str | None:
        """Whose things the principal is limited to: its own name, or None when it sees everybody's."""
        return None if Scope.ADMIN in self.scopes else self.name


ANONYMOUS = Principal("", frozenset({Scope.ADMIN}))
"""Everybody, on a server that asks nobody for credentials."""

_current: ContextVar[Principal] = ContextVar("granq_principal", default=ANONYMOUS)


def current_principal() -> Principal:
    """Return who the running call is made for; outside of calls, which the server makes for itself, `ANONYMOUS`."""
    return _current.get()


def act_for(principal: Principal) -> None:
    """Note for the rest of this task, which serves one call, who it is made for."""
    _current.set(principal)
