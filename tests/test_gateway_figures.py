"""The gateway's benchmark measures what it says: small versions of its parts. No figure is held to its goal."""

from pathlib import Path

from sia_events import gateway_figures


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
    figure = await gateway_figures.generation(tmp_path, generations=2)
    assert figure.value > 0 and figure.beside["boxes"] == 2, "one attempt on dev and one on gate: a harness was written"
