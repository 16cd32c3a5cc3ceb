"""The policy: distributions over answers, drawn from in batches, with the work on shared prompts done once."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from sia_events.local_model.adapter import Adapter
from sia_events.local_model.network import SLOTS, Network, State, continuation_logprobs

Prompt = tuple[int, ...]

ROWS = 32
"""Prompts of one pass."""
PASS_COST = 64
"""What starting another pass costs, in tokens: decides when prompts with little in common are run apart."""
KEPT_PREFIXES, KEPT_SCORES = 16, 8192
LONGEST_KEPT_PREFIX = 1024


@dataclass(frozen=True)
class ChoiceRequest:
    """Draw one of `choices` (continuations of `prompt`) from softmax((log-prob + bias) / temperature)."""

    adapter: str | None
    prompt: Prompt
    choices: tuple[Prompt, ...]
    bias: tuple[float, ...] | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class Chosen:
    """`raw` are log-probs summed over tokens, without bias; `logprobs` the normalised distribution that was drawn from
    (at temperature 0, where the largest is taken, that of temperature 1)."""

    index: int
    logprobs: tuple[float, ...]
    raw: tuple[float, ...]


@dataclass(frozen=True)
class TextRequest:
    """Sample up to `max_tokens` tokens after `prompt`; `stopped(tokens)` ends the text early."""

    adapter: str | None
    prompt: Prompt
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stopped: Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Sampled:
    """`tokens` with the end token, if it came; `logprobs` of each under the distribution that was sampled,
    temperature and top-p included (at temperature 0, under the plain distribution)."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


