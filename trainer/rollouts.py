"""Rollouts out of the log: recorded model calls joined with the rewards of the items they were made for. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sia_events.shared.calls import ModelCall


def rollouts(calls: Sequence[ModelCall], rewards: Mapping[str, float]) -> list[dict[str, Any]]:
    """One rollout a recorded call that was made for a rewarded item, with token ids as sampled, never retokenised.

    Samples of one item (ids "ID#0", "ID#1", …) are a group. A call without an item is the harness's own business
    (calibration, say): no reward is its, and it is left out.
    """
    found: list[dict[str, Any]] = []
    for call in calls:
        if call.item is None or call.item not in rewards or call.reply is None:
            continue
        common = {
            "group": call.item.split("#")[0],
            "item": call.item,
            "reward": rewards[call.item],
            "prompt_ids": call.reply["prompt_token_ids"],
            "temperature": 1.0,
        }
        if call.kind == "choice":
            choice = {name: call.reply[name] for name in ("index", "logprobs")}
            bias = call.request.get("bias")
            found.append(
                {**common, "kind": "choice", **choice, "choice_ids": call.reply["choice_token_ids"], "bias": bias}
            )
        else:
            said = call.reply["choices"][0]
            logprobs = [token["logprob"] for token in said["logprobs"]["content"]]
            found.append({**common, "kind": "completion", "completion_ids": said["token_ids"], "logprobs": logprobs})
    return found


def to_lines(found: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(rollout) + b"\n" for rollout in found)
