"""The table of the evaluator."""

from sia_events.evaluator.perform import judge
from sia_events.shared.events import ExecutionLogged
from sia_events.shared.service import Service

evaluator = Service("evaluator", performs={ExecutionLogged: judge})