class Policy:
    """One network, its adapters by name, and what was already computed. For one thread at a time.

    A reply depends on its request and weights alone, up to the rounding of sums that batching reorders (about 1e-5).
    """

    def __init__(self, network: Network, end_token: int) -> None:
        self._network = network
        self._end = end_token
        self.adapters: dict[str, Adapter] = {}
        self._prefixes: OrderedDict[tuple[str | None, Prompt], State] = OrderedDict()
        self._scores: OrderedDict[tuple[str | None, Prompt, tuple[Prompt, ...]], tuple[float, ...]] = OrderedDict()
        self._latest: dict[str | None, Prompt] = {}

    def forget(self, adapter: str) -> None:
        """Drop an adapter and all that was computed with it."""
        del self.adapters[adapter]
        self._latest.pop(adapter, None)
        self._prefixes = OrderedDict((key, state) for key, state in self._prefixes.items() if key[0] != adapter)
        self._scores = OrderedDict((key, raw) for key, raw in self._scores.items() if key[0] != adapter)

    @torch.inference_mode()
    def choose(self, requests: Sequence[ChoiceRequest]) -> list[Chosen]:
        keys = [(request.adapter, request.prompt, request.choices) for request in requests]
        known = {key: self._scores[key] for key in keys if key in self._scores}
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        for adapter in {key[0] for key in missing}:
            wanted = [key for key in missing if key[0] == adapter]
            room = max(len(choice) for key in wanted for choice in key[2])
            for batch in self._batches(adapter, [key[1] for key in wanted], room):
                rows = [wanted[i] for i in batch]
                prefix, rests = self._share(adapter, [key[1] for key in rows])
                choices = [key[2] for key in rows]
                scored = continuation_logprobs(self._network, self._adapter(adapter), prefix, rests, choices)
                for key, group in zip(rows, scored, strict=True):
                    known[key] = tuple(float(tokens.sum()) for tokens in group)
        for key, raw in known.items():
            _keep(self._scores, key, raw, KEPT_SCORES)
        return [_draw(request, known[key]) for request, key in zip(requests, keys, strict=True)]

    @torch.inference_mode()
    def generate(self, requests: Sequence[TextRequest]) -> list[Sampled]:
        done: dict[int, Sampled] = {}
        for adapter in {request.adapter for request in requests}:
            mine = [i for i, request in enumerate(requests) if request.adapter == adapter]
            room = max(requests[i].max_tokens for i in mine)
            # Equal prompts sit together, and rows of like length.
            mine.sort(key=lambda i: (len(requests[i].prompt), requests[i].prompt))
            for at in fitting(mine, [len(requests[i].prompt) + room for i in mine]):
                done.update(zip(at, self._generate(adapter, [requests[i] for i in at]), strict=True))
        return [done[i] for i in range(len(requests))]

    def _generate(self, adapter: str | None, requests: Sequence[TextRequest]) -> list[Sampled]:
        """Prompts are read once each, in passes of like length; then all rows go on in step.

        A step takes less than twice as long for 32 rows as for 8.
        """
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        read, row_of = [], dict[Prompt, int]()
        for batch in self._batches(adapter, prompts, 0):
            runs = even(batch, [len(prompts[i]) for i in batch])
            if len(runs) > 1:  # what all of them share is there before the first is read
                self._share(adapter, [prompts[i] for i in batch])
            for run in runs:
                read.append(self._read(adapter, [prompts[i] for i in run]))
                row_of |= {prompts[i]: len(row_of) + at for at, i in enumerate(run)}
        state, last = State.joined([state for state, _ in read]), torch.cat([last for _, last in read])
        rows = [row_of[request.prompt] for request in requests]
        del read
        state, last = state.rows(rows), last[rows]

        draws = [np.random.Generator(np.random.PCG64(request.seed)) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        finish = ["length"] * len(requests)
        live = list(range(len(requests)))
        while True:
            logits = self._network.logits(last)
            for row, i in enumerate(live):
                token, logprob = _sample(logits[row], requests[i], draws[i])
                tokens[i].append(token)
                logprobs[i].append(logprob)
                if token == self._end or requests[i].stopped(tokens[i]):
                    finish[i] = "stop"
            ended = [finish[i] == "stop" or len(tokens[i]) == requests[i].max_tokens for i in live]
            going = [row for row, over in enumerate(ended) if not over]
            if not going:
                break
            if len(going) < len(live):
                live, state = [live[row] for row in going], state.rows(going)
            hidden, state = self._network.extend(state, [tokens[i][-1:] for i in live], self._adapter(adapter))
            last = hidden[:, 0]
        return [Sampled(tuple(t), tuple(p), f) for t, p, f in zip(tokens, logprobs, finish, strict=True)]

    def _read(self, adapter: str | None, prompts: Sequence[Prompt]) -> tuple[State, Tensor]:
        """One pass over prompts that are alike: their states, and the hidden vector behind each [prompts, width]."""
        prefix, rests = self._share(adapter, prompts)
        hidden, state = self._network.extend(prefix.spread(len(prompts)), rests, self._adapter(adapter))
        return state, hidden[torch.arange(len(rests)), torch.tensor([len(rest) - 1 for rest in rests])]

    def _adapter(self, name: str | None) -> Adapter | None:
        return None if name is None else self.adapters[name]

    def _batches(self, adapter: str | None, prompts: Sequence[Prompt], room: int) -> list[list[int]]:
        """Indices of `prompts` in passes, so that prompts with a long common start run together.

        Within such a family, rows of like length sit together, in ascending order.
        """
        kept = [start for name, start in self._prefixes if name == adapter]
        batches = []
        for family in families(prompts, kept):
            alike = sorted(family, key=lambda i: len(prompts[i]))
            batches += fitting(alike, [len(prompts[i]) + room for i in alike])
        return batches

    def _share(self, adapter: str | None, prompts: Sequence[Prompt]) -> tuple[State, list[Prompt]]:
        """A state of the longest start worth sharing, and what is left of each prompt behind it (never empty).

        The start is what these prompts, and the last one seen before them, have in common.
        """
        before = self._latest.get(adapter)
        self._latest[adapter] = prompts[-1]
        common = min(common_length(prompts), min(map(len, prompts)) - 1)
        seen = common_length([prompts[0], before]) if before else 0
        # After an unrelated prompt, what this batch has in common is the better guess; a lone prompt has no other.
        wanted = min(common, seen) if len(prompts) == 1 or seen >= common // 2 else common
        start = prompts[0][: min(wanted, LONGEST_KEPT_PREFIX)]

        kept = [key[1] for key in self._prefixes if key[0] == adapter and key[1] == prompts[0][:common][: len(key[1])]]
        have = max(kept, key=len, default=())
        state = self._network.empty()
        if have:
            state = self._prefixes[adapter, have]
            self._prefixes.move_to_end((adapter, have))
        if len(start) > len(have):
            _, state = self._network.extend(state, [start[len(have) :]], self._adapter(adapter))
            _keep(self._prefixes, (adapter, start), state, KEPT_PREFIXES)
            have = start
        return state, [prompt[len(have) :] for prompt in prompts]


def families(prompts: Sequence[Prompt], kept: Collection[Prompt] = ()) -> list[list[int]]:
    """Indices of `prompts`, divided so that few tokens are computed when each family runs behind all that it shares.

    `kept` are starts that are computed already.
    """
    rest, apart = _divided(prompts, sorted(range(len(prompts)), key=lambda i: prompts[i]), 0, kept)
    return [*apart, rest] if rest else apart


def _divided(
    prompts: Sequence[Prompt], some: Sequence[int], above: int, kept: Collection[Prompt]
) -> tuple[list[int], list[list[int]]]:
    """Which of `some`, in order, best run with others that share only `above` tokens, and the families of the rest."""
    start = prompts[some[0]][: common_length([prompts[some[0]], prompts[some[-1]]])]
    mine: list[int] = []
    apart: list[list[int]] = []
    for _, run in groupby(some, key=lambda i: prompts[i][len(start) : len(start) + 1]):
        alike = list(run)
        if len(alike) == len(some):
            mine = alike
        else:
            along, others = _divided(prompts, alike, len(start), kept)
            mine += along
            apart += others
    known = max((len(each) for each in kept if start[: len(each)] == each), default=0)
    saved = len(mine) * (len(start) - above) - (len(start) - max(known, above))
    return (mine, apart) if saved <= PASS_COST else ([], [*apart, mine])


def fitting(some: Sequence[int], slots: Sequence[int]) -> list[list[int]]:
    """`some`, in order, in runs that fit into one pass; the key-value slots of each, ascending, are `slots`."""
    runs: list[list[int]] = []
    for i, size in zip(some, slots, strict=True):
        if not runs or len(runs[-1]) == ROWS or (len(runs[-1]) + 1) * size > SLOTS:
            runs.append([])
        runs[-1].append(i)
    return runs


def even(some: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """`some`, in order, cut where that is cheapest: a pass costs its rows times its last, longest one, and PASS_COST.

    `lengths`, ascending, are theirs in tokens.
    """
    cheapest, begins = [0], [0]
    for end, longest in enumerate(lengths, 1):
        cost, begin = min((cheapest[begin] + (end - begin) * longest + PASS_COST, begin) for begin in range(end))
        cheapest.append(cost)
        begins.append(begin)
    runs, end = [], len(some)
    while end:
        runs.append(list(some[begins[end] : end]))
        end = begins[end]
    return runs[::-1]


def common_length(prompts: Sequence[Prompt]) -> int:
    """How many leading tokens all `prompts` share: in sorted order, as many as the first and the last do."""
    first, last = min(prompts), max(prompts)
    for at, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return at
    return min(len(first), len(last))


def choice_distribution(raw: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Normalised log-probs [..., choices] of choices with those summed log-probs: what is sampled and learned from."""
    return torch.log_softmax((raw if bias is None else raw + bias) / temperature, dim=-1)


def _draw(request: ChoiceRequest, raw: tuple[float, ...]) -> Chosen:
    bias = None if request.bias is None else torch.tensor(request.bias, dtype=torch.float64)
    logprobs = choice_distribution(torch.tensor(raw, dtype=torch.float64), bias, request.temperature or 1.0)
    if request.temperature == 0:
        index = int(logprobs.argmax())
    else:
        index = _pick(logprobs.exp().numpy(), np.random.Generator(np.random.PCG64(request.seed)))
    return Chosen(index, tuple(logprobs.tolist()), raw)


def _sample(logits: Tensor, request: TextRequest, draw: np.random.Generator) -> tuple[int, float]:
    if request.temperature == 0:
        token = int(logits.argmax())
        return token, float(torch.log_softmax(logits, dim=-1)[token])
    logprobs = torch.log_softmax(logits.double() / request.temperature, dim=-1)
    if request.top_p < 1:
        ordered, order = logprobs.exp().sort(descending=True)
        dropped = order[ordered.cumsum(0) - ordered >= request.top_p]
        logprobs = torch.log_softmax(logprobs.index_fill(0, dropped, -torch.inf), dim=-1)
    token = _pick(logprobs.exp().numpy(), draw)
    return token, float(logprobs[token])


def _pick(probabilities: np.ndarray, draw: np.random.Generator) -> int:
    """An index by inverse transform: one uniform number a draw, so a seed means the same draw in any batch."""
    cumulated = probabilities.cumsum()
    return int(np.searchsorted(cumulated, draw.random() * cumulated[-1], side="right"))


def _keep(kept: OrderedDict, key: object, value: object, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)
