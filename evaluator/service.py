"""The table of the evaluator."""

from sia_events.evaluator.kernel import score_kernel
from sia_events.evaluator.perform import judge
from sia_events.shared.events import ExecutionLogged, KernelMeasured
from sia_events.shared.service import Service

evaluator = Service("evaluator", performs={ExecutionLogged: judge, KernelMeasured: score_kernel})
