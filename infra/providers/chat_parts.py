"""The parts of OpenAI's chat requests, read for providers that have other words for them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sia_events.infra.providers.account import Account, unsupported


class Untranslatable(Exception):
    """A request that the provider's API has no words for; the message names the part."""


@contextmanager
def translating(account: Account) -> Iterator[None]:
    """Raise what the provider cannot be asked as ModelFailed."""
    try:
        yield
    except Untranslatable as error:
        raise unsupported(account, f"cannot be asked with {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        # What agents send is checked nowhere else, and a mistake of theirs must not pass for ours.
        raise unsupported(account, f"cannot be asked with a malformed message or tool: {error!r}") from error


def text_of(content: Any) -> str:
    """The text of a message's content, a string or parts of type text. Raises Untranslatable for any other part."""
    if content is None or isinstance(content, str):
        return content or ""
    if other := [part.get("type") for part in content if part.get("type") != "text"]:
        raise Untranslatable(f"a message part of type {other[0]!r}: text is all that is passed on")
    return "".join(part["text"] for part in content)


def arguments_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a recorded tool call as an object. Raises Untranslatable where they are none."""
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except json.JSONDecodeError as error:
        raise Untranslatable(f"a call of {function.get('name')} whose arguments are no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise Untranslatable(f"a call of {function.get('name')} whose arguments are no JSON object")
    return arguments


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a tool is. Raises Untranslatable for another kind of tool."""
    if tool.get("type") != "function":
        raise Untranslatable(f"a tool of type {tool.get('type')!r}: functions are all that is passed on")
    return tool["function"]
