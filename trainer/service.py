"""The table of the trainer."""

from sia_events.shared.events import WeightUpdateRequested
from sia_events.shared.service import Service
from sia_events.trainer.perform import update

trainer = Service("trainer", performs={WeightUpdateRequested: update})
