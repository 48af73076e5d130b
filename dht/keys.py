"""Where records lie. Every key of the DHT is formed here, and begins with the protocol's version.

Announcements lie under one key per path and heads under one per module, so that no record
grows with the swarm.
"""

from __future__ import annotations

PROTOCOL = "dipaco/1"


def announcement_key(run: str, path: str) -> str:
    """Who trains `path` (text form, "0.1") of `run`, and how far they are."""
    return f"{PROTOCOL}/{run}/announcement/{path}"


def head_key(run: str, module: str) -> str:
    """The newest versions of `module` (text form, "1.0") that peers hold."""
    return f"{PROTOCOL}/{run}/head/{module}"


def scores_key(run: str, path: str) -> str:
    """Who has scored the router data of `run` with `path`."""
    return f"{PROTOCOL}/{run}/scores/{path}"


def provider_key(digest: str) -> str:
    """Who has the blob of this name (64 hex digits). Blobs belong to no run."""
    return f"{PROTOCOL}/provider/{digest}"


def manifest_key(run: str) -> str:
    """The newest manifest of `run`."""
    return f"{PROTOCOL}/{run}/manifest"
