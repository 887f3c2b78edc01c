"""What becomes of this process and of a writer process beside it: containers, schedulers, the OOM killer."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from asyncckpt.cli.output import format_bytes, format_secs
from asyncckpt.doctor.child import run_python
from asyncckpt.doctor.finding import NOTE, OK, WARNING, Finding, Place, format_latency
from asyncckpt.naming import INIT_NAME

_INITIAL_NAMESPACE = "pid:[4026531836]"  # linux/proc_ns.h: PROC_PID_INIT_INO
_CAP_SYS_RESOURCE = 24
_SLOW_START_SECS = 0.5
_LARGE_BYTES = 60_000_000
_RUN = "start the training by `asyncckpt run -- COMMAND`"

_REPORT_MEMORY = """
import asyncckpt.service.worker, asyncckpt.storage.local
try:
    status = open("/proc/self/status").read()
    print(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])
except OSError:
    print(0)
"""


def check_container(place: Place) -> Finding:
    """Whether a writer process outlives a trainer that is killed."""
    lives = "a writer process finishes what was staged when the trainer is killed"
    if _is_awaited(place):
        return Finding(OK, "asyncckpt run waits for writers", lives)
    try:
        namespace = os.readlink(place.root / "proc/self/ns/pid")
    except OSError:
        return Finding(NOTE, "unknown: no /proc/self/ns/pid", "", f"in a container, {_RUN}")
    if namespace != _INITIAL_NAMESPACE:
        found = "a PID namespace of its own, a container say: it ends with its first process"
        return Finding(WARNING, found, "a writer process is killed with it, and what it has not finished is lost", _RUN)
    if "SLURM_JOB_ID" in place.environment:
        return Finding(NOTE, "a Slurm step: its end kills all of its processes", "so does it the writer process", _RUN)
    return Finding(OK, "no container", lives)


def _is_awaited(place: Place) -> bool:
    """Whether the first process, or one above us, is `asyncckpt run`."""
    pid = "self"
    while pid not in ("0", "1"):
        try:
            pid = place.read(f"proc/{pid}/stat").rpartition(")")[2].split()[1]
            if pid != "0" and place.read(f"proc/{pid}/comm").strip() == INIT_NAME:
                return True
        except OSError:
            break
    try:
        return place.read("proc/1/comm").strip() == INIT_NAME
    except OSError:
        return False


def check_grace(place: Place) -> Finding:
    """How long there is between being told to end and being killed: only what the environment gives away."""
    environment = place.environment
    found, advice = [], []
    if "SLURM_JOB_ID" in environment:
        found.append(f"Slurm: 30 s, unless KillWait says otherwise{_rest_of_slurm_job(place)}")
        advice.append("sbatch --signal=TERM@120 tells the steps earlier")
    if "KUBERNETES_SERVICE_HOST" in environment:
        found.append("Kubernetes: 30 s, unless the pod says otherwise")
        advice.append("set terminationGracePeriodSeconds to what a save takes, and more")
    if "TORCHELASTIC_RUN_ID" in environment:
        found.append("torchrun: 30 s for its workers")
        advice.append("torchrun --shutdown-timeout, and --signals-to-handle for others than SIGTERM and SIGINT")
    if not found:
        return Finding(OK, "no Slurm, Kubernetes or torchrun around this process")
    return Finding(NOTE, "; ".join(found), "a save must be durable within that", "; ".join(advice))


def _rest_of_slurm_job(place: Place) -> str:
    try:
        rest = int(place.environment["SLURM_JOB_END_TIME"]) - time.time()
    except (KeyError, ValueError):
        return ""
    return f"; the job ends in {format_secs(rest)}" if rest > 0 else ""


def check_oom(place: Place) -> Finding:
    """Whom the kernel kills first when memory runs out."""
    try:
        score = int(place.read("proc/self/oom_score_adj"))
        capabilities = next(
            line.split()[1] for line in place.read("proc/self/status").splitlines() if line.startswith("CapEff:")
        )
    except (OSError, StopIteration, ValueError):
        return Finding(NOTE, "unknown: no /proc/self/oom_score_adj")
    found = f"oom_score_adj {score} (-1000 is never killed, 1000 first)"
    if _is_killed_as_one(place):
        found += "; memory.oom.group: all processes are killed together"
        advice = "leave memory to spare, or let the kubelet set singleProcessOOMKill"
        return Finding(WARNING, found, "a writer process dies with the trainer: only what wait() saw is safe", advice)
    if int(capabilities, 16) >> _CAP_SYS_RESOURCE & 1:
        return Finding(OK, found, "a writer process may get a lower one than the trainer")
    return Finding(NOTE, found, "a writer process gets the same: only a privileged one may lower it")


def _is_killed_as_one(place: Place) -> bool:
    """Whether a control group over this process (version 2) says so, as Kubernetes since 1.28 makes them."""
    try:
        lines = place.read("proc/self/cgroup").splitlines()
    except OSError:
        return False
    for group in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        parts = [part for part in group.split("/") if part]
        for length in range(len(parts), -1, -1):
            with contextlib.suppress(OSError):
                if place.read("/".join(["sys/fs/cgroup", *parts[:length], "memory.oom.group"])).strip() == "1":
                    return True
    return False


def check_writer(place: Place) -> Finding:
    """Whether a writer process can be started, how fast, and how large it is before it writes."""
    if getattr(sys, "frozen", False):
        return Finding(NOTE, "a frozen program has no Python interpreter to start", "threads write")
    started = time.perf_counter()
    try:
        num_bytes = int(run_python(_REPORT_MEMORY)) * 1024
    except (OSError, ValueError) as error:
        return Finding(NOTE, f"no Python can be started: {error}", "threads write", "run this by a plain Python")
    secs = time.perf_counter() - started
    found = f"ready in {format_latency(secs)}" + (f", with {format_bytes(num_bytes)} of memory" if num_bytes else "")
    if secs > _SLOW_START_SECS or num_bytes > _LARGE_BYTES:
        return Finding(
            NOTE, found, 'writer="process" works', "slow imports, or a busy machine; save() waits for neither"
        )
    return Finding(OK, found, 'writer="process" works')
