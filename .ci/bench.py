#!/usr/bin/env python3
"""Measures plexctl beside other TCP forwarders on loopback, and its start-up beside what it stands in for.

    .ci/bench.py --lg lg --go gofwd                      everything, five rounds
    .ci/bench.py --only plexctl,haproxy --tests conn1,conn8,memory
    .ci/bench.py --plexctl before=old/plexctl.py --plexctl after=plexctl.py
    .ci/bench.py --soak 60                               mixed load on plexctl, nothing else

Linux, Python 3.8 or later with pytest, since the control plane is that of test_plexctl.py. Markdown goes to
stdout, progress to stderr. The exit status is 1 if plexctl failed in anything, however fast it was.

All forwarders stay up, each with a server of its own. Each test goes round them in turn; printed are medians
and the ratio to haproxy: on a machine with other work only ratios mean something. There are at most ten
connections, since a Node holds ten sessions, and no test depends on a half-close, which a Node does not
carry: bulk clients count what their socket takes or gives, and close.

The load is Python as well, and takes processor time from a fast forwarder: ratios move towards 1, least for
bulk, most for short connections. --lg names a compiled one, for all but bulk: `lg serve PORT`, `lg ping PORT
CLIENTS SECONDS BYTES`, `lg conn PORT CLIENTS SECONDS`; a line of JSON is the result.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import multiprocessing
import operator
import os
import random
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

SELF = os.path.abspath(__file__)
ROOT = os.path.dirname(os.path.dirname(SELF))
CHUNK_BYTES, HELD_BYTES = 2**18, 2**24
SESSIONS, PATIENCE_SECONDS, IDLE_SECONDS = 10, 30, 3
TESTS = {"up1": ("up", 1), "down1": ("down", 1), "up8": ("up", 8), "ping1": ("ping", 1), "ping8": ("ping", 8),
         "conn1": ("conn", 1), "conn8": ("conn", 8), "beside": ("ping", 1), "memory": (), "startup": ()}
ROWS = {                                                # test, key in its result: label
    ("up1", "rate"): "1 stream up, GB/s", ("down1", "rate"): "1 stream down, GB/s",
    ("up8", "rate"): "8 streams up, GB/s", ("up1", "cpu"): "1 stream up, CPU s per GB *",
    ("ping1", "p50"): "1 client's ping-pong, p50 us *", ("ping8", "rate"): "8 clients' ping-pong, per s",
    ("conn1", "rate"): "short connections, one at a time, per s",
    ("conn8", "rate"): "short connections, 8 at once, per s",
    ("beside", "rate"): "ping-pong beside a bulk stream, per s",
    ("beside", "p99"): "ping-pong beside a bulk stream, p99 us *",
    ("memory", "rest"): "memory at rest, RSS in MiB *",
    ("memory", "bulk"): "memory with 10 connections that have carried bulk *",
    ("memory", "idle"): "memory once these 10 are idle again *",
    ("startup", "help"): '`--help`, without: `python3 -I -c "import argparse"`, ms *',
    ("startup", "print"): "print mode over http, without: a urllib.request script, ms *"}


# --- Load: the hidden sub-command _lg -----------------------------------------------------------------------

def dial(port, mode=b"E"):
    """A connection. Its first byte tells the server what to do: E echo, S swallow, G give."""
    sock = socket.create_connection(("127.0.0.1", port), 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(mode)
    if mode == b"E" and sock.recv(1) != mode:
        raise ConnectionError("no echo")
    sock.settimeout(None)
    return sock


def client(kind, port, seconds):
    """One client, in a process of its own: how much it did, the time of each step, the time of all."""
    now, times, total, buffer = time.perf_counter, [], 0, bytearray(CHUNK_BYTES)
    chunk, small, whole = bytes(CHUNK_BYTES), bytes(64), socket.MSG_WAITALL
    sock = dial(port, {"up": b"S", "down": b"G"}.get(kind, b"E")) if kind != "conn" else None
    step = {"up": lambda: sock.send(chunk), "down": lambda: sock.recv_into(buffer),
            "ping": lambda: sock.send(small) and sock.recv_into(buffer, 64, whole) == 64,
            "conn": lambda: dial(port).close() is None}[kind]
    began = last = now()
    while last < began + seconds:
        done = step()
        if not done:
            raise ConnectionError("the connection was ended early")
        times.append(now() - last)
        total, last = total + done, now()
    return total, times, last - began


def load(kind, port, number, seconds):
    """Rate and percentiles of a number of clients at once."""
    with multiprocessing.get_context("fork").Pool(number) as pool:
        totals, times, took = zip(*pool.starmap(client, [(kind, port, seconds)] * number, 1))
    times, unit = sorted(sum(times, [])), 1e9 if kind in ("up", "down") else 1
    return {"err": 0, "n": sum(totals), "rate": sum(map(operator.truediv, totals, took)) / unit,
            "p50": times[len(times) // 2] * 1e6, "p99": times[len(times) * 99 // 100] * 1e6}


def hold(port, number):
    """Connections that all carry bulk both ways at once, and then stay until standard input ends."""
    socks, whole = [dial(port) for _ in range(number)], socket.MSG_WAITALL
    for sock in socks:
        threading.Thread(target=sock.sendall, args=[bytes(HELD_BYTES)], daemon=True).start()
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        counts = list(pool.map(lambda sock: sock.recv_into(bytearray(HELD_BYTES), 0, whole), socks))
    print(json.dumps({"err": sum(count != HELD_BYTES for count in counts)}), flush=True)
    sys.stdin.read()


def serve(port):
    """The server behind a forwarder: enough processes that serve one connection after the other."""
    view = memoryview(bytearray(CHUNK_BYTES))
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        for _ in range(SESSIONS + 1):
            if not os.fork():
                break
        while True:
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                count, mode = sock.recv_into(view, 1), bytes(view[:1])
                while count:
                    if mode != b"S":
                        sock.sendall(view if mode == b"G" else view[:count])
                    count = 1 if mode == b"G" else sock.recv_into(view)


# --- Forwarders ---------------------------------------------------------------------------------------------

FORWARD = ["tcp-forward", "--project-id", "0190a8b8-a0c0-7a0a-8a0a-a0a0a0a0a0c0", "--resource-id",
           "0190a8b8-d3e3-7d3d-8d3d-d3d3d3d3d3d3", "--host", "10.0.0.5", "--port", "5432", "--output", "json"]
# Shell scripts, each in a directory of its own. {l}: local port, {r}: port of the server.
PEERS = {
    "socat": "exec socat TCP-LISTEN:{l},bind=127.0.0.1,fork,backlog=128,nodelay TCP:127.0.0.1:{r},nodelay",
    "haproxy": """cat >conf <<E
