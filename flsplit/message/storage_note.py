"""What a host has to say of its disk, beside an answer: the record ``storage``."""

from flwr.app import ConfigRecord, RecordDict

_RECORD, _FIELD = "storage", "problem"
_LONGEST = 500  # characters


def put_problem(content: RecordDict, problem: str) -> None:
    """Add to an answer what is wrong with the client's state on disk."""
    content[_RECORD] = ConfigRecord({_FIELD: problem[:_LONGEST]})


def problem_in(content: RecordDict) -> str:
    """Return what an answer says of the client's state on disk; empty if nothing."""
    said = content.get(_RECORD)
    problem = said.get(_FIELD) if isinstance(said, ConfigRecord) else ""
    return problem[:_LONGEST] if isinstance(problem, str) else ""
