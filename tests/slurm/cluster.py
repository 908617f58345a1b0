"""A throw-away real SLURM on this host: two nodes, two partitions of which `high` preempts `low`, in a directory of its own.

Wants the Debian packages slurmctld, slurmd, slurm-client and munge; for accounting also slurmdbd and mariadb-server.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
NEEDED_FOR_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
SBIN = "/usr/sbin"

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/{storage}
{accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2{scheduler}
MaxArraySize=8
FirstJobId={ctld_port}
KillWait=3
OverTimeLimit=0
InactiveLimit=0
MinJobAge=300
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_parameters}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} OverSubscribe=NO State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF OverSubscribe=NO State=UP
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
"""


def missing(*, accounting: bool) -> list[str]:
    """The programs that are not installed."""
    wanted = [*NEEDED, *(NEEDED_FOR_ACCOUNTING if accounting else ())]
    return [name for name in wanted if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


class Cluster:
    """Start with `up`, end with `down`; `environment` is what its clients need."""

    def __init__(self, root: Path, *, accounting: bool = False, preempt_signal: bool = False, grace_s: int = 0) -> None:
        self.root, self.accounting = root, accounting
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}
        self.values = {
            "root": root,
            "user": getpass.getuser(),
            "host": socket.gethostname().split(".")[0],
            "storage": "slurmdbd" if accounting else "none",
            "scheduler": "",
            "preempt_parameters": "SlurmctldParameters=preempt_send_user_signal" if preempt_signal else "",
            "grace_s": grace_s,
            # The first job has the number of a port, another one than in a cluster beside this one: the ranks of a job meet at
            # a port that follows from its number.
            **{f"{name}_port": free_port() for name in ("ctld", "n1", "n2", "dbd", "sql")},
        }
        dbd = "AccountingStorageHost=localhost\nAccountingStoragePort={dbd_port}"
        dbd += "\nAccountingStoragePass={root}/munge/socket"
        self.values["accounting"] = dbd.format(**self.values) if accounting else ""

    def up(self) -> None:
        for name in ("state", "munge", "spool-n1", "spool-n2"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "slurm.conf").write_text(SLURM_CONF.format(**self.values))
        self.start_munge()
        if self.accounting:
            self.start_accounting()
        self.start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle", "idle"], "idle nodes")

    def start_munge(self) -> None:
        munge = self.root / "munge"
        munge.chmod(0o755)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        flags = [f"--{name}={munge / file}" for name, file in (("socket", "socket"), ("key-file", "key"))]
        flags += [f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"]
        self.start("munged", "munged", "--foreground", "--force", *flags)
        wait_for((munge / "socket").exists, "munge")

    def start_accounting(self) -> None:
        data, socket_file = self.root / "sql", self.root / "sql.socket"
        user = [f"--user={getpass.getuser()}"]
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal", *user],
            env=self.environment, check=True, capture_output=True,
        )  # fmt: skip
        port = f"--port={self.values['sql_port']}"
        server = ["--no-defaults", f"--datadir={data}", f"--socket={socket_file}", port, "--bind-address=127.0.0.1"]
        self.start("mariadbd", "mariadbd", *server, f"--pid-file={self.root / 'sql.pid'}", *user)
        wait_for(socket_file.exists, "MariaDB")
        grant = "create user slurm@'%' identified by 'slurm'; create user slurm@localhost identified by 'slurm'; "
        grant += "grant all on slurm_acct.* to slurm@'%'; grant all on slurm_acct.* to slurm@localhost;"
        wait_for(lambda: self.succeeds("mariadb", "--no-defaults", f"--socket={socket_file}", "-uroot", "-e", grant), "SQL")
        (self.root / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**self.values))
        (self.root / "slurmdbd.conf").chmod(0o600)
        self.start("slurmdbd", "slurmdbd", "-D")
        wait_for(lambda: self.succeeds("sacctmgr", "-i", "show", "cluster"), "slurmdbd")
        self.succeeds("sacctmgr", "-i", "add", "cluster", "test")

    def start_node(self, node: str) -> None:
        self.start(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def kill_node(self, node: str) -> None:
        """The node goes down at once, and its jobs are put back into the queue."""
        daemon = self.daemons.pop(f"slurmd-{node}")
        daemon.kill()
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def revive_node(self, node: str) -> None:
        self.start_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def down(self) -> None:
        self.succeeds("scancel", "-u", getpass.getuser(), "--signal=KILL", "--full")
        self.succeeds("scancel", "-u", getpass.getuser())
        if "slurmctld" in self.daemons:
            wait_for(lambda: not self.jobs(), "the end of all jobs", quietly=True)
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def succeeds(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def jobs(self) -> dict[str, str]:
        """State of every job in the queue, by id such as 14 or 14_0."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def start_now(self) -> None:
        """SLURM makes a requeued job wait for two minutes; tests do not."""
        for job, state in self.jobs().items():
            if state == "PENDING":
                self.succeeds("scontrol", "update", f"JobId={job}", "StartTime=now")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    condition: Callable[[], object],
    what: str,
    timeout_s: float = 180.0,
    *,
    quietly: bool = False,
    tell: Callable[[], str] = str,
) -> None:
    """tell says, when time is up, how things stand."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            if quietly:
                return
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s\n{tell()}")
        time.sleep(0.1)
