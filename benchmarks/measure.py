"""Time and memory of peers that have passed the gate."""

import collections
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time

import keras

from benchmarks import frameworks
from benchmarks.parity import prepare
from benchmarks.report import ROOT

# Calls in a sample: enough that the clock's and the launch's granularity do not show.
SAMPLE_SECONDS = 0.02
# How long a call runs before it is timed: clocks go up, caches and pools fill.
WARM_UP_SECONDS = 0.3

OUT_OF_MEMORY = {"failure": "out of memory"}


def measure_times(case, chosen, variants, repeat, baseline):
    """Times peers in turn, after each has been compiled and all have run warm.

    Args:
        case: `Case`.
        chosen: List of `Peer`.
        variants: List of strings.
        repeat: Int >= 1, turns.
        baseline: String, the peer that ratios refer to, within a variant.

    Returns:
        A dict from `(peer, variant)` to a dict with the keys "median_ms", "low_ms" and "high_ms"
        (the quartiles), "samples" and "ratio" (`None` without the baseline); with the key "failure"
        alone where an accelerator's memory did not suffice.
    """
    framework = frameworks.active()
    calls, failures = {}, {}
    for peer, variant in itertools.product(chosen, variants):
        key = peer.name, variant
        try:
            call = prepare(case, peer, variant)
            framework.wait(call())  # compiles
            calls[key] = call
        except framework.out_of_memory:
            failures[key] = OUT_OF_MEMORY
        if key in failures:  # outside of the handler, which holds what the call had made
            framework.release()
    numbers = {
        key: max(1, math.ceil(SAMPLE_SECONDS / warm_up(call))) for key, call in calls.items()
    }
    samples = {key: [] for key in calls}
    order = collections.deque(calls)
    for _ in range(repeat):
        for key in order:
            samples[key].append(framework.seconds(calls[key], numbers[key]))
        order.rotate(-1)
    return failures | {
        (peer, variant): summarize(times, samples.get((baseline, variant)))
        for (peer, variant), times in samples.items()
    }


def warm_up(call):
    """Runs a call until it is warm; gives the seconds that it takes then."""
    framework, end = frameworks.active(), time.monotonic() + WARM_UP_SECONDS
    seconds = framework.seconds(call, 1)
    while time.monotonic() < end:
        seconds = framework.seconds(call, 1)
    return seconds


def summarize(times, baseline):
    """Median and quartiles of seconds, and the median ratio to seconds of the same turns."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if times[1:] else times * 3
    ratio = None
    if baseline is not None:
        ratio = statistics.median(a / b for a, b in zip(times, baseline, strict=True))
    return {
        "median_ms": 1e3 * statistics.median(times),
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "samples": len(times),
        "ratio": ratio,
    }


def memory_of_one_call(case, peer, variant, device):
    """Peak memory of this process after one call; see `measure_memory`."""
    framework = frameworks.active()
    call = prepare(case, peer, variant)
    if device == "cpu":
        before, _ = frameworks.resident_bytes()
        framework.wait(call())
        _, peak = frameworks.resident_bytes()
    else:
        if framework.resets_peak:
            framework.wait(call())  # compiles, and makes what libraries keep
            framework.reset_peak()
        before = framework.device_peak()
        framework.wait(call())
        peak = framework.device_peak()
    return {"peak_mib": peak / 2**20, "rise_mib": (peak - before) / 2**20}


def measure_memory(case, chosen, variants, device, modules=()):
    """Peak memory of one call of each peer.

    In a process of its own, except on an accelerator whose peak can be reset.

    Args:
        case: `Case`.
        chosen: List of `Peer`.
        variants: List of strings.
        device: String.
        modules: Names of the modules that registered further peers.

    Returns:
        A dict from `(peer, variant)` to a dict with the keys "peak_mib", all that the process held
        (on an accelerator: allocated), and "rise_mib", what the call added, in a process of its own
        with its compilation; with the key "failure" alone where an accelerator's memory did not
        suffice.

    Raises:
        RuntimeError: If a process fails.
    """
    framework = frameworks.active()
    found = {}
    for peer, variant in itertools.product(chosen, variants):
        key = peer.name, variant
        if device == "cpu" or not framework.resets_peak:
            found[key] = memory_of_one_process(case, peer, variant, device, modules)
            continue
        try:
            found[key] = memory_of_one_call(case, peer, variant, device)
        except framework.out_of_memory:
            found[key] = OUT_OF_MEMORY
        if found[key] is OUT_OF_MEMORY:
            framework.release()
    return found


def memory_of_one_process(case, peer, variant, device, modules):
    """`memory_of_one_call` in a process of its own."""
    request = {
        "case": dataclasses.asdict(case),
        "peer": peer.name,
        "variant": variant,
        "device": device,
        "modules": list(modules),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--memory-of", json.dumps(request)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"measuring the memory of {peer.name} ({variant}) failed:\n{done.stderr}"
        )
    return json.loads(done.stdout.splitlines()[-1])
