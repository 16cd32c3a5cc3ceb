"""The template's agent: answers labelled items as harness.json beside it says. Standard library only."""

import argparse
import hashlib
import heapq
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import zip_longest
from pathlib import Path
from typing import Any

BUSY = (408, 429)
WAITS = (0.2, 0.5, 1, 2, 4, 8)
SAMPLING = 0.7  # temperature of a second try, which at 0 would repeat the first

Example = dict[str, str]
Message = dict[str, str]
Pick = Callable[[str], list[Example]]


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The model's reply. A busy or unreachable model is asked again, a little later each time, and then raised."""
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/{path}",
        data=json.dumps({"model": os.environ["SIA_MODEL"], **body}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.load(response)
        except (OSError, HTTPException) as error:
            if refused(error) or wait is None:
                raise
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def refused(error: BaseException) -> bool:
    """Whether the request itself was at fault, so that asking again cannot help."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in BUSY


def fixed_examples(train: Sequence[Example], labels: Sequence[str], count: int) -> Pick:
    """The same `count` examples for every item, the labels in turn: prompts share all but their last lines."""
    rounds = zip_longest(*([example for example in train if example["label"] == label] for label in labels))
    chosen = [example for one_round in rounds for example in one_round if example][:count]
    chosen.sort(key=lambda example: example["id"])
    return lambda text: [example for example in chosen if example["text"] != text]


def nearest_examples(train: Sequence[Example], count: int) -> Pick:
    """The `count` examples that share the rarest words with an item, the nearest last."""
    bags = [set(re.findall(r"\w+", example["text"].lower())) for example in train]
    frequency = Counter(word for bag in bags for word in bag)
    rarity = {word: math.log(len(bags) / times) for word, times in frequency.items()}
    norms = [math.sqrt(sum(rarity[word] ** 2 for word in bag)) or 1.0 for bag in bags]

    def pick(text: str) -> list[Example]:
        own = set(re.findall(r"\w+", text.lower())) & rarity.keys()
        others = [row for row, example in enumerate(train) if example["text"] != text]
        near = heapq.nlargest(count, others, key=lambda row: sum(rarity[w] ** 2 for w in own & bags[row]) / norms[row])
        return [train[row] for row in reversed(near)]

    return pick


def prompt(spec: dict[str, Any], examples: Sequence[Example], text: str) -> list[Message]:
    """Chat messages that ask for the label of `text`; the last one opens the answer where the spec says so."""
    opening = spec["prefill"]
    messages: list[Message] = []
    for example in examples:
        word = spec["label_words"][example["label"]]
        messages.append({"role": "user", "content": question(spec, example["text"])})
        messages.append({"role": "assistant", "content": f"{opening} {word}" if opening else word})
    messages.append({"role": "user", "content": question(spec, text)})
    return [*messages, {"role": "assistant", "content": opening}] if opening else messages


def question(spec: dict[str, Any], text: str) -> str:
    return f"{spec['instruction']}\n\n{spec['item']}: {text}"


def read_label(spec: dict[str, Any], reply: str) -> str | None:
    """The label whose word stands in `reply`, where the spec says to look; None when there is none."""
    by_word = {word.lower(): label for label, word in spec["label_words"].items()}
    longest_first = "|".join(map(re.escape, sorted(by_word, key=len, reverse=True)))
    start = r"^\W*" if spec["extraction"] == "first_word" else r"\b"
    found = re.findall(rf"{start}({longest_first})", reply.lower())
    return by_word[found[-1 if spec["extraction"] == "last" else 0]] if found else None


def generate(spec: dict[str, Any], messages: list[Message], item: str, vote: int, temperature: float) -> str | None:
    """A label read out of a written reply, asked for again as often as the spec allows; None when none was read."""
    for repeat in range(1 + spec["retries"]):
        body = {
            "messages": messages,
            "max_tokens": spec["max_tokens"],
            "temperature": max(temperature, SAMPLING) if repeat else temperature,
            "seed": seed(item, vote, repeat),
            "metadata": {"item": item},
        }
        reply = post("chat/completions", body)["choices"][0]["message"]["content"]
        if label := read_label(spec, reply):
            return label
    return None


def choice(spec: dict[str, Any], messages: list[Message], **settings: Any) -> dict[str, Any]:
    """The reply to a choice call among the label words."""
    words = [f" {word}" if spec["prefill"] else word for word in spec["label_words"].values()]
    return post("choice", {"messages": messages, "choices": words, **settings})


def seed(item: str, vote: int, repeat: int = 0) -> int:
    """A sampling seed: the same for the same try in every attempt, another one for every other try."""
    return int(hashlib.sha256(f"{item} {vote} {repeat}".encode()).hexdigest()[:7], 16)


def label_bias(spec: dict[str, Any], pick: Pick, texts: Sequence[str], threads: ThreadPoolExecutor) -> list[float]:
    """Minus each label's mean log-probability over unlabelled texts: what makes the model favour none beforehand.

    Contextual calibration with real texts in place of empty ones (Zhao et al. 2021, arXiv 2102.09690; Fei et al.
    2023, arXiv 2305.19148).
    """
    replies = threads.map(lambda text: choice(spec, prompt(spec, pick(text), text), temperature=0)["raw"], texts)
    return [-sum(column) / len(texts) for column in zip(*replies, strict=True)]


def answer(spec: dict[str, Any], pick: Pick, bias: list[float] | None, item: Example) -> str | None:
    """The item's label by majority of the spec's votes, the first among equals; None when no vote named a label."""
    messages = prompt(spec, pick(item["text"]), item["text"])
    temperature = 1.0 if "#" in item["id"] else spec["temperature"]
    votes: Counter[str] = Counter()
    for vote in range(spec["votes"]):
        if spec["answer"] == "choose":
            settings = {"bias": bias, "temperature": temperature, "seed": seed(item["id"], vote)}
            reply = choice(spec, messages, **settings, metadata={"item": item["id"]})
            votes[list(spec["label_words"])[reply["index"]]] += 1
        elif label := generate(spec, messages, item["id"], vote, temperature):
            votes[label] += 1
    return votes.most_common(1)[0][0] if votes else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    arguments = parser.parse_args()
    data, work = arguments.dataset_dir, arguments.working_dir
    spec = json.loads(Path(__file__).with_name("harness.json").read_text())
    items, train = ([json.loads(line) for line in (data / name).open()] for name in ("items.jsonl", "train.jsonl"))

    if spec["example_choice"] == "nearest":
        pick = nearest_examples(train, spec["examples"])
    else:
        pick = fixed_examples(train, list(spec["label_words"]), spec["examples"])
    with ThreadPoolExecutor(32) as threads:
        unlabelled = [example["text"] for example in train[: spec["calibrate"]]]
        bias = label_bias(spec, pick, unlabelled, threads) if unlabelled else None
        pending = [(item, threads.submit(answer, spec, pick, bias, item)) for item in items]

    failed = [(item["id"], error) for item, future in pending if (error := future.exception())]
    for id, error in failed:
        print(f"{id}: not answered: {error!r}", file=sys.stderr)
    if any(isinstance(error, OSError | HTTPException) and not refused(error) for _, error in failed):
        sys.exit("the model could not be reached for every item: no answers are better than fewer")
    if failed and len(failed) == len(items):
        sys.exit("no item could be answered")
    labels = {item["id"]: future.result() for item, future in pending if not future.exception()}
    with (work / "answers.jsonl").open("w") as file:
        for id, label in labels.items():
            file.write(json.dumps({"id": id, "answer": label or ""}) + "\n")
    shown = [
        [
            *prompt(spec, pick(item["text"]), item["text"]),
            {"role": "assistant", "content": labels.get(item["id"]) or ""},
        ]
        for item in items[:3]
    ]
    (work / "agent_execution.json").write_text(json.dumps([m for dialogue in shown for m in dialogue], indent=1))


if __name__ == "__main__":
    main()
