"""The gateway's benchmark measures what it says: small versions of its parts. No figure is held to its goal."""

import os
import sys
from pathlib import Path

import pytest

from sia_events import beside_sia_agent, gateway_figures
from sia_events.errors import Unusable


@pytest.fixture
def sia_python() -> Path:
    """The interpreter that the environment names; the package takes 1 GB."""
    if not (named := os.environ.get("SIA_AGENT_PYTHON")):
        pytest.skip("SIA_AGENT_PYTHON names no interpreter that has sia-agent[pydantic-ai]")
    return Path(named).absolute()


async def test_calls_through_the_gateway_are_counted_timed_and_bounded(tmp_path: Path):
    async with gateway_figures.bench(tmp_path, core=None) as servers:
        median, worst, token = await gateway_figures.calls(servers, pairs=20, streams=10)
        asked = await servers.asked()
        rate = await gateway_figures.rate(servers, calls=80)
        race = await gateway_figures.race(servers)
    assert median.beside["gateway p50"] > median.beside["direct p50"] > 0
    assert worst.beside["gateway p99"] >= median.beside["gateway p50"]
    assert token.beside["gateway p50"] > 0
    assert asked == 2 * (20 + 10 + 2 * gateway_figures.WARM), "no call was answered from the journal"
    assert rate.beside["lost"] == 0 and rate.beside["provider asked"] == 80
    assert rate.value > 0 and rate.beside["gateway CPU ms a call"] > 0
    assert (race.value, race.beside, race.reached) == (50, {"status 200": 50, "status 402": 150}, True)


async def test_a_generation_is_written_by_the_instant_llm(tmp_path: Path):
    (own,) = await gateway_figures.generation(tmp_path, None, generations=2)
    assert own.value > 0 and own.beside["boxes"] == 2, "one attempt on dev and one on gate: a harness was written"
    assert own.beside["generations"] == 1, "the time from the first that counts to the second; no earlier one counts"
    assert own.beside["sia-agent"].startswith("not measured"), "nobody named an interpreter that has it"


async def test_a_generation_of_sia_agent_is_measured_beside_it_by_each_of_its_backends(
    tmp_path: Path, sia_python: Path
):
    own, *its = await gateway_figures.generation(tmp_path, sia_python, generations=2)
    assert "sia-agent" not in own.beside
    assert [figure.name.rpartition(" ")[2] for figure in its] == list(beside_sia_agent.BACKENDS)
    assert all(figure.value > 0 and figure.goal == "" and "no sandbox" in figure.beside["apart"] for figure in its)
    for backend in beside_sia_agent.BACKENDS:
        harnesses = [
            (tmp_path / backend / f"runs/run_1/gen_{number}/target_agent.py").read_text() for number in (1, 2, 3)
        ]
        assert len(set(harnesses)) == 3, "every generation's agent was written anew"


def test_an_interpreter_without_the_package_is_refused_with_what_to_install():
    with pytest.raises(Unusable, match=r"pip install 'sia-agent\[pydantic-ai\]==0\.6\.0'"):
        beside_sia_agent.version_of(Path(sys.executable))
