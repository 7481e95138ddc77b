#!/usr/bin/env python3
# ruff: noqa: C408, E731, N818, SIM105
"""A throw-away SLURM cluster of a few pretended nodes on one machine, for tests.

    slurm-cluster start  DIR [--nodes 2] [--cpus 2] [--gpus 0] [--isolation auto|net|host|none] [--private /path]
    slurm-cluster status DIR
    slurm-cluster exec   DIR -- sbatch job.sh        (any command, with SLURM_CONF set)
    slurm-cluster env    DIR                          (prints `export SLURM_CONF=...`; not with isolation net)
    slurm-cluster crash  DIR node2 [--unnoticed]      (as if the node lost its power)
    slurm-cluster revive DIR node2
    slurm-cluster stop   DIR [--wipe]

Everything that is written lies in DIR: configuration, munge key, logs, state, spool, pid records.  /etc, systemd and
the host's own network are left as they are.  Daemons are ended only by the pid recorded for them, and only where the
process that has that pid now was started at the recorded time.

Isolation of the nodes:
  none  plain `slurmd -N nodeK` processes with ports of their own; works without root, but nodes share one host name and
        node names do not resolve, for which reason `exec` and `env` set MASTER_ADDR=127.0.0.1.
  host  (root) each node has its own host name, /etc/hosts and process table (UTS, mount and pid namespaces); node names
        resolve (to 127.0.0.1), so that MASTER_ADDR is found as on a real cluster.
  net   (root) `host`, and each node has its own network (veth to a switch), 10.77.0.K on interface eth0, and its own
        /dev/shm: nothing but the file system and TCP connects two nodes, and the host's network is not touched.
  auto  the strongest of the three that this machine allows.
--private PATH (root, repeatable) gives every node an empty folder of its own at PATH, as /tmp or a local scratch disk
is on a real cluster.  --gpus N lets every node claim N GPUs that do not exist, so that scripts with --gres run.
"""

import argparse
import getpass
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

PACKAGES = "slurmctld slurmd slurm-client munge"
TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scontrol", "scancel", "squeue")
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
EXIT_MISSING = 3  # the machine lacks SLURM: a test suite can skip on this


class Failure(Exception):
    pass


def tool(name):
    found = shutil.which(name, path=PATH)
    if not found:
        raise Failure(f"{name} is not installed")
    return found


