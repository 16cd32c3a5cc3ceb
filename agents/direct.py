"""The backend `direct`: one structured model call that returns the files of a harness, and one that may repair it."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from sia_events.agents.check import ENTRY, changed, problems
from sia_events.agents.client import asking
from sia_events.agents.structured import Unusable, fenced, json_object, structured
from sia_events.shared.ports import Brief, Ports, Writing

FORM = f"""\
You write the program of an agent. Its files, the harness, start from the ones that you are shown.

Reply with one JSON object and nothing else:
{{"note": "what you changed, why, and what you expect of it",
 "files": {{"{ENTRY}": "the whole new content of the file"}},
 "delete": ["paths of files that are to go"]}}

Give every file that is new or changed as a whole; files that you do not name stay as they are. Paths are relative. \
`{ENTRY}` is the program that is started. Every .py file has to compile with Python 3.11.
"""


class Patch(msgspec.Struct):
    """What a reply asks for: whole files to write, paths to delete."""

    note: str = ""
    files: dict[str, str] = {}
    delete: list[str] = []


@dataclass(frozen=True)
class Direct:
    """The `Backend` port: the model sees the prompt and nothing else, and has no tools."""

    async def write(self, brief: Brief, ports: Ports) -> Writing:
        def read(text: str) -> tuple[dict[str, bytes], str]:
            patch = read_patch(text)
            return patched(brief.files, patch), patch.note

        async with asking(brief, ports) as ask:
            (files, note), trajectory = await structured(ask, FORM, brief.prompt, read)
        return Writing(files, note or "no note was given", trajectory)


def read_patch(text: str) -> Patch:
    """The patch that a reply states: the JSON object asked for, or one ```python block as the entry point.

    Raises Unusable.
    """
    found = json_object(text)
    if found is None or not found.keys() & {"files", "delete"}:
        # Braces alone are no patch: Python's own may be read as an object.
        blocks = fenced(text, "python")
        if len(blocks) != 1:
            count = f"{len(blocks)} ```python blocks" if blocks else "no code"
            raise Unusable(f"it holds no JSON object that can be read, and {count}")
        return Patch(text[: text.find("```")].strip(), {ENTRY: blocks[0]})
    try:
        return msgspec.convert(found, Patch)
    except msgspec.ValidationError as error:
        raise Unusable(f"the JSON object is not of the form asked for: {error}") from error


def patched(before: Mapping[str, bytes], patch: Patch) -> dict[str, bytes]:
    """The whole tree behind a patch. Raises Unusable where it is no harness, or the one there was."""
    after = {path: body for path, body in before.items() if path not in patch.delete}
    try:
        after |= {path: text.encode() for path, text in patch.files.items()}
    except UnicodeEncodeError as error:
        raise Unusable(f"a file is not UTF-8 text: {error.reason} at character {error.start}") from error
    if found := problems(after):
        raise Unusable(*found)
    if not changed(before, after):
        raise Unusable("it changes nothing: the files are those of the harness there was")
    return after