global
  nbthread 2
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
listen bench
  bind 127.0.0.1:{l}
  server s 127.0.0.1:{r}
E
exec haproxy -db -q -f conf"""}


def start_plane(endpoint):
    """Start a control plane and return its URL."""
    sys.path.insert(0, ROOT)
    import test_plexctl  # not at the top: a load does without, and starts faster
    return test_plexctl.ControlPlane(endpoint=endpoint, ttl=86400, bearer="bench").url


def output_of(*argv):
    """What a program prints on stdout and stderr."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False).stdout.decode(errors="replace").strip()


def find_forwarders(options):
    """Name -> command; `direct` has none."""
    found = {"direct": []}
    for name, path in options.plexctl.items():
        minimum = "--min-sessions" in output_of(options.python, path, "tcp-forward", "--help")
        found[name] = [options.python, path, *FORWARD, "--proxy", "--local-addr", "127.0.0.1:{l}", "--server",
                       "{server}", "--max-sessions=10", *["--min-sessions=10"] * minimum]
    found.update((name, ["sh", "-c", script]) for name, script in PEERS.items())
    if options.go:
        found["Go"] = ["env", os.path.abspath(options.go), "127.0.0.1:{l}", "127.0.0.1:{r}"]
    wanted = options.plexctl if options.soak else options.only.split(",") if options.only else found
    return {name: command for name, command in found.items() if name in wanted}