def say(text):
    print(f"slurm-cluster: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- processes by record
def start_time(pid):
    """Start time of a process in clock ticks since boot, or None where there is no such (living) process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


class Records:
    """One file for each daemon: its pid, and when the process was started."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        return os.path.join(self.folder, f"{name}.json")

    def write(self, name, pid):
        record = {"pid": pid, "started": start_time(pid)}
        with open(self.path(name) + ".new", "w") as out:
            json.dump(record, out)
        os.replace(self.path(name) + ".new", self.path(name))

    def pid(self, name):
        """The recorded pid if that very process is still alive."""
        try:
            with open(self.path(name)) as record:
                record = json.load(record)
        except (OSError, ValueError):
            return None
        alive = record["started"] is not None and start_time(record["pid"]) == record["started"]
        return record["pid"] if alive else None

    def names(self):
        if not os.path.isdir(self.folder):
            return []
        return sorted(name[:-5] for name in os.listdir(self.folder) if name.endswith(".json"))

    def forget(self, name):
        try:
            os.unlink(self.path(name))
        except FileNotFoundError:
            pass

    def end(self, name, first=signal.SIGTERM, patience=10.0):
        pid = self.pid(name)
        for number, wait in ((first, patience), (signal.SIGKILL, 10.0)):
            if pid is None:
                break
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            until = time.monotonic() + wait
            while (pid := self.pid(name)) is not None and time.monotonic() < until:
                time.sleep(0.05)
        if pid is not None and self.pid(name) is not None:
            raise Failure(f"{name} (pid {pid}) does not end")
        self.forget(name)


# ---------------------------------------------------------------------------------------------------- the cluster
class Cluster:
    def __init__(self, folder):
        self.dir = os.path.abspath(folder)
        if len(self.dir) > 70:
            raise Failure(f"{self.dir}: the path is too long for a unix socket")
        if re.search(r"[\s=,#]", self.dir):
            raise Failure(f"{self.dir}: no spaces, commas, '=' or '#' in the path, please")
        self.conf = self.at("etc/slurm.conf")
        self.records = Records(self.at("run/pids"))
        self.settings = {}
        if os.path.exists(self.at("settings.json")):
            with open(self.at("settings.json")) as text:
                self.settings = json.load(text)

    def at(self, *parts):
        return os.path.join(self.dir, *parts)

    def log_tail(self, name, lines=12):
        try:
            with open(self.at("log", f"{name}.log"), errors="replace") as text:
                return "".join(text.readlines()[-lines:])
        except OSError:
            return "(no log)"

    # ------------------------------------------------------------------------------------------------- settings
    @staticmethod
    def possible_isolation():
        if os.geteuid() != 0 or not shutil.which("unshare", path=PATH) or not shutil.which("nsenter", path=PATH):
            return "none"

        def works(command):
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

        if not works([tool("unshare"), "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]):
            return "none"
        probe = "ip link add lpa type veth peer name lpb && ip link add lpc type bridge && ip link set lpb master lpc"
        if shutil.which("ip", path=PATH) and works([tool("unshare"), "--net", "sh", "-c", probe]):
            return "net"
        return "host"

    def choose(self, args):
        isolation = args.isolation
        possible = self.possible_isolation()
        order = ("none", "host", "net")
        if isolation == "auto":
            isolation = possible
        elif order.index(isolation) > order.index(possible):
            raise Failure(f"isolation {isolation} is not possible here (at most: {possible})")
        names = [f"node{k}" for k in range(1, args.nodes + 1)]
        if isolation == "net":
            control, host = "10.77.0.254", "control"
            nodes = {name: [f"10.77.0.{k}", 6818] for k, name in enumerate(names, 1)}
            port = 6817
        else:
            control, host = "127.0.0.1", socket.gethostname().split(".")[0]
            ports = self.free_ports(args.nodes + 1)
            port = ports.pop()
            nodes = {name: [control, ports.pop()] for name in names}
        private = [os.path.abspath(path) for path in args.private]
        if private and isolation == "none":
            raise Failure("--private needs isolation host or net")
        for path in private:
            if self.dir.startswith(path.rstrip("/") + "/"):
                raise Failure(f"--private {path} would hide the cluster's own folder")
        self.settings = dict(
            isolation=isolation,
            nodes=nodes,
            cpus=args.cpus,
            gpus=args.gpus,
            private=private,
            control=control,
            host=host,
            port=port,
        )
        with open(self.at("settings.json"), "w") as out:
            json.dump(self.settings, out, indent=1)

    @staticmethod
    def free_ports(count):
        held = []
        for _ in range(count):
            s = socket.socket()
            s.bind(("127.0.0.1", 0))
            held.append(s)
        ports = [s.getsockname()[1] for s in held]
        for s in held:
            s.close()
        return ports

    @staticmethod
    def resolves_to_loopback(host):
        try:
            return socket.gethostbyname(host) == "127.0.0.1"
        except OSError:
            return False

    def write_conf(self):
        s, user = self.settings, getpass.getuser()
        hostname = (lambda name: name) if s["isolation"] != "none" else (lambda name: s["host"])
        # Where the host's name is not the loopback, srun must listen everywhere for its tasks to find it.
        inner = s["isolation"] != "none" or self.resolves_to_loopback(s["host"])
        memory = max(256, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2)
        lines = [
            "ClusterName=pretend",
            f"SlurmctldHost={s['host']}({s['control']})",
            f"SlurmctldPort={s['port']}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            # cred_expire also is the time a requeued job must wait before it may start again (120 s by default)
            f"AuthInfo=socket={self.at('run/munge.socket')},cred_expire=5",
            # listen on the loopback (or the pretended network) only
            "CommunicationParameters=NoCtldInAddrAny" + (",NoInAddrAny" if inner else ""),
            f"StateSaveLocation={self.at('state')}",
            f"SlurmdSpoolDir={self.at('spool/%n')}",
            f"SlurmctldPidFile={self.at('run/slurmctld.pid')}",
            f"SlurmdPidFile={self.at('run/slurmd-%n.pid')}",
            f"SlurmctldLogFile={self.at('log/slurmctld.log')}",
            f"SlurmdLogFile={self.at('log/slurmd-%n.log')}",
            "SlurmctldDebug=verbose",
            "SlurmdDebug=verbose",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/filetxt",
            f"JobCompLoc={self.at('log/jobs.txt')}",
            # jobs start at once, and neither time limits nor lost nodes take minutes to be seen
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "ReturnToService=2",
            "SlurmdTimeout=20",
            "SlurmctldTimeout=20",
            "InactiveLimit=0",
            "KillWait=5",
            "MinJobAge=300",
            "JobRequeue=1",
            # the nodes may claim more processors than the machine has
            "SlurmdParameters=config_overrides",
        ]
        gres = f"Gres=gpu:{s['gpus']} " if s["gpus"] else ""
        if gres:
            lines.append("GresTypes=gpu")
            for k in range(s["gpus"]):  # slurmd wants a file for each GPU, and any will do
                open(self.at("etc", f"gpu{k}"), "a").close()
            with open(self.at("etc/gres.conf"), "w") as out:
                out.write(f"AutoDetect=off\nName=gpu File={self.at('etc')}/gpu[0-{s['gpus'] - 1}]\n")
        for name, (address, port) in s["nodes"].items():
            lines.append(
                f"NodeName={name} NodeHostname={hostname(name)} NodeAddr={address} Port={port} "
                f"CPUs={s['cpus']} RealMemory={memory} {gres}State=UNKNOWN"
            )
        lines.append("PartitionName=test Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 State=UP OverSubscribe=NO")
        with open(self.conf, "w") as out:
            out.write("\n".join(lines) + "\n")

    # ---------------------------------------------------------------------------------------------------- spawning
    def environment(self):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        clean.update(SLURM_CONF=self.conf, PATH=PATH)
        if self.settings["isolation"] == "none":
            clean.setdefault("MASTER_ADDR", self.settings["control"])
        return clean

    def spawn(self, name, command, inner=None):
        """Starts a daemon in the foreground of a session of its own and records it.

        inner: where the command is `unshare --fork`, the child that it makes is what we want to know and to end.
        """
        with open(self.at("log", f"{name}.out"), "ab") as out:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self.dir,
                env=self.environment(),
                umask=0o022,
            )
        self.records.write(name, child.pid)
        if inner:
            until = time.monotonic() + 10
            while time.monotonic() < until and child.poll() is None:
                with open(f"/proc/{child.pid}/task/{child.pid}/children") as text:
                    pids = text.read().split()
                if pids:
                    self.records.write(inner, int(pids[0]))
                    return child
                time.sleep(0.02)
            raise Failure(f"{name} did not start:\n" + self.out_tail(name))
        return child

    def out_tail(self, name):
        try:
            with open(self.at("log", f"{name}.out"), errors="replace") as text:
                return text.read()[-2000:]
        except OSError:
            return ""

    def wait_for(self, what, ready, child=None, seconds=20.0, name=None):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if ready():
                return
            if child is not None and child.poll() is not None:
                break
            time.sleep(0.05)
        tail = (self.out_tail(name) + self.log_tail(name)) if name else ""
        raise Failure(f"{what}: not ready after {seconds:.0f} s, or ended\n{tail}")

    # ------------------------------------------------------------------------------------- the pretended network
    def in_switch(self, command):
        """The same command, run where the cluster's daemons and clients live."""
        pid = self.records.pid("switch")
        if self.settings["isolation"] != "net":
            return list(command)
        if pid is None:
            raise Failure("the switch of the pretended network is not up")
        return [tool("nsenter"), f"--target={pid}", "--net", "--uts", "--mount", f"--wd={os.getcwd()}", *command]

    def start_switch(self):
        """A namespace with a bridge, in which slurmctld and the clients run; the host's network is untouched."""
        if self.settings["isolation"] != "net" or self.records.pid("switch"):
            return
        self.write_hosts()
        script = (
            "set -e; hostname control; ip link set lo up; ip link add sw0 type bridge; "
            f"ip addr add {self.settings['control']}/24 dev sw0; ip link set sw0 up; "
            f"mount --bind {self.at('etc/hosts')} /etc/hosts; touch {self.at('run/switch.up')}; exec sleep infinity"
        )
        if os.path.exists(self.at("run/switch.up")):
            os.unlink(self.at("run/switch.up"))
        command = [tool("unshare"), "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", script]
        child = self.spawn("switch", command)
        self.wait_for("switch", lambda: os.path.exists(self.at("run/switch.up")), child, name="switch")

    def write_hosts(self):
        lines = ["127.0.0.1 localhost"]
        if self.settings["isolation"] == "net":
            lines.append(f"{self.settings['control']} {self.settings['host']}")
        else:
            lines.append(f"127.0.0.1 {self.settings['host']}")
        lines += [f"{address} {name}" for name, (address, _) in self.settings["nodes"].items()]
        with open(self.at("etc/hosts"), "w") as out:
            out.write("\n".join(lines) + "\n")

    def start_node(self, name):
        pid_of = self.records.pid
        slurmd = [tool("slurmd"), "-D", "-N", name, "-f", self.conf]
        isolation = self.settings["isolation"]
        if isolation == "none":
            if not pid_of(f"slurmd-{name}"):
                self.spawn(f"slurmd-{name}", slurmd)
            return
        if pid_of(f"node-{name}") and pid_of(f"slurmd-{name}"):
            return
        self.end_node(name)
        self.write_hosts()
        flags = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        script = f"set -e; hostname {name}; mount --bind {self.at('etc/hosts')} /etc/hosts; "
        for path in self.settings["private"]:
            script += f"mkdir -p {shlex.quote(path)}; mount -t tmpfs tmpfs {shlex.quote(path)}; "
        if isolation == "net":
            flags.append("--net")
            # slurmd waits until its end of the cable is plugged in
            script += "ip link set lo up; "
            script += "mount -t tmpfs -o size=1g tmpfs /dev/shm; "
            script += "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; "
            script += f"ip addr add {self.settings['nodes'][name][0]}/24 dev eth0; ip link set eth0 up; "
        # the shell stays as process 1 of the node and reaps orphans; slurmd is not process 1
        quoted = " ".join(slurmd)
        script += f"{quoted} & d=$!; trap 'kill -TERM $d' TERM; while kill -0 $d 2>/dev/null; do wait $d || true; done"
        self.spawn(f"node-{name}", [tool("unshare"), *flags, "bash", "-c", script], inner=f"slurmd-{name}")
        if isolation == "net":
            self.plug_in(name)

    def plug_in(self, name):
        node, switch = self.records.pid(f"slurmd-{name}"), self.records.pid("switch")
        if not node or not switch:
            raise Failure(f"{name} did not start:\n" + self.out_tail(f"node-{name}"))
        enter, k = [tool("nsenter"), f"--target={switch}", "--net"], list(self.settings["nodes"]).index(name) + 1
        ip = tool("ip")
        subprocess.run([*enter, ip, "link", "del", f"port{k}"], stderr=subprocess.DEVNULL)  # of a crashed predecessor
        for words in (
            f"link add port{k} type veth peer name eth0 netns {node}",
            f"link set port{k} master sw0",
            f"link set port{k} up",
        ):
            done = subprocess.run([*enter, ip, *words.split()], capture_output=True, text=True)
            if done.returncode:
                raise Failure(f"ip {words}: {done.stderr.strip()}")

    def end_node(self, name, first=signal.SIGTERM):
        self.records.end(f"slurmd-{name}", first=first, patience=8)
        self.records.end(f"node-{name}", first=signal.SIGKILL)

    # --------------------------------------------------------------------------------------------------- commands
    def run(self, *command, timeout=20):
        command = self.in_switch([tool(command[0]), *command[1:]])
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=timeout)

    def node_states(self):
        try:
            done = self.run("sinfo", "-h", "-N", "-o", "%N %T")
        except subprocess.TimeoutExpired:
            return {}
        return dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)

    def start(self, args):
        missing = [name for name in TOOLS if not shutil.which(name, path=PATH)]
        if missing:
            say(f"not installed: {' '.join(missing)} (Debian: apt-get install -y --no-install-recommends {PACKAGES})")
            return EXIT_MISSING
        began = time.monotonic()
        for folder in ("etc", "run/pids", "log", "state", "spool"):
            os.makedirs(self.at(folder), exist_ok=True)
        # munged wants its socket's folder to be searchable by all, and its key's folder by nobody else
        for folder in ("", "run", "etc", "log"):
            os.chmod(self.at(folder), 0o755)
        os.makedirs(self.at("munge"), mode=0o700, exist_ok=True)
        if not self.settings:
            self.choose(args)
        self.write_conf()
        for name in self.settings["nodes"]:
            os.makedirs(self.at("spool", name), exist_ok=True)
        key = self.at("munge/munge.key")
        if not os.path.exists(key):
            with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as out:
                out.write(os.urandom(128))
        self.start_switch()
        if not self.records.pid("munged"):
            sock = self.at("run/munge.socket")
            for left in (sock, sock + ".lock"):
                if os.path.lexists(left):
                    os.unlink(left)
            # --force: the folders above ours may belong to somebody else, which munged finds insecure
            command = [
                tool("munged"),
                "--foreground",
                "--force",
                "--num-threads=2",
                f"--socket={sock}",
                f"--key-file={key}",
                f"--seed-file={self.at('munge/munged.seed')}",
                f"--pid-file={self.at('run/munged.pid')}",
                f"--log-file={self.at('log/munged.log')}",
            ]
            child = self.spawn("munged", command)
            self.wait_for("munged", lambda: os.path.exists(sock), child, name="munged")
        if not self.records.pid("slurmctld"):
            child = self.spawn("slurmctld", self.in_switch([tool("slurmctld"), "-D", "-f", self.conf]))
            answers = lambda: self.run("scontrol", "ping").returncode == 0
            self.wait_for("slurmctld", answers, child, name="slurmctld")
        for name in self.settings["nodes"]:
            self.start_node(name)
        self.wait_until_idle()
        s = self.settings
        say(f"{len(s['nodes'])} nodes idle after {time.monotonic() - began:.1f} s (isolation: {s['isolation']})")
        return 0

    def wait_until_idle(self, seconds=40):
        until, states = time.monotonic() + seconds, {}
        while time.monotonic() < until:
            states = self.node_states()
            usable = [
                s
                for s in states.values()
                if s.rstrip("*") in ("idle", "allocated", "mixed", "completing") and not s.endswith("*")
            ]
            if len(usable) == len(self.settings["nodes"]):
                return
            for name, state in states.items():
                if state.startswith(("down", "drain")):
                    self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
            time.sleep(0.1)
        first = next(iter(self.settings["nodes"]))
        raise Failure(
            f"nodes are not idle: {states}\n"
            + self.out_tail(f"node-{first}")
            + self.log_tail("slurmctld")
            + self.log_tail(f"slurmd-{first}")
        )

    def stop(self, args):
        if not self.settings:
            say("nothing was started in this folder")
        else:
            if self.records.pid("slurmctld") and self.records.pid("munged"):
                try:  # jobs first: the processes of a job outlive slurmd
                    self.run("scancel", "--state=PENDING", f"--user={getpass.getuser()}")
                    self.run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
                    self.run("scancel", f"--user={getpass.getuser()}")
                    until = time.monotonic() + 15
                    while self.run("squeue", "-h", "-o", "%i").stdout.strip() and time.monotonic() < until:
                        time.sleep(0.2)
                except (subprocess.TimeoutExpired, Failure) as problem:
                    say(f"jobs could not be cancelled: {problem}")
            for name in self.settings["nodes"]:
                self.end_node(name)
            for name in ("slurmctld", "munged", "switch"):
                self.records.end(name)
            say("stopped")
        if args.wipe:
            known = {"etc", "run", "log", "state", "spool", "munge", "settings.json"}
            for name in known & set(os.listdir(self.dir) if os.path.isdir(self.dir) else ()):
                path = self.at(name)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            try:
                os.rmdir(self.dir)
            except OSError:
                pass  # it holds things that are not ours, or is not there
        return 0

    def status(self, _):
        wanted = ["munged", "slurmctld", *(f"slurmd-{name}" for name in self.settings.get("nodes", ()))]
        alive = {name: self.records.pid(name) for name in wanted}
        for name, pid in alive.items():
            print(f"{name:20} {'pid ' + str(pid) if pid else 'not running'}")
        if not all(alive.values()):
            return 1
        states = self.node_states()
        print("\n".join(f"{name:20} {state}" for name, state in states.items()))
        print(f"isolation            {self.settings['isolation']}\nSLURM_CONF           {self.conf}")
        return 0 if len(states) == len(self.settings["nodes"]) else 1

    def need(self):
        if not self.settings or not self.records.pid("slurmctld"):
            raise Failure(f"no cluster runs in {self.dir}")

    def exec(self, args):
        self.need()
        command = args.command[1:] if args.command[:1] == ["--"] else args.command
        if not command:
            raise Failure("exec: which command?")
        command = self.in_switch(command)
        os.execvpe(command[0], command, self.environment())

    def env(self, _):
        self.need()
        if self.settings["isolation"] == "net":
            say("with isolation net the cluster is reached by `exec` only")
            return 1
        for name, value in self.environment().items():
            if name in ("SLURM_CONF", "MASTER_ADDR"):
                print(f"export {name}={shlex.quote(value)}")
        return 0

    def crash(self, args):
        self.need()
        if args.node not in self.settings["nodes"]:
            raise Failure(f"no node {args.node}")
        self.end_node(args.node, first=signal.SIGKILL)
        if not args.unnoticed:  # slurmctld would find out by itself after SlurmdTimeout (20 s)
            self.run("scontrol", "update", f"NodeName={args.node}", "State=DOWN", "Reason=crashed")
        return 0

    def revive(self, args):
        self.need()
        self.start_node(args.node)
        self.wait_until_idle()
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("start", "stop", "status", "exec", "env", "crash", "revive"):
        sub = commands.add_parser(what)
        sub.add_argument("dir")
        if what == "start":
            sub.add_argument("--nodes", type=int, default=2)
            sub.add_argument("--cpus", type=int, default=2, help="processors that each node claims")
            sub.add_argument("--gpus", type=int, default=0, help="GPUs that each node claims")
            sub.add_argument("--private", action="append", default=[], help="a folder of which each node has its own")
            sub.add_argument("--isolation", choices=("auto", "net", "host", "none"), default="auto")
        if what == "stop":
            sub.add_argument("--wipe", action="store_true", help="and remove everything written")
        if what in ("crash", "revive"):
            sub.add_argument("node")
        if what == "crash":
            sub.add_argument("--unnoticed", action="store_true", help="let slurmctld find out by itself")
        if what == "exec":
            sub.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    try:
        return getattr(Cluster(args.dir), args.what)(args)
    except Failure as problem:
        say(str(problem))
        return 1


if __name__ == "__main__":
    sys.exit(main())
