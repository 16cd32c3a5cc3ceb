"""Each test hands the bench one kernel, most of them dishonest, and asks what it makes of it."""

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sia_events.kernel_bench.check import compare
from sia_events.kernel_bench.host import BenchUnavailable
from sia_events.kernel_bench.measure import Measurement, measure, suspicion
from sia_events.kernel_bench.problems import TRIMUL, Case, shipped, trimul_inputs, trimul_oracle
from sia_events.kernel_bench.report import render
from sia_events.kernel_bench.timing import Cost

runs_kernels = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("torch") is None, reason="kernels need Linux and torch"
)

SMALL = replace(
    TRIMUL,
    checked=(Case(16, 1, 32), Case(16, 1, 32, distribution="cauchy")),
    timed=(Case(24, 1, 64, masked=True),),
)

HONEST = shipped("reference").replace("def custom_kernel(", "def honest(")


def judged(source: str, *, repeats: int = 3, timeout_s: float = 60.0) -> Measurement:
    return measure(source, SMALL, seed=7, repeats=repeats, timeout_s=timeout_s)


def refused(body: str, *, before: str = "", timeout_s: float = 60.0) -> str:
    """The reason given for a kernel of that body; `honest` is there for it to call."""
    source = f"{HONEST}\n{before}\ndef custom_kernel(data):\n    {body}\n"
    measurement = judged(source, timeout_s=timeout_s)
    assert not measurement.correct and not measurement.flagged
    assert measurement.speedup is None and measurement.candidate_ms is None
    return measurement.reason


@runs_kernels
@pytest.mark.parametrize("name", ["channel_first", "row_blocked"])
def test_a_shipped_candidate_is_right_and_timed(name: str):
    measurement = judged(shipped(name))
    assert measurement.correct, measurement.reason
    assert not measurement.flagged, measurement.reason
    assert measurement.speedup and measurement.low and measurement.high and measurement.candidate_ms
    assert 0 < measurement.low <= measurement.speedup <= measurement.high
    assert measurement.max_error is not None and measurement.max_error < 1e-4


@runs_kernels
def test_a_constant_is_wrong():
    assert "elements wrong" in refused("return torch.zeros_like(data[0])")


@runs_kernels
def test_an_answer_remembered_by_pointer_is_wrong():
    body = "key = data[0].data_ptr(); seen.setdefault(key, honest(data)); return seen[key]"
    assert "elements wrong" in refused(body, before="seen = {}")


@runs_kernels
def test_remembering_answers_by_content_earns_nothing():
    source = f"""{HONEST}
seen = {{}}
def custom_kernel(data):
    key = bytes(data[0].numpy().tobytes())
    if key not in seen:
        seen[key] = honest(data)
        seen["misses"] = seen.get("misses", 0) + 1
    return seen[key]
"""
    measurement = judged(source)
    assert measurement.correct, measurement.reason
    # On a busy machine the middle of the interval strays by a half; what is remembered comes a hundred times faster.
    assert measurement.low is not None and measurement.low < 1.5


@runs_kernels
def test_a_kernel_that_was_right_only_until_it_was_timed_is_refused():
    body = "calls.append(0); return honest(data) if len(calls) <= 4 else torch.zeros_like(data[0])"
    assert "elements wrong" in refused(body, before="calls = []")


@runs_kernels
def test_changing_the_inputs_is_refused():
    assert refused("result = honest(data); data[0].zero_(); return result") == "it changed its inputs"


@runs_kernels
def test_patched_clocks_change_nothing():
    source = f"""{HONEST}
import time
for name in ("time", "perf_counter", "process_time", "thread_time", "monotonic", "perf_counter_ns", "process_time_ns"):
    setattr(time, name, lambda: 0)
def custom_kernel(data):
    for _ in range(9):
        honest(data)
    return honest(data)
"""
    measurement = judged(source)
    assert measurement.correct, measurement.reason
    assert measurement.speedup is not None and measurement.speedup < 0.5


@runs_kernels
def test_work_in_another_thread_is_paid_for():
    source = f"""{HONEST}
import threading
def custom_kernel(data):
    results = []
    threads = [threading.Thread(target=lambda: results.append(honest(data))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0]
"""
    measurement = judged(source)
    assert measurement.correct, measurement.reason
    assert measurement.speedup is not None and measurement.speedup < 0.7


@runs_kernels
def test_work_beside_the_baseline_which_would_slow_that_down_is_refused():
    before = """import threading, time
def spin():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
"""
    body = "threading.Thread(target=spin, daemon=True).start(); return honest(data)"
    assert refused(body, before=before) == "it worked while it was asked nothing"


@runs_kernels
def test_a_kernel_may_not_start_a_process():
    assert "PermissionError" in refused("os.fork(); return honest(data)", before="import os")


@runs_kernels
def test_a_kernel_may_not_start_a_program_while_it_is_imported():
    assert "PermissionError" in refused(
        "return honest(data)", before="import subprocess; subprocess.run(['/bin/true'])"
    )


@runs_kernels
def test_leaving_early_is_refused():
    assert "ended with status 0" in refused("os._exit(0)", before="import os")


@runs_kernels
def test_an_exception_comes_back_as_its_message():
    reason = refused("raise ValueError('no\\x1b[31m idea')")
    assert "ValueError" in reason and "\x1b" not in reason


@pytest.mark.slow  # the limit is waited for
@runs_kernels
def test_sleeping_for_ever_ends_at_the_time_limit():
    reason = refused("time.sleep(3600)", before="import time", timeout_s=15.0)
    assert reason == "the time limit passed while it was computing"


