"""A Slurm cluster of two nodes on this machine: controller, two node daemons and munge, all on loopback.

It writes only to a temporary folder and, for the names of the nodes, to /etc/hosts; the end of the context removes
both. It needs root and Debian's `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.progress import Stalled, marked, run_watched, runs, wait_until
from univitar_ds.training.distributed.ports import free_ports

NODES = ("univitar-a", "univitar-b")
HOSTS = Path("/etc/hosts")
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)} # a test's Slurm\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")
DAEMONS = ("slurmd-univitar-a", "slurmd-univitar-b", "slurmctld", "munged")
ENDS_S = 30

# cred_expire is also the wait of a requeued job before it starts again; the default is 120 s.
# WaitTime is the default time that a task may continue after another task of its step has ended.
# Nodes have more processors than the machine, for jobs of 8 tasks a node.
# GraceTime is the time between SIGTERM and SIGKILL of a preempted job, KillWait that of a cancelled or requeued one.
CONF = """\
ClusterName=univitar
SlurmctldHost={host}(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=200000,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=120
WaitTime=2
MinJobAge=3600
SlurmdTimeout=60
MessageTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={first} NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=train Nodes={first},{second} Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=urgent Nodes={first},{second} State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why a cluster cannot be started here; None if it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else None


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `environment` is for Slurm's commands."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of Slurm in the root of the checkout; returns its standard output."""
        done = run_watched(command, env=self.environment, cwd=ROOT)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, script: Path, *options: str, arguments: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a job with `variables` in its environment; returns its number."""
        export = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
        return self.run("sbatch", "--parsable", f"--export={export}", *options, str(script), *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        """Slurm's fields of a job: JobState, Restarts, ExitCode and so on."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait(self, number: str, condition: Callable[[dict[str, str]], bool], *written: Path) -> dict[str, str]:
        """Wait until the job meets the condition; returns it. Its state and the sizes of `written` are the heartbeat.

        Raises: Stalled
        """
        job: dict[str, str] = {}

        def met() -> bool:
            nonlocal job
            job = self.job(number)
            return condition(job)

        def heartbeat() -> tuple:
            sizes = [path.stat().st_size for path in written if path.exists()]
            return job.get("JobState"), job.get("Restarts"), *sizes

        wait_until(met, f"job {number}", of=lambda: marked(f"SLURM_JOB_ID={number}"), heartbeat=heartbeat)
        return job


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster of the two NODES with the partitions `train`, whose jobs can be preempted, and `urgent`."""
    folder = Path(tempfile.mkdtemp(prefix="univitar-slurm-"))
    hosts = HOSTS.read_text()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    here = Cluster(folder, {**environment, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        with HOSTS.open("a") as file:
            file.write(("" if hosts.endswith("\n") else "\n") + HOSTS_LINE)
        _configure(folder)
        _start(here)
        yield here
    finally:
        _stop(here)
        HOSTS.write_text(HOSTS.read_text().replace(HOSTS_LINE, ""))
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    for name in ("state", "log", "run", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge").mkdir(mode=0o755)
    (folder / "private").mkdir(mode=0o700)
    key = folder / "private" / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    port, first_port, second_port = free_ports(3)
    content = CONF.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        port=port,
        first=NODES[0],
        second=NODES[1],
        first_port=first_port,
        second_port=second_port,
    )
    (folder / "slurm.conf").write_text(content)


def _start(here: Cluster) -> None:
    folder = here.folder
    folder.chmod(0o755)  # munge requires folders that all users can read but only the owner can write
    here.run(
        "munged",
        "--force",
        f"--key-file={folder}/private/munge.key",
        f"--socket={folder}/munge/socket",
        f"--pid-file={folder}/run/munged.pid",
        f"--log-file={folder}/private/munged.log",
        f"--seed-file={folder}/private/munged.seed",
    )
    here.run("slurmctld", "-c")
    for node in NODES:
        here.run("slurmd", "-N", node)
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--immediate=5", "--quiet", "true"]

    def ready() -> bool:  # run a step, because sinfo reports "idle" before the first ping
        with suppress(Stalled):
            return run_watched(step, env=here.environment, limits={"idle_s": 20}).returncode == 0
        return False

    try:
        wait_until(ready, "a step on both nodes", heartbeat=lambda: _logs(folder))
    except Stalled as stalled:
        raise AssertionError(f"{stalled}\n{_logs(folder)}") from stalled


def _stop(here: Cluster) -> None:
    with suppress(Stalled):
        here.run("scancel", "--user=root", check=False)
        wait_until(lambda: not here.run("squeue", "--noheader", check=False).strip(), "an empty queue", whole_s=ENDS_S)
    for daemon in DAEMONS:
        _end(here.folder / "run" / f"{daemon}.pid")


def _end(pid_file: Path) -> None:
    """Stop the daemon and wait until it has ended."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        with suppress(Stalled):
            return wait_until(lambda: not runs(pid), "the end of a daemon", of={"it": pid}, idle_s=ENDS_S)
        os.kill(pid, signal.SIGKILL)


def _logs(folder: Path) -> str:
    tails = [f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted((folder / "log").iterdir())]
    return "\n".join(tails)
