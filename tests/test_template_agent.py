"""The template and its agent, run as a program against a labeller behind loopback HTTP."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sia_events.feedback_svc.template import AGENT, SPEC, NotATemplate, digest, naive_spec, read, render
from sia_events.shared.task import answers, find_task, public_files

TASK = find_task("words")
NAIVE = naive_spec(TASK)
SCORED = replace(NAIVE, answer="choose", prefill="Answer:")
REFERENCE = {AGENT: (TASK.path / "reference/reference_target_agent.py").read_bytes()}
TRUTH = {
    json.loads(line)["text"]: json.loads(line)["label"]
    for line in (TASK.path / "data/private/items.jsonl").read_text().splitlines()
}

Body = dict[str, Any]


def text_of(message: dict[str, str]) -> str:
    return message["content"].rpartition(f"{TASK.item}: ")[2]


def asked_text(body: Body) -> str:
    """The text of the item that a request is about."""
    return text_of(next(message for message in reversed(body["messages"]) if message["role"] == "user"))


def knows(body: Body) -> str:
    return TRUTH[asked_text(body)]


@dataclass
class Labeller:
    """Replies to chat calls with `says`, and to choice calls with the largest of `scores` plus bias."""

    says: Callable[[Body], str] = lambda body: f"It is a kind of {knows(body)}."
    scores: Callable[[Body], list[float]] = lambda body: [float(knows(body) in choice) for choice in body["choices"]]
    status: Callable[[Body, int], int] = lambda body, times_asked: 200
    calls: list[tuple[str, Body]] = field(default_factory=list)
    url: str = ""

    def reply(self, path: str, body: Body) -> tuple[int, Body]:
        self.calls.append((path, body))
        status = self.status(body, sum(earlier == body for _, earlier in self.calls))  # 0 drops the connection
        if status != 200:
            return status, {"error": {"message": "no"}}
        if path == "/v1/chat/completions":
            return 200, {"choices": [{"message": {"role": "assistant", "content": self.says(body)}}]}
        raw = self.scores(body)
        total = [score + bias for score, bias in zip(raw, body.get("bias") or [0.0] * len(raw), strict=True)]
        index = total.index(max(total))
        return 200, {"choice": body["choices"][index], "index": index, "raw": raw, "logprobs": total}


@pytest.fixture
def serve() -> Iterator[Callable[[Labeller], Labeller]]:
    servers: list[ThreadingHTTPServer] = []

    def start(labeller: Labeller) -> Labeller:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["Authorization"] == "Bearer a-token"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = labeller.reply(self.path, body)
                if not status:
                    self.close_connection = True
                    return
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        server = Server(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        labeller.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return labeller

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@dataclass
class Attempt:
    answers: dict[str, str]
    right: dict[str, str]
    exit: int
    stderr: str
    work: Path

    @property
    def accuracy(self) -> float:
        return sum(self.answers.get(id) == label for id, label in self.right.items()) / len(self.right)


def run_agent(
    harness: dict[str, bytes], labeller: Labeller, folder: Path, data: dict[str, bytes]
) -> subprocess.CompletedProcess[str]:
    """Runs a harness on `data` as the platform does; its outputs are in folder/work."""
    for name, tree in {"harness": harness, "data": data, "work": {}}.items():
        (folder / name).mkdir(parents=True)
        for file, content in tree.items():
            (folder / name / file).write_bytes(content)
    where = {"dataset_dir": folder / "data", "working_dir": folder / "work"}
    return subprocess.run(
        [sys.executable, folder / "harness" / AGENT, *(part for name in where for part in (f"--{name}", where[name]))],
        env={"OPENAI_BASE_URL": labeller.url, "OPENAI_API_KEY": "a-token", "SIA_MODEL": "a-model"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def attempt(
    harness: dict[str, bytes], labeller: Labeller, folder: Path, split: str = "dev", samples: int = 1, limit: int = 24
) -> Attempt:
    """A harness's answers to `limit` items of a split, and the right ones."""
    done = run_agent(harness, labeller, folder, public_files(TASK, split, samples, limit))
    written = folder / "work/answers.jsonl"
    lines = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    right = answers(TASK, split, samples, limit)
    return Attempt({row["id"]: row["answer"] for row in lines}, right, done.returncode, done.stderr, folder / "work")


