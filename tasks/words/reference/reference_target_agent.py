"""A first agent for `words`: asks the model about each definition and reads the label out of its reply."""

import argparse
import json
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

QUESTION = "What kind of thing is defined here: animal, plant, food, body, artifact, person, location or event?"


def ask(item: dict[str, str]) -> tuple[str, str]:
    """(prompt, reply) for one item."""
    prompt = f"{QUESTION}\n\nDefinition: {item['text']}"
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
        data=json.dumps(
            {
                "model": os.environ["SIA_MODEL"],
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 1 if "#" in item["id"] else 0,
                "max_tokens": 8,
                "metadata": {"item": item["id"]},
            }
        ).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request) as response:
        return prompt, json.load(response)["choices"][0]["message"]["content"]


def label_in(reply: str, labels: list[str]) -> str:
    """The label that occurs first in `reply`, or the empty string."""
    found = re.search("|".join(map(re.escape, labels)), reply.lower())
    return found.group() if found else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    arguments = parser.parse_args()

    items = [json.loads(line) for line in (arguments.dataset_dir / "items.jsonl").read_text().splitlines()]
    labels = json.loads((arguments.dataset_dir / "labels.json").read_text())
    with ThreadPoolExecutor(32) as threads:
        dialogues = list(threads.map(ask, items))

    with (arguments.working_dir / "answers.jsonl").open("w") as answers:
        for item, (_, reply) in zip(items, dialogues, strict=True):
            answers.write(json.dumps({"id": item["id"], "answer": label_in(reply, labels)}) + "\n")
    messages = [
        {"role": role, "content": content}
        for dialogue in dialogues[:5]
        for role, content in zip(("user", "assistant"), dialogue, strict=True)
    ]
    (arguments.working_dir / "agent_execution.json").write_text(json.dumps(messages, indent=1))


if __name__ == "__main__":
    main()
