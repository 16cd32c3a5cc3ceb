"""Items that are held out of learning: which they are, what they tell, and when learning ends for it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import CHOICES, choice_lines, completion_lines, spec, trained
from tiny import make_model

from sia_events.trainer.batches import Room
from sia_events.trainer.checkpoints import load_checkpoint
from sia_events.trainer.engines import Engine
from sia_events.trainer.groups import Act, Rollout, RolloutGroup, Scene, read
from sia_events.trainer.holding import divided, expected_reward
from sia_events.trainer.learn import learn
from sia_events.trainer.opening import opened

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def group(name: str, rewards: tuple[float, ...] = (0.0, 1.0)) -> RolloutGroup:
    scene = Scene(True, (1, 20, 2), CHOICES, None, 1.0)
    return RolloutGroup(name, (scene,), tuple(Rollout(reward, (Act(0, 0, None),)) for reward in rewards))


def test_about_that_share_of_the_items_is_held_out_the_same_ones_each_time() -> None:
    groups = [group(f"g0a.train.g1/i{at}") for at in range(2000)]
    learned, held = divided(groups, 0.1, seed=3)
    assert 160 < len(held) < 240 and len(learned) + len(held) == 2000
    assert divided(groups, 0.1, seed=3) == (learned, held)
    assert divided(groups, 0.1, seed=4)[1] != held
    assert divided(groups, 0.0, seed=3) == (groups, [])


def test_an_item_is_on_one_side_with_the_samples_of_every_attempt() -> None:
    groups = [group(f"{attempt}/i{at}") for attempt in ("g0a.train.g1", "g1a.train.g2") for at in range(50)]
    learned, held = divided(groups, 0.3, seed=0)
    items = [{one.name.partition("/")[2] for one in side} for side in (learned, held)]
    assert held and not items[0] & items[1]


def test_what_is_held_out_and_cannot_be_told_apart_is_on_no_side() -> None:
    groups = [group(f"a/{at}", (1.0, 1.0)) for at in range(100)]
    learned, held = divided(groups, 0.3, seed=0)
    assert held == [] and 50 < len(learned) < 90


def test_where_nothing_would_be_left_to_learn_from_nothing_is_held_out(tiny: Path, tmp_path: Path) -> None:
    lines = [line | {"group": "only"} for line in choice_lines(tiny, count=2)]
    out = next(seed for seed in range(99) if not divided([group("only")], 0.5, seed)[0])
    *steps, last = learn(spec(tiny, tmp_path, lines, hold_out=0.5, seed=out, epochs=2))
    assert len(steps) == 2 and last["adapter"] is not None
    assert last["counts"]["groups"] == 1 and "held_out" not in last["counts"]


def rollouts(tiny: Path, folder: Path, lines: Lines, **options: Any) -> tuple[Engine, list[RolloutGroup]]:
    settings = spec(tiny, folder, lines, **options)
    return opened(settings)[0], read(Path(settings.rollouts))[0]


@pytest.mark.parametrize("make", [choice_lines, completion_lines])
def test_under_the_weights_that_made_the_rollouts_their_mean_reward_is_expected(
    tiny: Path, tmp_path: Path, make: Any
) -> None:
    lines = make(tiny, count=12)
    engine, groups = rollouts(tiny, tmp_path, lines)
    mean = sum(line["reward"] for line in lines) / len(lines)
    assert expected_reward(engine, groups, room=Room(5, 9999)) == pytest.approx(mean, abs=1e-4)


def test_samples_that_have_become_likelier_weigh_more(tiny: Path, tmp_path: Path) -> None:
    """By hand: one of two samples has become e times as likely, and the other one stayed as it was."""
    lines = completion_lines(tiny, count=1)[:2]
    for line, reward, by in zip(lines, (0.25, 1.0), (0.0, -1.0), strict=True):
        (step,) = line["steps"]
        line["reward"] = reward
        step["logprobs"] = [step["logprobs"][0] + by, *step["logprobs"][1:]]
    engine, groups = rollouts(tiny, tmp_path, lines)
    expected = (0.25 + 1.0 * math.e) / (1 + math.e)
    assert expected_reward(engine, groups, room=Room(8, 9999)) == pytest.approx(expected, abs=1e-5)


def test_what_is_held_out_is_not_learned_from_and_what_was_seen_of_it_is_told(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny)
    *steps, last = learn(spec(tiny, tmp_path / "held", lines, hold_out=0.3, look_every=2, epochs=2))
    groups = read(tmp_path / "held" / "rollouts.jsonl")[0]
    out = {one.name for one in divided(groups, 0.3, seed=0)[1]}
    assert last["counts"]["held_out"] == len(out) > 5
    assert last["held_out_start"] == steps[0]["held_out_start"] == steps[0]["held_out_last"]
    assert last["held_out_best"] > last["held_out_start"] + 0.1
    assert steps[2]["held_out_last"] > steps[0]["held_out_last"]
    # Other rewards of the held-out items change what is seen, and none of the steps.
    other = [line | {"reward": line["reward"] * 0.5} if line["group"] in out else line for line in lines]
    *again, end = learn(spec(tiny, tmp_path / "other", other, hold_out=0.3, look_every=2, epochs=2))
    assert [step["loss"] for step in again] == [step["loss"] for step in steps]
    assert end["held_out_best"] == pytest.approx(last["held_out_best"] / 2)


def misled(lines: Lines, folder: Path, tiny: Path, share: float) -> Lines:
    """Rewards of the held-out items turned round: whatever is learned from the others makes them worse."""
    spec(tiny, folder, lines)
    out = {one.name for one in divided(read(folder / "rollouts.jsonl")[0], share, seed=0)[1]}
    return [line | {"reward": 1 - line["reward"]} if line["group"] in out else line for line in lines]


def test_learning_that_makes_held_out_items_worse_ends_and_leaves_no_adapter(tiny: Path, tmp_path: Path) -> None:
    lines = misled(choice_lines(tiny), tmp_path / "lines", tiny, 0.3)
    settings = {"hold_out": 0.3, "look_every": 2, "patience": 2, "epochs": 9}
    *steps, last = learn(spec(tiny, tmp_path, lines, **settings))
    assert (last["stopped"], last["adapter"], len(steps)) == ("held out", None, 4)
    assert not (tmp_path / "adapter").exists()


def test_the_weights_of_the_best_look_are_the_update(tiny: Path, tmp_path: Path) -> None:
    options = {"hold_out": 0.3, "look_every": 1, "patience": 3, "lr": 0.1, "epochs": 9}
    lines = choice_lines(tiny)
    *steps, last = learn(spec(tiny, tmp_path / "whole", lines, **options))
    best = int(last["held_out_best_step"])
    assert last["stopped"] == "held out" and best == len(steps) - 3 > 0
    settings = spec(tiny, tmp_path / "part", lines, checkpoint=str(tmp_path / "checkpoint"), **options)
    begun = learn(settings)
    for line in begun:
        if line["step"] == best + 1:
            break
    begun.close()
    found = load_checkpoint(tmp_path / "checkpoint", settings.identity)
    assert found is not None and found.step == best
    made = trained(tiny, tmp_path / "whole" / "adapter")
    flat = [factor for _, pair in sorted(made.factors.items()) for factor in pair]
    assert all(torch.equal(found.tensors[f"parameter.{at}"], factor) for at, factor in enumerate(flat))


def test_held_out_items_are_told_of_by_log_probs_whatever_the_algorithm(tiny: Path, tmp_path: Path) -> None:
    lines = choice_lines(tiny, count=12)
    lines[9]["steps"][0]["logprobs"] = None
    with pytest.raises(ValueError, match="log-probs are missing"):
        list(learn(spec(tiny, tmp_path, lines, algorithm="cloning", hold_out=0.2)))
