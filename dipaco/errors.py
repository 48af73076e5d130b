"""Everything this package raises on purpose.

DipacoError
├─ ConfigError         a run configuration, or what it leads to, cannot work: a person must act
└─ BadBytes            bytes do not hold what they should: fetch or compute them again
   ├─ BadState         ... the state of a module
   └─ BadContribution  ... an outer gradient
"""


class DipacoError(Exception):
    """Root of the tree. `hint` says in one line what a person can do; it may be empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(DipacoError):
    """A configuration is wrong; the message names the key, what it accepts and what it got."""


class BadBytes(DipacoError):  # noqa: N818 - a fact about bytes, as its children are
    """Bytes are not the tokenizer, router or shard that they should be."""


class BadState(BadBytes):
    """Bytes are not the state of a module of this run."""


class BadContribution(BadBytes):
    """Bytes are not an outer gradient of this run, or a gradient is not finite."""
