"""What the Claude Agent SDK's program writes on its output, read as a trajectory, a note, and how it ended. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec


@dataclass(frozen=True)
class Said:
    """`begun`: the program started to work. `end`: it was done, or its turns were used up; None: it got to neither.

    `error` is how it put what went wrong. `trajectory` has its messages as JSON lines {role, content}, with blocks of
    content as Anthropic's.
    """

    begun: bool
    end: Literal["done", "turns"] | None
    note: str
    error: str
    trajectory: bytes


def read_said(stdout: bytes, rules: str, prompt: str) -> Said:
    """The output of `--output-format stream-json`: one message a line (Claude Agent SDK, "Message types")."""
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": rules}, {"role": "user", "content": prompt}]
    begun, result = False, {}
    for line in _objects(stdout):
        begun = True
        match line:
            case {"type": "assistant" | "user", "message": {"role": str(role), "content": content}}:
                messages.append({"role": role, "content": content})
            case {"type": "result"}:
                result = line
    told = result.get("result")
    said = told.strip() if isinstance(told, str) else ""
    kind = str(result.get("subtype", ""))
    done = kind == "success" and result.get("is_error") is False
    return Said(
        begun=begun,
        end="done" if done else "turns" if kind == "error_max_turns" else None,
        note=said if done else "",
        error="" if done else said or _listed(result.get("errors")) or kind,
        trajectory=b"".join(msgspec.json.encode(message) + b"\n" for message in messages),
    )


def _listed(errors: Any) -> str:
    return "; ".join(map(str, errors)) if isinstance(errors, list) else ""


def _objects(stdout: bytes) -> Iterator[dict[str, Any]]:
    """Every line that is a JSON object; the last may be cut off, and a command may have written between them."""
    for line in stdout.splitlines():
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            continue
