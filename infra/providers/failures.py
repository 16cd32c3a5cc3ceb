"""What a provider's failure means to us: its kind, its status, how long to wait, and a message without the key."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from sia_events.infra.providers.account import Account
from sia_events.shared.ports import FailedCall, ModelFailed

QUOTED = 500
# What Anthropic and Google say, with status 400, of an account without money and of a key that is none.
ACCOUNT = re.compile(r"credit balance|API[ _]key (not valid|expired|not found)|API_KEY_INVALID", re.IGNORECASE)


def kind_of(status: int) -> FailedCall:
    """The kind of failure that an HTTP status stands for."""
    match status:
        case 401 | 402 | 403:
            return "no_key"
        case 404:
            return "unknown_model"
        case 408 | 504:
            return "timeout"
        case 429:
            return "rate_limited"
        case _ if 400 <= status < 500:
            return "refused"
        case _:
            return "unavailable"


def answered(account: Account, status: int, said: str, headers: Mapping[str, str]) -> ModelFailed:
    """The failure of a call that the provider answered with `status`, in its own words as far as they hold no key."""
    name, kind = account.name, kind_of(status)
    if status == 400 and ACCOUNT.search(said):
        # No request would be answered: that must not pass for the caller's fault.
        kind = "no_key"
    words = _quote(account, said)
    match kind:
        case "no_key":
            # What a provider says to a key often repeats some of it.
            words = "" if status == 401 else f": {words}"
            key = account.provider.key_env
            mend = f"check the key in {key}" if key else f"set key_env of [providers.{name}]: it wants a key"
            return ModelFailed(status, f"{name} refused the key ({status}){words}; {mend}", kind)
        case "rate_limited":
            wait = seconds_to_wait(headers)
            return ModelFailed(429, f"{name} limits our rate: {words}", kind, wait)
        case "timeout":
            return ModelFailed(504, f"{name} timed out ({status}): {words}", kind)
        case "unavailable":
            wait = seconds_to_wait(headers)
            return ModelFailed(503, f"{name} is not available ({status}): {words}", kind, wait)
        case _:
            return ModelFailed(status, f"{name} answered {status}: {words}", kind)


def timed_out(account: Account) -> ModelFailed:
    return ModelFailed(504, f"{account.name} gave no answer in {account.provider.timeout_s:g} s", "timeout")


def unreachable(account: Account, error: BaseException) -> ModelFailed:
    """No connection, or one that broke; what the provider did with the call is unknown."""
    why = _quote(account, str(error.__cause__ or error)) or type(error).__name__
    return ModelFailed(
        503, f"{account.name} at {account.provider.base_url}: the connection failed: {why}", "unavailable"
    )


def garbage(account: Account, what: str) -> ModelFailed:
    """A reply that is none: not to be parsed, empty, or without its end."""
    return ModelFailed(502, f"{account.name} gave no usable reply: {_quote(account, what)}", "garbage")


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """The wait that the headers of a reply ask for: RFC 9110's Retry-After, in seconds or as a date; None if none.

    A date counts from the reply's own Date, since the provider's clock need not be ours.
    """
    asked = headers.get("retry-after")
    if asked is None:
        return None
    if re.fullmatch(r"-?\d+(\.\d+)?", asked):
        return max(0.0, float(asked))
    try:
        until = parsedate_to_datetime(asked)
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _quote(account: Account, said: str) -> str:
    if account.key:
        # As it is, and as Python writes it where it has a backslash.
        for written in (account.key, repr(account.key)[1:-1]):
            said = said.replace(written, "[the key]")
    return said if len(said) <= QUOTED else f"{said[:QUOTED]} … ({len(said)} characters)"
