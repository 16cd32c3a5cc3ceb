"""The learner: adapter, critic and optimiser in motion, a step at a time, and their way to the checkpoint and back."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sia_events.trainer.algorithms import ALGORITHMS
from sia_events.trainer.batches import Room, parts
from sia_events.trainer.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from sia_events.trainer.engines import Engine, OutOfMemory, out_of_memory
from sia_events.trainer.groups import RolloutGroup
from sia_events.trainer.holding import Looks, expected_reward
from sia_events.trainer.observing import COLLAPSE_WINDOW, Answers, Tally
from sia_events.trainer.preparing import Method, Prepared, prepare
from sia_events.trainer.spec import Spec
from sia_events.trainer.updating import Part, PartLoss, distances, lengths_of, part_loss, totals
from sia_events.trainer.views import view

T = TypeVar("T")


class Diverged(Exception):
    """Learning left the finite numbers; the message says where. What was learned until then is worth nothing."""


@dataclass
class Progress:
    """How far learning has come. `room` is for what goes through the model at once, `masked` counts no sample twice.

    `seconds` and `cpu_seconds` are what it took up to here, in however many processes.
    """

    room: Room
    step: int = 0
    tokens: int = 0
    masked: set[str] = field(default_factory=set)
    recent: deque[Answers] = field(default_factory=lambda: deque(maxlen=COLLAPSE_WINDOW))
    prepared: Prepared | None = None
    looks: Looks | None = None
    line: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Learner:
    """One update under way. It goes on from the spec's checkpoint where there is one of the same update.

    What there is `room` for goes through the model at once. With `theirs` the loss is TRL's; what is told of a step is
    computed as ever. It began `begun`, by `time.monotonic`, or now.
    """

    def __init__(
        self,
        engine: Engine,
        spec: Spec,
        steps: int,
        room: Room,
        theirs: PartLoss | None = None,
        begun: float | None = None,
    ) -> None:
        self.steps = steps
        self._begun = time.monotonic() if begun is None else begun
        self._theirs = theirs
        self._best: list[Tensor] = []
        self.progress = Progress(room)
        self._engine, self._spec = engine, spec
        algorithm = ALGORITHMS[spec.algorithm]
        head = torch.nn.Linear(engine.width, 1, device=engine.device) if algorithm.critic else None
        self._policy = [factor for _, pair in sorted(engine.adapter.factors.items()) for factor in pair]
        self._critic = [] if head is None else list(head.parameters())
        with torch.no_grad():
            for parameter in self._critic:
                parameter.zero_()
        self._method = Method(algorithm, spec.learning, head)
        self._optimiser = torch.optim.AdamW(self._policy + self._critic, lr=spec.learning.lr, weight_decay=0.0)
        self._identity = spec.identity
        self._resume()
        self._before = self.progress.tokens
        self._earlier = self.progress.seconds, self.progress.cpu_seconds

    def gradients(self, batch: Sequence[RolloutGroup], fresh: bool) -> Tally:
        """Leave the batch's gradients in the parameters. A `fresh` batch is weighed first; another step on it is not.

        Raises OutOfMemory when the batch does not fit, in halves of its parts either, and Diverged where loss or
        gradients are no numbers.
        """
        if fresh:
            self.progress.prepared = None
        tally = self._fitting(lambda: self._gradients(batch))
        given = [parameter.grad for parameter in self._policy + self._critic if parameter.grad is not None]
        if not (isfinite(tally.loss) and torch.nn.utils.get_total_norm(given).isfinite()):
            step = self.progress.step + 1
            raise Diverged(f"the loss of step {step} is {tally.loss:g}, or its gradients are no finite numbers.")
        return tally

    def require_finite(self) -> None:
        """Raises Diverged where the weights themselves are no numbers, which a last step can leave."""
        if not all(factor.isfinite().all() for factor in self._policy):
            raise Diverged(f"the adapter's factors behind step {self.progress.step} are no finite numbers.")

    def _fitting(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Outside of the handler, whose error still holds what was computed.
        self.progress.room = halved = self.progress.room.halved()
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemory(f"also with {halved.scenes} prompts at once, of {halved.tokens} tokens") from error

    def _gradients(self, batch: Sequence[RolloutGroup]) -> Tally:
        engine, progress, learning = self._engine, self.progress, self._spec.learning
        self._optimiser.zero_grad()
        progress.prepared = progress.prepared or prepare(engine, self._method, batch, progress.room)
        whole, tally, first = totals(self._method, batch), Tally.of(batch), 0
        samples = [f"{group.name}#{number}" for group in batch for number in range(len(group.samples))]
        cut = list(parts(engine, batch, progress.room, self._method.least))
        apart = distances(engine, cut, whole)
        for groups in cut:
            with torch.set_grad_enabled(self._theirs is None):
                views = view(engine, groups, entropy=learning.entropy > 0, hidden=self._method.head is not None)
                part = Part(groups, views, first)
                loss, figures, masked = part_loss(self._method, part, progress.prepared, whole, apart)
            if self._theirs is not None:
                loss = self._theirs(part, progress.prepared, whole, masked)
            tally.add(groups, views, loss.item(), figures)
            loss.backward()
            progress.masked |= {samples[at] for at in masked}
            first += sum(sum(lengths_of(group)) for group in groups)
        return tally

    def told(self, step: int, tally: Tally, seconds: float) -> dict[str, Any]:
        """The line of a step whose gradients are there."""
        progress = self.progress
        assert progress.prepared is not None, "a step has gradients of a batch"
        progress.tokens += tally.tokens
        progress.recent.append(tally.answers)
        progress.line = {
            **{"step": step, "steps": self.steps, "lr": self._spec.learning.lr * self._schedule(step)},
            **tally.means(),
            **progress.prepared.figures,
            **self._looked(),
            **{"masked": len(progress.masked), "tokens": progress.tokens},
        }
        # What was learned from before the checkpoint took seconds of another process.
        own = progress.tokens - self._before
        return {**progress.line, "tokens_per_second": round(own / max(seconds, 1e-9), 1)}

    def take(self, step: int) -> None:
        """The step itself, down the gradients that are there."""
        for group in (self._policy, self._critic):
            torch.nn.utils.clip_grad_norm_(group, self._spec.grad_norm)
        for setting in self._optimiser.param_groups:
            setting["lr"] = self._spec.learning.lr * self._schedule(step)
        self._optimiser.step()
        self.progress.step = step

    def look(self, held: Sequence[RolloutGroup]) -> None:
        """See what reward the weights can expect of the groups that are held out; the best weights are kept.

        Raises OutOfMemory.
        """
        progress = self.progress
        expected = self._fitting(lambda: expected_reward(self._engine, held, progress.room))
        if progress.looks is None:
            progress.looks = Looks(expected, expected, expected)
            return
        progress.looks.add(progress.step, expected)
        if progress.looks.best_step == progress.step:
            self._best = [factor.detach().clone() for factor in self._policy]
        progress.line |= self._looked()

    def fell(self) -> bool:
        """Whether the last looks were below the best before them, as many as patience is had for."""
        looks = self.progress.looks
        return looks is not None and looks.below >= self._spec.learning.patience

    def take_best(self, held: Sequence[RolloutGroup]) -> int:
        """Put the weights of the best look, the last step's too, in the place of the last step's.

        Returns the best look's step; 0 where that is the first, before any step, which leaves the weights as they are.
        """
        looks = self.progress.looks
        assert looks is not None, "it was looked before the first step"
        if looks.step < self.progress.step:
            self.look(held)
        with torch.no_grad():
            for factor, best in zip(self._policy, self._best, strict=bool(looks.best_step)):
                factor.copy_(best)
        return looks.best_step

    def _looked(self) -> dict[str, float]:
        return {} if self.progress.looks is None else self.progress.looks.figures()

    def _schedule(self, step: int) -> float:
        """Share of the full learning rate: up over `warmup` steps, then down in a line to a tenth at the end."""
        warmup = self._spec.warmup
        if step <= warmup:
            return step / warmup
        return 1 - 0.9 * (step - warmup) / max(1, self.steps - warmup)

    def timed(self) -> dict[str, float]:
        """What learning took so far: that of a process before this one up to its last checkpoint."""
        progress, (seconds, cpu_seconds) = self.progress, self._earlier
        progress.seconds = round(seconds + time.monotonic() - self._begun, 3)
        progress.cpu_seconds = round(cpu_seconds + time.process_time(), 3)
        return {"seconds": progress.seconds, "cpu_seconds": progress.cpu_seconds, "earlier_seconds": seconds}

    def keep(self) -> None:
        """Put the state on disk, in the place of the last step's. Raises SavingFailed."""
        if self._spec.checkpoint is None:
            return
        self.timed()
        progress = self.progress
        # Behind the last step on a batch the next one is weighed anew.
        within = progress.step % self._spec.learning.updates
        state = vars(progress) | {
            "room": asdict(progress.room),
            "masked": sorted(progress.masked),
            "recent": [asdict(answers) for answers in progress.recent],
            "prepared": asdict(progress.prepared) if within and progress.prepared else None,
            "looks": asdict(progress.looks) if progress.looks else None,
        }
        save_checkpoint(Path(self._spec.checkpoint), Checkpoint(self._identity, progress.step, state, self._tensors()))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"parameter.{at}": value.detach() for at, value in enumerate(self._policy + self._critic)}
        tensors |= {f"best.{at}": value for at, value in enumerate(self._best)}
        for at, moments in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{at}.{name}": value for name, value in moments.items()}
        return tensors

    def _resume(self) -> None:
        found = load_checkpoint(Path(self._spec.checkpoint), self._identity) if self._spec.checkpoint else None
        if found is None:
            return
        state = dict(found.state)
        # Earlier releases told the scenes alone.
        room = state.pop("room", None) or {"scenes": state.pop("scenes"), "tokens": self.progress.room.tokens}
        recent = [Answers(**{name: [tuple(a) for a in said] for name, said in row.items()}) for row in state["recent"]]
        prepared = None if state["prepared"] is None else Prepared(**state["prepared"])
        looks = None if state["looks"] is None else Looks(**state["looks"])
        self.progress = Progress(
            **state
            | {
                "room": Room(**room),
                "masked": set(state["masked"]),
                "recent": deque(recent, maxlen=COLLAPSE_WINDOW),
                "prepared": prepared,
                "looks": looks,
            }
        )
        if looks is not None and looks.best_step:
            self._best = [found.tensors[f"best.{at}"] for at in range(len(self._policy))]
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in found.tensors.items():
                kind, at, *rest = name.split(".")
                if kind == "parameter":
                    (self._policy + self._critic)[int(at)].copy_(tensor)
                elif kind == "optimiser":
                    moments.setdefault(int(at), {})[rest[0]] = tensor
        settings = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": settings})