def usage(process):
    """Processor seconds, RSS in MiB, threads and descriptors of a process and its descendants."""
    stats, total, todo = {}, collections.Counter(), [str(process.pid)]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            stats[pid] = file.read().rsplit(")", 1)[1].split()
    for pid in todo:                                    # grows while it is read
        fields = stats.get(pid, ["0"] * 50)
        todo += [child for child, of in stats.items() if of[1] == pid]
        total["cpu"] += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        total["rss"] += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        total["threads"] += int(fields[17])
        with contextlib.suppress(OSError):              # gone, or another user's
            total["descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
    return total


# --- Tests --------------------------------------------------------------------------------------------------

POST = """import json, os, sys, urllib.request
_, project, _, resource, _, host, _, port, *_ = sys.argv[2:]
body = {"resource_id": resource, "kind": "tcp", "target": {"tcp": {"host": host, "port": int(port)}},
        "idempotency_key": os.urandom(16).hex()}
headers = {"Authorization": "Bearer " + os.environ["PLEXSPHERE_TOKEN"], "Content-Type": "application/json"}
url = "%s/v1/projects/%s/sessions" % (sys.argv[-1], project)
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=30) as answer:
    print(json.loads(answer.read().decode())["listener_endpoint"])
"""


class Bench:
    """Runs forwarders and loads; keeps results and what there is to say."""

    def __init__(self, options, scratch):
        self.options, self.scratch, self.notes, self.running = options, scratch, [], []
        self.forwarders = {}                            # name -> process, port
        self.results = collections.defaultdict(list)    # (name, test, key) -> numbers
        # Without what changes plexctl or urllib.
        self.env = {name: value for name, value in os.environ.items()
                    if not name.lower().endswith("_proxy") and not name.startswith(("PLEX", "NOTIFY_"))}
        self.env.update(PLEXSPHERE_TOKEN="bench", XDG_CONFIG_HOME=scratch, XDG_STATE_HOME=scratch)

    def spawn(self, argv, **more):
        """Starts a process in a session of its own, to be ended by stop()."""
        process = subprocess.Popen([str(word) for word in argv], start_new_session=True, env=self.env, **more)
        self.running.append(process)
        return process

    def stop(self, process):
        """Ends a process and whatever is left of its group."""
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.running.remove(process)

    def start_forwarder(self, name, command):
        """Starts a server and the forwarder before it; without a command that server is all."""
        # Ports below those that the kernel gives to outgoing connections.
        ports, folder = random.sample(range(15000, 32000), 2), tempfile.mkdtemp(dir=self.scratch)
        values = dict(zip("lr", ports), server=start_plane(f"127.0.0.1:{ports[1]}") if command else "")
        with open(os.path.join(folder, "log"), "w+") as log:
            process, port = self.start_load("serve", ports[1]), ports[1]
            up = self.answers(process, port)
            if command:
                words, port = [word.format(**values) for word in command], ports[0]
                process = self.spawn(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                up = up and self.answers(process, port)
            log.seek(0)
            said = log.read().splitlines()              # plexctl warns where it cannot check owners
        if up:
            self.forwarders[name] = process, port
        self.notes += [line for line in said if "plexctl: warning" in line] if up else [
            f"{name} did not come up: {' | '.join(said[-3:])}"]

    def answers(self, process, port):
        """Whether a byte comes back in time."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                dial(port).close()
                return True
            time.sleep(0.05)
        return False

    def start_load(self, kind, port, *numbers):
        """Starts a load, or the server of all loads."""
        command, pipe = [sys.executable, "-I", "-S", SELF, "_lg"], subprocess.PIPE
        if self.options.lg and kind in ("serve", "ping", "conn"):
            command, numbers = [os.path.abspath(self.options.lg)], numbers + (64,) * (kind == "ping")
        return self.spawn([*command, kind, port, *numbers], stdin=pipe, stdout=pipe)

    def finish_load(self, name, test, process):
        """Its result; nothing if it failed, which is noted."""
        try:
            out, _ = process.communicate(timeout=PATIENCE_SECONDS + self.options.seconds)
            result = json.loads(out.decode())
        except (ValueError, subprocess.TimeoutExpired):
            result = {"err": "no result"}
        self.stop(process)
        if result["err"]:
            self.notes.append(f"{name} failed {test}, errors: {result['err']}")
        return {} if result["err"] else result

    def record(self, name, test, result):
        """Keeps the numbers of a result."""
        for key, value in result.items():
            self.results[name, test, key].append(value)

    def run_test(self, name, test):
        """One test of one forwarder."""
        (process, port), (kind, number), seconds = self.forwarders[name], TESTS[test], self.options.seconds
        before, bulk = usage(process)["cpu"], test == "beside" and self.start_load("up", port, 1, seconds + 1)
        time.sleep(0.5 if bulk else 0)
        result = self.finish_load(name, test, self.start_load(kind, port, number, seconds))
        if bulk and not self.finish_load(name, "the bulk stream", bulk):
            return
        time.sleep(0.1)                                 # it hands on the rest, and waits for its children
        if result and test == "up1" and name != "direct":
            result["cpu"] = (usage(process)["cpu"] - before) / result["n"] * 1e9
        self.record(name, test, result)

    def run_memory(self):
        """The whole process at rest, while ten connections all carry bulk, and once these are idle again."""
        held, measured = [], {name: it for name, it in self.forwarders.items() if name != "direct"}
        for name, (process, port) in measured.items():
            sizes, load = [usage(process)["rss"]], self.start_load("hold", port, SESSIONS)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not select.select([load.stdout], [], [], 0.02)[0] and time.monotonic() < deadline:
                sizes.append(usage(process)["rss"])
            held.append((name, load, {"rest": sizes[0], "bulk": max(sizes + [usage(process)["rss"]])}))
        time.sleep(IDLE_SECONDS)
        for name, load, sizes in held:
            sizes["idle"] = usage(measured[name][0])["rss"]
            if self.finish_load(name, "memory", load):
                self.record(name, "memory", sizes)

    def run_soak(self, name):
        """Mixed load, after which descriptors and threads must be back where they were."""
        (process, port), done = self.forwarders[name], collections.Counter()
        self.finish_load(name, "the soak", self.start_load("conn", port, 8, 1))
        time.sleep(IDLE_SECONDS)
        before, end = usage(process), time.monotonic() + self.options.soak
        while time.monotonic() < end:
            mix = [("up", 2), ("down", 2), ("ping", 3), ("conn", 3)]
            for (kind, _), load in zip(mix, [self.start_load(kind, port, number, 3) for kind, number in mix]):
                result = self.finish_load(name, "the soak", load)
                done[kind] += result.get("n", result.get("ok", 0))
        time.sleep(IDLE_SECONDS)
        after = usage(process)
        self.notes += [f"{name} has more {key} after the soak" for key in ("threads", "descriptors")
                       if after[key] > before[key]]
        change = ", ".join(f"{key} {before[key]:.0f} to {after[key]:.0f}" for key in before if key != "cpu")
        return (f"{name}: {self.options.soak:g} s of mixed load, {(done['up'] + done['down']) / 1e9:.1f} GB, "
                f"{done['conn']:,} connections, {done['ping']:,} round trips; {change}\n")

    def run_startup(self):
        """Wall times of plexctl, bare and installed, and of what it stands in for; returns the columns."""
        # In a fresh environment: a .pth file of site-packages can cost more than a whole program.
        python, url = os.path.join(self.scratch, "venv", "bin", "python"), start_plane("127.0.0.1:1")
        output_of(self.options.python, "-m", "venv", "--without-pip", os.path.join(self.scratch, "venv"))
        packages = output_of(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
        cases = [("without", "help", ["-I", "-c", "import argparse"]),
                 ("without", "print", ["-c", POST, *FORWARD, "--server", url])]
        for number, (name, path) in enumerate(self.options.plexctl.items()):
            shutil.copy(path, os.path.join(packages, f"plexctl{number}.py"))
            installed = ["-c", f"import sys; from plexctl{number} import run; sys.exit(run())"]
            for column, words in ((name, [path]), (name + ", installed", installed)):
                cases += [(column, "help", [*words, "--help"]),
                          (column, "print", [*words, *FORWARD, "--server", url])]
        output_of(python, "-m", "compileall", "-q", packages)
        quiet = subprocess.DEVNULL
        for turn in range(4 * self.options.rounds + 1):
            for column, key, words in cases[turn % len(cases):] + cases[:turn % len(cases)]:
                began = time.perf_counter()
                status = subprocess.call([python, *words], env=self.env, stdout=quiet, stderr=quiet)
                if status:
                    self.notes.append(f"{column} failed start-up, {key}: exit status {status}")
                elif turn:                              # the first time warms the caches
                    self.record(column, "startup", {key: (time.perf_counter() - began) * 1e3})
        return list(dict.fromkeys(column for column, _, _ in cases))


# --- Report -------------------------------------------------------------------------------------------------

def table(bench, columns, base, tests):
    """Medians as a Markdown table, with the ratio to the column `base`."""
    lines = [["median (ratio); * less is better", *columns], ["---"] + ["---:"] * len(columns)]
    for (test, key), label in ROWS.items():
        if test not in tests:
            continue
        found = {name: bench.results[name, test, key] for name in columns if bench.results[name, test, key]}
        medians = {name: statistics.median(values) for name, values in found.items()}
        lines.append([label])
        for name in columns:
            value, other = medians.get(name, 0), medians.get(base, 0) if name != base else 0
            text = f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}" if name in medians else ""
            lines[-1].append(text + (f" ({value / other:.2f})" if text and other else ""))
            if not text and name.split(",")[0] in bench.options.plexctl:
                bench.notes.append(f"{name} has no result: {label}")
    return "".join("| {} |\n".format(" | ".join(line)) for line in lines)


def run(bench):
    """Runs what was asked for and prints the report; returns the exit status."""
    options = bench.options
    tests = [] if options.soak else options.tests.split(",") if options.tests else list(TESTS)
    traffic = [test for test in tests if test != "startup"]
    for name, command in find_forwarders(options).items() if traffic or options.soak else ():
        bench.start_forwarder(name, command)
    names = list(bench.forwarders)
    report = [bench.run_soak(name) for name in names if options.soak]
    if "memory" in tests:
        bench.run_memory()
    for number in range(options.rounds):
        for place, test in enumerate(test for test in traffic if TESTS[test]):
            for name in sorted(names, key=lambda name: (names.index(name) + number + place) % len(names)):
                bench.run_test(name, test)
            print(f"round {number + 1} of {options.rounds}: {test}", file=sys.stderr, flush=True)
    report += [table(bench, names, "haproxy", traffic)] if traffic else []
    report += [table(bench, bench.run_startup(), "without", ["startup"])] if "startup" in tests else []
    versions = re.findall(r"(socat|HAProxy) version ([\d.]+)", output_of("sh", "-c", "socat -V; haproxy -v"))
    about = "import platform as p; print(p.platform(), p.python_implementation(), p.python_version())"
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {output_of(options.python, '-c', about)}, "
          f"{', '.join(map(' '.join, versions))}; load in {'C' if options.lg else 'Python'}; "
          f"{options.rounds} rounds of {options.seconds:g} s\n")
    print("\n".join(report + [f"- {note}" for note in dict.fromkeys(bench.notes)]))
    ours = tuple(name + end for name in options.plexctl for end in (" ", ", installed "))
    return int(any(note.startswith(ours) for note in bench.notes))


def main(argv):
    """Returns the exit status."""
    if argv[:1] == ["_lg"]:
        kind, port, *numbers = argv[1], *map(float, argv[2:])
        if kind in ("serve", "hold"):
            return (serve if kind == "serve" else hold)(int(port), *map(int, numbers))
        return print(json.dumps(load(kind, int(port), int(numbers[0]), numbers[1])))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=5, help="5; start-up is measured four times as often")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each single measurement, 1.5")
    parser.add_argument("--tests", metavar="NAMES", help="of " + ",".join(TESTS))
    parser.add_argument("--only", metavar="NAMES", help="of direct,plexctl,Go," + ",".join(PEERS))
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="mixed load on plexctl, nothing else")
    parser.add_argument("--python", metavar="PATH", default=sys.executable, help="interpreter for plexctl")
    parser.add_argument("--plexctl", metavar="[NAME=]PATH", action="append", help="repeatable: side by side")
    parser.add_argument("--lg", metavar="PATH", help="a compiled load generator")
    parser.add_argument("--go", metavar="PATH", help="a forwarder that is called with two addresses")
    options, scratch = parser.parse_args(argv), tempfile.mkdtemp(prefix="bench-")
    pairs = [path.rpartition("=")[::2] for path in options.plexctl or [os.path.join(ROOT, "plexctl.py")]]
    options.plexctl = {name or "plexctl": os.path.abspath(path) for name, path in pairs}
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bench = Bench(options, scratch)
    try:
        return run(bench)
    finally:
        for process in bench.running[::-1]:
            bench.stop(process)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
