"""File systems, containers, schedulers and limits: made-up ones by their texts, and this machine's own."""

from __future__ import annotations

import importlib.metadata
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from asyncckpt.doctor import child, machine, process, speed
from asyncckpt.doctor.file_system import check_file_system
from asyncckpt.doctor.finding import NOTE, OK, PROBLEM, WARNING, Place
from asyncckpt.naming import INIT_NAME
from doctor.places import made_up, place_in

ROOT_MOUNT = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"


@pytest.mark.parametrize(
    ("kind", "options", "status", "said"),
    [
        ("ext4", "rw", OK, "ext4 at "),
        ("xfs", "rw", OK, "xfs at "),
        ("ext4", "rw,nobarrier", WARNING, "`nobarrier`"),
        ("ext4", "rw,barrier=0", WARNING, "`barrier=0`"),
        ("tmpfs", "rw", PROBLEM, "nothing survives"),
        ("ramfs", "rw", PROBLEM, "nothing survives"),
        ("overlay", "rw,lowerdir=/a", WARNING, "lost with the container"),
        ("overlay", "rw,volatile", PROBLEM, "fsync does nothing"),
        ("nfs4", "rw,hard", NOTE, "durable once the server has it"),
        ("nfs", "rw,local_lock=all", WARNING, "this machine only"),
        ("nfs", "rw,nolock", WARNING, "this machine only"),
        ("lustre", "rw,localflock", WARNING, "this machine only"),
        ("lustre", "rw,flock", NOTE, "parallel storage"),
        ("fuse.sshfs", "rw", NOTE, "a program's"),
        ("fuseblk", "rw", NOTE, "a program's"),
        ("smb3", "rw", NOTE, "the server"),
        ("virtiofs", "rw", NOTE, "the host"),
        ("unheard", "rw", NOTE, "we know nothing about it"),
    ],
)
def test_kinds_of_file_systems(tmp_path: Path, kind: str, options: str, status: str, said: str) -> None:
    """By the mount's type and options."""
    line = f"40 27 0:50 / {tmp_path} rw,relatime shared:1 - {kind} source {options}\n"
    finding = check_file_system(made_up(tmp_path, {"proc/self/mountinfo": ROOT_MOUNT + line}))
    assert finding.status == status
    assert said in finding.found
    assert finding.advice or status == OK


def test_the_mount_that_counts(tmp_path: Path) -> None:
    """The innermost, the last of two on one point; not one whose name only begins alike; with blanks in its name."""
    directory = tmp_path / "a b" / "runs-2"
    directory.mkdir(parents=True)
    point = str(directory.parent).replace(" ", "\\040")
    lines = [
        ROOT_MOUNT,
        f"40 27 0:50 / {point} rw - xfs source rw\n",
        f"41 27 0:51 / {point} rw - btrfs source rw\n",
        f"42 27 0:52 / {tmp_path} rw - ext3 source rw\n",
        f"43 27 0:53 / {point}/runs rw - tmpfs source rw\n",
    ]
    place = made_up(tmp_path, {"proc/self/mountinfo": "".join(lines)})
    assert check_file_system(Place(str(directory), root=place.root)).found == f"btrfs at {directory.parent}"


def test_where_mounts_are_unknown(tmp_path: Path) -> None:
    """On macOS, say."""
    assert check_file_system(made_up(tmp_path, {})).status == NOTE


def tree(*names: str, namespace: str = "pid:[4026531836]") -> dict[str, str]:
    """A process and its ancestors by their names, from PID 1 down; the last is this process."""
    files = {"proc/self/ns/pid": namespace}
    for number, name in enumerate(names, start=1):
        pid = "self" if number == len(names) else str(number)
        files[f"proc/{pid}/stat"] = f"{number} ({name}) S {number - 1} 1 1"
        files[f"proc/{pid}/comm"] = f"{name}\n"
    return files