def test_the_reference_agent_asks_about_each_item_and_reads_the_first_label(serve, tmp_path: Path):
    labeller = serve(Labeller())
    result = attempt(REFERENCE, labeller, tmp_path)
    assert (result.exit, result.accuracy) == (0, 1.0)
    assert {body["metadata"]["item"] for _, body in labeller.calls} == set(result.right)
    assert {body["model"] for _, body in labeller.calls} == {"a-model"}
    assert {m["role"] for m in json.loads((result.work / "agent_execution.json").read_text())} == {"user", "assistant"}


def test_the_naive_template_sends_what_the_reference_agent_sends(serve, tmp_path: Path):
    sent: list[Body] = []
    for name, harness in {"template": render(NAIVE, TASK), "reference": REFERENCE}.items():
        labeller = serve(Labeller())
        attempt(harness, labeller, tmp_path / name)
        sent.append({body["metadata"]["item"]: body["messages"] for _, body in labeller.calls})
    assert sent[0] == sent[1]


def test_scored_labels_are_answered_whatever_the_model_would_write(serve, tmp_path: Path):
    labeller = serve(Labeller(says=lambda body: "I would rather not say."))
    result = attempt(render(SCORED, TASK), labeller, tmp_path)
    assert result.accuracy == 1.0
    assert {path for path, _ in labeller.calls} == {"/v1/choice"}
    assert all(body["messages"][-1] == {"role": "assistant", "content": "Answer:"} for _, body in labeller.calls)
    assert all(choice.startswith(" ") for _, body in labeller.calls for choice in body["choices"])


def test_calibration_takes_a_label_bias_away_with_calls_that_belong_to_no_item(serve, tmp_path: Path):
    def favours_plants(body: Body) -> list[float]:
        return [3.0 * (choice == " plant") + (knows(body) in choice) for choice in body["choices"]]

    labeller = serve(Labeller(scores=favours_plants))
    assert attempt(render(SCORED, TASK), labeller, tmp_path / "without").accuracy < 0.3
    labeller.calls.clear()
    result = attempt(render(replace(SCORED, calibrate=64), TASK), labeller, tmp_path / "with")
    assert result.accuracy == 1.0
    free = [body for _, body in labeller.calls if "metadata" not in body]
    assert len(free) == 64 and not any("bias" in body for body in free)
    assert {asked_text(body) for body in free}.isdisjoint(
        asked_text(body) for _, body in labeller.calls if "metadata" in body
    )


def test_fixed_examples_are_balanced_and_a_prefix_that_all_prompts_share(serve, tmp_path: Path):
    labeller = serve(Labeller())
    attempt(render(replace(SCORED, examples=16), TASK), labeller, tmp_path)
    prefixes = {json.dumps(body["messages"][:-2]) for _, body in labeller.calls}
    assert len(prefixes) == 1
    shown = [message["content"] for message in json.loads(prefixes.pop()) if message["role"] == "assistant"]
    assert sorted(shown) == sorted(f"Answer: {label}" for label in TASK.labels for _ in range(2))


def test_nearest_examples_share_words_with_the_item(serve, tmp_path: Path):
    labeller = serve(Labeller())
    result = attempt(render(replace(NAIVE, examples=4, example_choice="nearest"), TASK), labeller, tmp_path)
    assert result.accuracy == 1.0
    overlaps = 0
    for _, body in labeller.calls:
        users = [set(re.findall(r"\w+", text_of(m))) for m in body["messages"] if m["role"] == "user"]
        assert len(users) == 5
        overlaps += bool(users[-1] & users[-2])
    assert overlaps > 0.9 * len(labeller.calls)


@pytest.mark.parametrize("choice", ["fixed", "nearest"])
def test_no_example_is_the_item_itself_even_where_it_stands_among_the_examples(serve, tmp_path: Path, choice: Any):
    labeller = serve(Labeller())
    solved = public_files(TASK, "dev")["train.jsonl"].splitlines()[:24]
    asked = [json.dumps({key: value for key, value in json.loads(line).items() if key != "label"}) for line in solved]
    data = {"items.jsonl": "\n".join(asked).encode(), "train.jsonl": b"\n".join(solved)}
    run_agent(render(replace(NAIVE, examples=8, example_choice=choice), TASK), labeller, tmp_path, data)
    assert len(labeller.calls) == 24
    for _, body in labeller.calls:
        texts = [text_of(message) for message in body["messages"] if message["role"] == "user"]
        assert texts.count(texts[-1]) == 1


