"""The tools of the agent that writes a harness step by step: their form, and what those do that need no box. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sia_events.agents.check import body_problem, path_problem

DATA = "/data/"
PAGE = 16_000


class ListFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """List the files of the harness and the public data under /data, with their sizes in bytes."""


class ReadFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read a file of the harness, or one under /data; a page at a time."""

    path: Annotated[str, Meta(description="relative for the harness, /data/NAME for public data")]
    offset: Annotated[int, Meta(ge=0, description="how many characters to leave out before the page")] = 0


class WriteFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Write a file of the harness, whole; one that is there is replaced."""

    path: str
    content: str


class EditFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Replace a text in a file of the harness; it has to stand there exactly once."""

    path: str
    old: str
    new: str


class DeleteFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Delete a file of the harness."""

    path: str


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Run a shell command in a box. The harness is the current folder /work, public data is in $DATA, which is /data.

    There is no network and no model to call. `python` is Python 3.11 with its standard library. What the command
    leaves in /work becomes the harness; /tmp is empty at every start.
    """

    command: Annotated[str, Meta(min_length=1, max_length=20_000)]


class Finish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hand in the harness as it stands now."""

    note: Annotated[str, Meta(description="what you changed, why, and what you expect of it")]


Tool = ListFiles | ReadFile | WriteFile | EditFile | DeleteFile | Run | Finish
TOOLS: dict[str, type[Tool]] = {
    "list_files": ListFiles,
    "read_file": ReadFile,
    "write_file": WriteFile,
    "edit_file": EditFile,
    "delete_file": DeleteFile,
    "run": Run,
    "finish": Finish,
}


class ToolError(Exception):
    """A tool could not do what was asked; the message is the tool's result."""


def described() -> list[dict[str, Any]]:
    """The tools as OpenAI's `tools`."""
    return [{"type": "function", "function": _described(name, kind)} for name, kind in TOOLS.items()]


def read_call(name: str, arguments: str) -> Tool:
    """The call that a model made. Raises ToolError for one that is not of a tool's form."""
    if name not in TOOLS:
        raise ToolError(f"there is no tool {name[:100]!a}; there are: {', '.join(TOOLS)}")
    try:
        call = msgspec.json.decode(arguments or "{}", type=TOOLS[name])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise ToolError(f"the arguments of {name} are not of its form: {error}") from error
    if isinstance(call, Run) and "\0" in call.command:
        raise ToolError("a command cannot hold a zero byte; nothing was run")
    return call


def use(call: Tool, files: Mapping[str, bytes], data: Mapping[str, bytes]) -> tuple[Mapping[str, bytes], str]:
    """The harness behind a call that needs no box, and the call's result. Raises ToolError."""
    match call:
        case ListFiles():
            listed = {**files, **{DATA + name: body for name, body in data.items()}}
            return files, "\n".join(f"{len(body):>9,}  {path}" for path, body in sorted(listed.items()))
        case ReadFile(path=path, offset=offset):
            body = data.get(path.removeprefix(DATA)) if path.startswith(DATA) else files.get(path)
            return files, _page(path, body, offset)
        case WriteFile(path=path, content=content):
            return _written(files, path, content.encode())
        case EditFile(path=path, old=old, new=new):
            body = _found(path, files.get(path)).decode(errors="replace")
            if (times := body.count(old) if old else 0) != 1:
                raise ToolError(f"the text stands in {path} {times} times, not once; nothing was changed")
            return _written(files, path, body.replace(old, new).encode())
        case DeleteFile(path=path):
            _found(path, files.get(path))
            return {name: body for name, body in files.items() if name != path}, f"{path} is deleted"
        case Run() | Finish():
            raise AssertionError("a box or the end of the work is not this module's")


def _written(files: Mapping[str, bytes], path: str, body: bytes) -> tuple[Mapping[str, bytes], str]:
    if problem := path_problem(path):
        raise ToolError(f"{problem}; nothing was changed")
    if inside := next((name for name in files if name.startswith(f"{path}/") or path.startswith(f"{name}/")), None):
        raise ToolError(f"{path} and {inside} cannot both be: one is a file and a folder at once; nothing was changed")
    broken = body_problem(path, body)
    # Code that does not compile yet may be half of an edit: it is kept, and finish will not take it.
    return {**files, path: body}, f"{path} is written, {len(body):,} bytes" + (f". {broken}" if broken else "")


def _page(path: str, body: bytes | None, offset: int) -> str:
    text = _found(path, body).decode(errors="replace")
    page = text[offset : offset + PAGE]
    rest = len(text) - offset - len(page)
    return page + (f"\n[{rest:,} more characters; go on at offset {offset + PAGE}]" if rest > 0 else "")


def _found(path: str, body: bytes | None) -> bytes:
    if body is None:
        raise ToolError(f"there is no file {path[:200]!a}; list_files tells which there are")
    return body


def _described(name: str, kind: type[Tool]) -> dict[str, Any]:
    (_, components) = msgspec.json.schema_components([kind])
    form = dict(components[kind.__name__])
    del form["title"]
    return {"name": name, "description": form.pop("description"), "parameters": form}