@pytest.mark.parametrize(
    ("files", "environment", "status", "said"),
    [
        (tree("systemd", "bash", "python"), {}, OK, "no container"),
        (tree("systemd", "bash", "python"), {"SLURM_JOB_ID": "7"}, NOTE, "a Slurm step"),
        (tree("systemd", INIT_NAME, "odd) S 1 (name", "python"), {"SLURM_JOB_ID": "7"}, OK, "asyncckpt run waits"),
        (tree("bash", "python", namespace="pid:[4026532199]"), {}, WARNING, "a PID namespace of its own"),
        (tree("python", namespace="pid:[4026532199]"), {}, WARNING, "a PID namespace of its own"),
        (tree(INIT_NAME, "python", namespace="pid:[4026532199]"), {}, OK, "asyncckpt run waits"),
        ({}, {}, NOTE, "unknown"),
    ],
    ids=["none", "Slurm", "under run", "container", "PID 1", "container under run", "unknown"],
)
def test_containers(
    tmp_path: Path, files: Mapping[str, str], environment: Mapping[str, str], status: str, said: str
) -> None:
    """Who ends with whom."""
    finding = process.check_container(made_up(tmp_path, files, environment))
    assert (finding.status, finding.found[: len(said)]) == (status, said)
    assert ("asyncckpt run -- " in finding.advice) == (status != OK)


def test_a_shell_beside_run_in_a_container(tmp_path: Path) -> None:
    """Its parent is outside, and PID 1 none of its ancestors; the training has it."""
    files = {**tree(INIT_NAME, "x", namespace="pid:[7]"), "proc/self/stat": "9 (python) S 0 1 1"}
    assert process.check_container(made_up(tmp_path, files)).status == OK


@pytest.mark.parametrize("prefix", [[], [sys.executable, "-m", "asyncckpt", "run", "--"]], ids=["bare", "under run"])
def test_a_real_pid_namespace(tmp_path: Path, prefix: list[str]) -> None:
    """As PID 1, and below `asyncckpt run` as PID 1."""
    code = "from asyncckpt.doctor import process, finding; print(process.check_container(finding.Place('.')).status)"
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = [*unshare, *prefix, sys.executable, "-c", code]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"NOT CHECKED: no PID namespace to be had here: {tried.stderr.strip()}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("ok\n" if prefix else "warning\n", "")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "no Slurm, Kubernetes or torchrun"),
        ({"SLURM_JOB_ID": "7"}, "Slurm: 30 s"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 7300)}, "the job ends in "),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "soon"}, "Slurm: 30 s, unless KillWait says otherwise"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes: 30 s"),
        ({"TORCHELASTIC_RUN_ID": "x", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "; torchrun: 30 s"),
    ],
)
def test_grace_periods(tmp_path: Path, environment: Mapping[str, str], said: str) -> None:
    """By what the schedulers put into the environment."""
    finding = process.check_grace(made_up(tmp_path, {}, environment))
    assert said in finding.found
    assert (finding.status, bool(finding.advice)) == ((NOTE, True) if environment else (OK, False))


@pytest.mark.parametrize(
    ("capabilities", "status"), [("000001ffffffffff", OK), ("0000000001000000", OK), ("0000000000000001", NOTE)]
)
def test_the_oom_killer(tmp_path: Path, capabilities: str, status: str) -> None:
    """Who may lower a score."""
    files = {"proc/self/oom_score_adj": "300\n", "proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\n"}
    finding = process.check_oom(made_up(tmp_path, files))
    assert finding.status == status
    assert "oom_score_adj 300" in finding.found
    assert process.check_oom(made_up(tmp_path / "nothing", {})).status == NOTE


