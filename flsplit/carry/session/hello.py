"""What a host says of itself when it joins. It decides nothing about who its clients are."""

from typing import Annotated, Any, Self

from msgspec import Meta, Struct, ValidationError, convert, to_builtins

from flsplit.errors import ProtocolError


class Hello(Struct, frozen=True, rename="kebab"):
    """A host's introduction; the server knows from its token which node it is.

    ``peers`` says how many hosts like this one the resources of a simulation allow; 0 in a
    deployment, where nobody asks.
    """

    peers: Annotated[int, Meta(ge=0, le=2**20)] = 0

    def to_json(self) -> dict[str, Any]:
        """Return what is sent."""
        found: dict[str, Any] = to_builtins(self)
        return found

    @classmethod
    def from_json(cls, hello: dict[str, Any]) -> Self:
        """Return what came; ProtocolError if it is malformed."""
        try:
            return convert(hello, cls)
        except ValidationError as error:
            raise ProtocolError(f"hello: {error}") from error