@runs_kernels
def test_sleeping_is_not_fast():
    source = f"{HONEST}\nimport time\ndef custom_kernel(data):\n    time.sleep(0.2); return honest(data)\n"
    measurement = judged(source)
    assert measurement.correct and measurement.flagged
    assert "idle for" in measurement.reason


@runs_kernels
def test_not_a_number_is_wrong():
    assert "NaN in the wrong places" in refused("return torch.full_like(data[0], float('nan'))")


@runs_kernels
@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("honest(data).double()", "the output is float64, not float32"),
        ("honest(data)[:, 1:]", "the output has shape [1, 15, 16, 32], not [1, 16, 16, 32]"),
        ("honest(data).numpy()", "not a torch.Tensor"),
    ],
)
def test_only_an_fp32_tensor_of_the_right_shape_is_an_output(result: str, reason: str):
    assert reason in refused(f"return {result}")


@runs_kernels
@pytest.mark.parametrize(
    "forgery",
    [
        b"garbage" * 100,
        b"\xff" * 64,
        b"\x00\x00\x00\x0b" + b'{"ok":true}',
        b"\x00\x00\x00\x02[]",
    ],
)
def test_writing_on_every_descriptor_forges_nothing(forgery: bytes):
    body = "[write(fd) for fd in range(64)]; return honest(data)"
    before = f"""import os
def write(fd):
    try:
        os.write(fd, {forgery!r})
    except OSError:
        pass
"""
    assert refused(body, before=before)


@runs_kernels
def test_an_overlong_source_is_refused_before_it_runs():
    assert "longer than" in judged("# " + "x" * 300_000).reason


@runs_kernels
def test_both_workers_start_through_the_launcher():
    started: list[str] = []

    def launch(argv, scratch):
        started.append(str(scratch))
        return argv

    assert measure(HONEST.replace("honest", "custom_kernel"), SMALL, repeats=1, launch=launch).correct
    assert len(set(started)) == 2


@runs_kernels
def test_an_oracle_that_fails_is_the_benchs_failure():
    with pytest.raises(BenchUnavailable, match="oracle of trimul failed"):
        measure(HONEST.replace("honest", "custom_kernel"), replace(SMALL, oracle=np.linalg.inv))


@runs_kernels
def test_a_worker_that_cannot_start_is_the_benchs_failure():
    with pytest.raises(BenchUnavailable, match="did not start"):
        measure(HONEST, SMALL, launch=lambda argv, scratch: ("/bin/false",))


def test_an_incredible_speed_up_goes_to_quarantine():
    honest = [Cost(cpu=1000, wall=1100, idle=0)]
    assert suspicion(9.9, honest) == ""
    assert "looked at by a person" in suspicion(10.1, honest)


def test_work_done_elsewhere_goes_to_quarantine():
    assert "idle" in suspicion(3.0, [Cost(cpu=100, wall=1000, idle=900)])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda value: value, ""),
        (lambda value: value + 0.019, ""),
        (lambda value: value + 0.05, "wrong"),
        (lambda value: np.where(value == 1.0, np.inf, value), "infinite"),
        (lambda value: np.where(value == 1.0, np.nan, value), "NaN"),
    ],
)
def test_an_output_is_right_within_the_tolerance(change: Callable[[np.ndarray], np.ndarray], fault: str):
    expected = np.array([0.0, 1.0, -1.0])
    assert bool(fault) == bool(compare(change(expected), expected, atol=2e-2, rtol=2e-2).fault)
    assert fault in compare(change(expected), expected, atol=2e-2, rtol=2e-2).fault


def test_infinities_must_agree_in_sign():
    assert compare(np.array([-np.inf]), np.array([np.inf]), atol=1, rtol=1).fault
    assert not compare(np.array([np.inf, np.nan]), np.array([np.inf, np.nan]), atol=1, rtol=1).fault


def test_the_oracle_is_the_formula_term_by_term():
    inputs = trimul_inputs(Case(3, 1, 4, masked=True), np.random.default_rng(0))
    (x, mask), weight = inputs.tensors, inputs.weights

    def norm(vector: np.ndarray, name: str) -> np.ndarray:
        scaled = (vector - vector.mean()) / np.sqrt(vector.var() + 1e-5)
        return scaled * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    def gated(i: int, j: int, side: str) -> np.ndarray:
        vector = norm(x[0, i, j].astype(float), "norm")
        gate = 1 / (1 + np.exp(-weight[f"{side}_gate.weight"] @ vector))
        return gate if side == "out" else mask[0, i, j] * (weight[f"{side}_proj.weight"] @ vector) * gate

    product = sum(gated(1, k, "left") * gated(2, k, "right") for k in range(3))
    wanted = weight["to_out.weight"] @ (norm(np.asarray(product), "to_out_norm") * gated(1, 2, "out"))
    np.testing.assert_allclose(trimul_oracle(inputs)[0, 1, 2], wanted, rtol=1e-9)


def test_the_same_seed_draws_the_same_inputs():
    first, again, other = (trimul_inputs(Case(4, 1, 8), np.random.default_rng(seed)).tensors[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@runs_kernels
def test_the_table_shows_figures_or_the_reason():
    right, wrong = judged(shipped("channel_first"), repeats=1), judged("raise ValueError('no')", repeats=1)
    table = render([("channel_first", right), ("broken", wrong)])
    assert re.search(r"^channel_first +\d+\.\d +\d+\.\d +\d+\.\d\d ", table, re.MULTILINE)
    assert re.search(r"^broken .*refused: ValueError: no$", table, re.MULTILINE)