@pytest.mark.parametrize(
    ("groups", "status"),
    [({"pod/job": "0"}, NOTE), ({"pod/job": "1"}, WARNING), ({"pod/job": "0", "pod": "1"}, WARNING), ({}, NOTE)],
)
def test_a_group_that_is_killed_as_one(tmp_path: Path, groups: Mapping[str, str], status: str) -> None:
    """As Kubernetes sets it up: the writer process dies with the trainer."""
    files = {
        "proc/self/oom_score_adj": "0\n",
        "proc/self/status": "CapEff:\t0000000000000000\n",
        "proc/self/cgroup": "1:name=systemd:/other\n0::/pod/job\n",
        "sys/fs/cgroup/other/memory.oom.group": "1\n",
        **{f"sys/fs/cgroup/{path}/memory.oom.group": f"{value}\n" for path, value in groups.items()},
    }
    finding = process.check_oom(made_up(tmp_path, files))
    assert finding.status == status
    assert ("memory.oom.group" in finding.found) == (status == WARNING)


@pytest.mark.parametrize(("gib", "status"), [(1, WARNING), (10, OK)])
def test_memory(tmp_path: Path, gib: int, status: str) -> None:
    """The limit that a saver would take."""
    finding = machine.check_memory(made_up(tmp_path, {"proc/meminfo": f"MemAvailable: {gib << 20} kB\n"}))
    assert finding.status == status
    assert f"memory_limit={int(0.6 * (gib << 30)):_}" in finding.choice


def test_too_little_memory_to_measure(tmp_path: Path) -> None:
    """Figures are not worth an out-of-memory kill."""
    place = made_up(tmp_path, {"proc/meminfo": "MemAvailable: 65536 kB\n"})
    assert speed.check_memory_speed(place).status == NOTE
    assert speed.check_writing_speed(place).found == "not measured: there is too little room"


def test_on_this_machine(tmp_path: Path) -> None:
    """Real calls of the real kernel."""
    place = place_in(tmp_path)
    assert machine.check_memfd(place).found == "there, with seals"
    assert machine.check_kernel(place).found.startswith("Linux ")
    assert " for this process" in machine.check_cores(place).found
    assert machine.check_packages(place).found.startswith("torch ")
    assert "copies" in speed.check_memory_speed(place).found
    assert process.check_oom(place).found.startswith("oom_score_adj ")


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python than the training's, it seems."""

    def find_nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", find_nothing)
    finding = machine.check_packages(place_in(tmp_path))
    assert (finding.status, finding.choice) == (WARNING, "can't save or load")


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        (resource.RLIMIT_FSIZE, 1 << 20, "files of 1.05 MB"),
        (resource.RLIMIT_NOFILE, 100, "100 open"),
        (resource.RLIMIT_MEMLOCK, 1 << 16, "65.5 kB locked"),
    ],
)
def test_limits(limit: int, value: int, said: str) -> None:
    """Set for real, in another process."""
    code = (
        "import resource, sys; limit, value = map(int, sys.argv[1:]); resource.setrlimit(limit, (value, value));"
        "from asyncckpt.doctor import finding, machine; found = machine.check_limits(finding.Place('.'));"
        "print(found.status, found.found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(limit), str(value)], capture_output=True, text=True, timeout=60, check=True
    )
    status, found = done.stdout.split(" ", 1)
    assert said in found
    assert status == (OK if limit == resource.RLIMIT_MEMLOCK else WARNING)


def test_a_writer_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a file that is called like a module of ours."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = process.check_writer(place_in(tmp_path))
    assert finding.found.startswith("ready in ")
    assert "of memory" in finding.found


@pytest.mark.parametrize(
    ("executable", "said"),
    [("", "does not know its Python"), ("/no/such/python", "No such file"), ("/bin/false", "exit code 1")],
)
def test_no_writer_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str, said: str) -> None:
    """Threads write then."""
    monkeypatch.setattr(sys, "executable", executable)
    finding = process.check_writer(place_in(tmp_path))
    assert (finding.status, finding.choice) == (NOTE, "threads write")
    assert said in finding.found


def test_a_frozen_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executable is itself, and must not be started again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    assert process.check_writer(place_in(tmp_path)).found.startswith("a frozen program")


def test_a_python_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for for ever."""
    monkeypatch.setattr(child, "TIMEOUT_SECS", 0.1)
    with pytest.raises(OSError, match=r"did not answer within 0\.1 s"):
        child.run_python("sys.stdin.close(); import time; time.sleep(60)")
