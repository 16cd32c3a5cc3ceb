"""The table of kernel_bench."""

from sia_events.kernel_bench.perform import measure_kernel
from sia_events.shared.events import ExecutionLogged
from sia_events.shared.service import Service

kernel_bench = Service("kernel_bench", performs={ExecutionLogged: measure_kernel})
