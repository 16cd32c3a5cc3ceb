"""The oracle in a process of its own: judging stays light, and BLAS can be held to one thread there.

Left to itself BLAS takes every core and spins while it waits, which on a busy machine costs ten times the work.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sia_events.kernel_bench.host import BenchUnavailable
from sia_events.kernel_bench.problems import Array, Inputs, Problem
from sia_events.shared.environment import plain

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

Oracle = Callable[[Inputs], Array]


@contextmanager
def oracle(problem: Problem) -> Iterator[Oracle]:
    """`problem.oracle`, which must be a function of a module, computed elsewhere until the end of the block.

    What is yielded raises BenchUnavailable when the process ends early.
    """
    argv = (sys.executable, "-m", "sia_events.kernel_bench.oracle")
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, env={**plain(), **ONE_THREAD}) as process:
        assert process.stdin and process.stdout
        requests, replies = process.stdin, process.stdout

        def expected(inputs: Inputs) -> Array:
            try:
                pickle.dump((problem.oracle, inputs), requests)
                requests.flush()
                return pickle.load(replies)
            except (EOFError, BrokenPipeError):
                raise BenchUnavailable(
                    f"the oracle of {problem.name} failed (stderr says how), nothing was measured"
                ) from None

        yield expected


def main() -> None:
    # The other end of the pipe closing is the one way to end this.
    with suppress(EOFError):
        while True:
            compute, inputs = pickle.load(sys.stdin.buffer)
            pickle.dump(compute(inputs), sys.stdout.buffer)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
