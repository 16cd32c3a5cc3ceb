"""The failures of the SDKs that are generated alike, OpenAI's and Anthropic's, as ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from types import ModuleType

import httpx2
import msgspec

from sia_events.infra.providers.account import Account
from sia_events.infra.providers.failures import answered, garbage, timed_out, unreachable


@contextmanager
def named(account: Account, sdk: ModuleType) -> Iterator[None]:
    """Raise the exceptions of `sdk` as ModelFailed; both SDKs have the same names for them."""
    try:
        yield
    except (sdk.APITimeoutError, TimeoutError, httpx2.TimeoutException) as error:
        raise timed_out(account) from error
    except sdk.APIResponseValidationError as error:
        raise garbage(account, str(error)) from error
    except sdk.APIStatusError as error:
        # Not chained, here and below: what a provider says of a key would stand in the traceback.
        raise answered(account, _status(error), _said(error), error.response.headers) from None
    except (sdk.APIConnectionError, httpx2.HTTPError) as error:
        raise unreachable(account, error) from error
    except sdk.APIError as error:
        # A stream that reports an error in the middle: there is no status any more.
        raise answered(account, 500, _said(error), {}) from None
    except (JSONDecodeError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise garbage(account, f"not JSON: {error}") from error


def _status(error: Exception) -> int:
    """The status of a refused request; an error event in a stream came with 200, and stands for a breakdown."""
    status = getattr(error, "status_code", 500)
    return status if status >= 400 else 500


def _said(error: Exception) -> str:
    """The provider's own message where its body has one in the usual place."""
    body = getattr(error, "body", None)
    detail = body.get("error", body) if isinstance(body, dict) else None
    said = detail.get("message") if isinstance(detail, dict) else None
    return str(said or getattr(error, "message", error))