def test_repeated_samples_are_drawn_at_temperature_one_each_with_a_seed_of_its_own(serve, tmp_path: Path):
    labeller = serve(Labeller())
    result = attempt(render(SCORED, TASK), labeller, tmp_path, "train", samples=4, limit=6)
    assert len(result.answers) == 24
    assert {body["temperature"] for _, body in labeller.calls} == {1.0}
    assert len({body["seed"] for _, body in labeller.calls}) == 24


@pytest.mark.parametrize(
    ("extraction", "reply", "right"),
    [
        ("first_word", "{label}, not a plant, animal or food", 1.0),
        ("anywhere", "It must be {label} rather than plant or animal", 1.0),
        ("last", "Neither animal nor plant: {label}", 1.0),
        ("first_word", "The answer: {label}", 0.0),
        ("anywhere", "No idea", 0.0),
    ],
)
def test_a_label_is_read_where_the_spec_says(serve, tmp_path: Path, extraction: Any, reply: str, right: float):
    labeller = serve(Labeller(says=lambda body: reply.format(label=knows(body).upper())))
    result = attempt(render(replace(NAIVE, extraction=extraction), TASK), labeller, tmp_path)
    assert result.accuracy == right
    assert set(result.answers) == set(result.right)


def test_label_words_stand_for_their_labels(serve, tmp_path: Path):
    words = {**NAIVE.label_words, "body": "body part", "location": "place"}
    labeller = serve(Labeller(says=lambda body: words[knows(body)].capitalize()))
    assert attempt(render(replace(NAIVE, label_words=words), TASK), labeller, tmp_path).accuracy == 1.0


def test_a_reply_without_a_label_is_asked_for_again(serve, tmp_path: Path):
    labeller = serve(Labeller(says=lambda body: knows(body) if body["temperature"] else "Well ..."))
    result = attempt(render(replace(NAIVE, retries=2), TASK), labeller, tmp_path)
    assert result.accuracy == 1.0
    assert len(labeller.calls) == 2 * len(result.right)


def test_the_majority_of_votes_decides(serve, tmp_path: Path):
    said: dict[str, int] = {}

    def mostly_right(body: Body) -> str:
        item = body["metadata"]["item"]
        said[item] = said.get(item, 0) + 1
        return "event" if said[item] in (1, 3) else knows(body)

    labeller = serve(Labeller(says=mostly_right))
    result = attempt(render(replace(NAIVE, votes=5, temperature=0.7), TASK), labeller, tmp_path)
    assert result.accuracy == 1.0
    assert len({body["seed"] for _, body in labeller.calls}) == 5 * len(result.right)


@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_busy_or_broken_off_call_is_asked_again(serve, tmp_path: Path, status: int):
    labeller = serve(Labeller(status=lambda body, times_asked: status if times_asked == 1 else 200))
    result = attempt(render(NAIVE, TASK), labeller, tmp_path)
    assert (result.exit, result.accuracy) == (0, 1.0)


def test_an_item_whose_call_is_refused_is_left_unanswered_and_named(serve, tmp_path: Path):
    unlucky = next(iter(answers(TASK, "dev", limit=24)))
    labeller = serve(Labeller(status=lambda body, times_asked: 400 if body["metadata"]["item"] == unlucky else 200))
    result = attempt(render(NAIVE, TASK), labeller, tmp_path)
    assert result.exit == 0
    assert set(result.right) - set(result.answers) == {unlucky}
    assert f"{unlucky}: not answered" in result.stderr


def test_an_attempt_without_any_answer_is_a_crash_not_a_score(serve, tmp_path: Path):
    result = attempt(render(NAIVE, TASK), serve(Labeller(status=lambda body, times_asked: 404)), tmp_path)
    assert result.exit == 1
    assert not (result.work / "answers.jsonl").exists()


def test_a_rendered_spec_is_read_back_the_same():
    spec = replace(SCORED, examples=8, calibrate=64)
    assert read(render(spec, TASK)) == spec
    assert digest(read(render(spec, TASK))) == digest(spec) != digest(SCORED)


def test_a_harness_that_does_not_come_from_the_template_is_told_apart():
    with pytest.raises(NotATemplate, match=r"no harness\.json among target_agent\.py"):
        read({AGENT: b""})
    with pytest.raises(NotATemplate, match="votes"):
        read({SPEC: json.dumps({"instruction": "", "item": "", "label_words": {}, "votes": 0}).encode()})


def test_labels_that_are_not_the_tasks_or_share_a_word_are_not_rendered():
    for words in ({"animal": "animal"}, dict.fromkeys(TASK.labels, "thing")):
        with pytest.raises(NotATemplate, match="label_words"):
            render(replace(NAIVE, label_words=words), TASK)
