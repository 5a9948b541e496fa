"""What a user can say about sessions."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flsplit.errors import ConfigError

HOW_TO_SET = "a run config can only set keys that the app's pyproject.toml declares"
"""What an error says where it names a key that an app may not have declared: Flower refuses it."""

_EXPECTED = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """Where and how a session's hosts dial back to the ServerApp.

    The defaults work in a simulation and in a deployment on one machine.

    Attributes
    ----------
    address : str
        Name or IP address under which the clients' machines reach the ServerApp's.
    port : int
        Port that the ServerApp listens on; 0 takes a free one.
    ports : int
        How many ports from ``port`` on may be taken: as many runs can be under way at a time.
    bind : str
        Address to listen on. Empty: ``address`` if that is a loopback address, else all.
    tls : bool
        Encrypt, with a certificate made for the session. Off only where the network is trusted.
    max_hosts : int
        At most so many nodes are asked to be hosts; 0 stands for all.
    join_timeout : float
        Seconds to wait for the first host; 0 waits as long as the run's ``timeout``, for nodes
        may be busy with other runs.
    grace : float
        Seconds to wait for further hosts once one is there.
    step_timeout : float
        Seconds a host has to take a message, and then to answer. After that it counts as lost.
    max_step_bytes : int
        The longest message, in bytes.
    session_rounds : int
        Rounds per session, after which nodes are free for other runs and a new session begins;
        0 stands for one session per run.
    lifetime : float
        Seconds after which an invitation isn't taken up any more, and that Flower lets a session
        message live.
    """

    address: str = "127.0.0.1"
    port: int = 0
    ports: int = 1
    bind: str = ""
    tls: bool = True
    max_hosts: int = 0
    join_timeout: float = 0.0
    grace: float = 15.0
    step_timeout: float = 300.0
    max_step_bytes: int = 2 * 2**30
    session_rounds: int = 0
    lifetime: float = 30 * 24 * 3600.0

    def __post_init__(self) -> None:
        """Refuse values that can't be used."""
        for one in fields(self):
            _check_type(_key(one.name), getattr(self, one.name), one.type)
        if not self.address:
            raise ConfigError("session-address is empty, expected a name or an IP address")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"session-port is {self.port}, expected 0 to 65535")
        if self.ports < 1 or self.port + self.ports - 1 > 65535:
            raise ConfigError(
                f"session-ports is {self.ports}, expected 1 or more ports from session-port "
                f"({self.port}) up to 65535"
            )
        for name in ("step_timeout", "lifetime", "max_step_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_key(name)} is {getattr(self, name)}, expected more than 0")
        for name in ("join_timeout", "grace", "max_hosts", "session_rounds"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{_key(name)} is {getattr(self, name)}, expected 0 or more")

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> "SessionSettings":
        """Take the settings that an app's run config declares, the rest by default.

        Keys are ``session-`` and a field's name with hyphens, e.g. ``session-address``;
        ``session-rounds`` is the field ``session_rounds``.
        """
        keys = {one.name: _key(one.name) for one in fields(cls)}
        return cls(**{name: run_config[key] for name, key in keys.items() if key in run_config})

    @property
    def bind_address(self) -> str:
        """What to listen on, as ``host:port``."""
        host = self.bind or (self.address if self.is_local else "0.0.0.0")
        return f"{_bracketed(host)}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can dial the address."""
        return self.address in ("localhost", "::1") or self.address.startswith("127.")

    @property
    def ports_to_try(self) -> range:
        """The ports of which the first free one is taken."""
        return range(self.port, self.port + (self.ports if self.port else 1))

    def advertised(self, port: int) -> str:
        """Return what hosts dial, as ``host:port``."""
        return f"{_bracketed(self.address)}:{port}"


def _key(name: str) -> str:
    return "session-" + name.removeprefix("session_").replace("_", "-")


def _check_type(key: str, value: object, kind: Any) -> None:
    # A bool is an int to Python, but no number to whoever writes a run config.
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key} is {value!r}, expected {_EXPECTED[kind]}")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
