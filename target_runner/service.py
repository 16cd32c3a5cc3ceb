"""The table of target_runner."""

from sia_events.shared.events import AgentProposed, AttemptFailed, AttemptRequested, HarnessPatched, WeightsUpdated
from sia_events.shared.oversight import overseen
from sia_events.shared.service import Service
from sia_events.target_runner.decide import owe_dev, try_again
from sia_events.target_runner.perform import attempt

target_runner = Service(
    "target_runner",
    decides=overseen(
        {AgentProposed: owe_dev, HarnessPatched: owe_dev, WeightsUpdated: owe_dev, AttemptFailed: try_again}
    ),
    performs={AttemptRequested: attempt},
)
