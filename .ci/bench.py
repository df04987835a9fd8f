#!/usr/bin/env python3
"""Measures plexctl beside other TCP forwarders on loopback, and its start-up beside other ways to do it.

    python3 .ci/bench.py                       forwarders, memory and start-up: about a quarter of an hour
    python3 .ci/bench.py --tests up1,ping1,mem --rounds 3
    python3 .ci/bench.py --startup --full      the start-up table alone, https too
    python3 .ci/bench.py --soak 300            the mixed load alone
    python3 .ci/bench.py --forwarder 'go=gofwd 127.0.0.1:{l} 127.0.0.1:{r}'

Markdown goes to stdout, progress to stderr; the exit status is 1 if plexctl failed a test. Standard library
only, Python 3.6 to 3.14. CPU time, memory and the soak are read from Linux's /proc, and left out elsewhere.

Every forwarder stays up for the whole run, with a server of its own behind it. Each test goes round all of
them in turn, the order rotates each round, and medians are reported: on a machine with other work only the
ratios mean something. plexctl runs as its users run it, peer check and session lease on, against a small
control plane. Memory is taken from fresh instances. Start-up includes what `site` does: a .pth file in
site-packages can cost more than the whole program, so --python may name the interpreter of a fresh venv.

What it cannot do: load generator and server are Python too, and use processor time that a fast forwarder
could have used. All ratios are therefore compressed towards 1, compared to a load generator in C: least for
bulk, most for 64 clients and connections per second. --lg takes a compiled one with the same sub-commands
(serve, tput, ping, conn, idle), each of which prints a line of JSON.
"""

import argparse
import errno
import http.server
import itertools
import json
import os
import platform
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid

SELF = os.path.abspath(__file__)
HAS_PROC = os.path.exists("/proc/self/stat")
CHUNK_BYTES = 256 * 1024
PATIENCE_SECONDS = 60
# Name -> arguments of the load generator, and of a second one beside it. {p}: port, {s} and {b}: seconds.
TESTS = {
    "up1": ("tput {p} up 1 {s}", ""), "down1": ("tput {p} down 1 {s}", ""), "up8": ("tput {p} up 8 {s}", ""),
    "ping1": ("ping {p} 1 {s} 64", ""), "ping64": ("ping {p} 64 {s} 64", ""),
    "conn1": ("conn {p} 1 {s}", ""), "conn32": ("conn {p} 32 {s}", ""),
    "mix": ("ping {p} 1 {s} 64", "tput {p} up 1 {b}"),
}
LESS = " (less is better)"
# Rows of the tables: test, key in its result, label.
ROWS = [
    ("up1", "gBps", "1 stream up, GB/s"), ("up1", "cpu_per_gb", "1 stream up, CPU s per GB" + LESS),
    ("down1", "gBps", "1 stream down, GB/s"), ("down1", "cpu_per_gb", "1 stream down, CPU s per GB" + LESS),
    ("up8", "gBps", "8 streams up, GB/s"), ("up8", "cpu_per_gb", "8 streams up, CPU s per GB" + LESS),
    ("ping1", "rate", "ping-pong, round trips/s"), ("ping1", "p50", "ping-pong, p50 us" + LESS),
    ("ping1", "p99", "ping-pong, p99 us" + LESS), ("ping64", "rate", "64 clients, round trips/s"),
    ("ping64", "p50", "64 clients, p50 us" + LESS), ("ping64", "p99", "64 clients, p99 us" + LESS),
    ("conn1", "rate", "short connections, one at a time, per s"),
    ("conn32", "rate", "short connections, 32 at once, per s"),
    ("mix", "p99", "ping-pong beside a bulk stream, p99 us" + LESS),
    ("mix", "beside", "the bulk stream beside it, GB/s"),
    ("mem1000", "rss", "KiB per idle connection, RSS at 1,000" + LESS),
    ("mem1000", "pss", "the same as PSS, shared pages counted once" + LESS),
    ("mem5000", "rss", "KiB per idle connection, RSS at 5,000" + LESS),
    ("mem5000", "pss", "the same as PSS, shared pages counted once" + LESS),
]


# --- Load generator: the hidden sub-command _lg -------------------------------------------------------------

if hasattr(select, "epoll"):
    new_poller, SECOND, IN, OUT = select.epoll, 1, select.EPOLLIN, select.EPOLLOUT
else:                                                   # the same calls, but in milliseconds
    new_poller, SECOND, IN, OUT = select.poll, 1000, select.POLLIN, select.POLLOUT


def dial(port):
    """A connection to a loopback port, without Nagle's delay."""
    sock = socket.create_connection(("127.0.0.1", port), 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)
    return sock


def receive_all(sock, end=float("inf")):
    """Reads to the end of input, half-closes its own side at the time `end`, returns the number of bytes."""
    buffer, total, count = bytearray(CHUNK_BYTES), 0, 1
    while count:
        count = sock.recv_into(buffer)
        total += count
        if time.perf_counter() >= end:
            sock.shutdown(socket.SHUT_WR)
            end = float("inf")
    return total


def fork_bulk(sock, mode, others):
    """Serves a bulk connection in a process of its own, without the `others`: they would never end."""
    if os.fork():
        return
    try:
        for other in others:
            other.close()
        if mode == b"S":
            sock.sendall(struct.pack("=Q", receive_all(sock)))
        if mode == b"G":
            client_ended, data = select.poll(), memoryview(bytes(CHUNK_BYTES))
            client_ended.register(sock, select.POLLIN)
            while not client_ended.poll(0):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    finally:
        os._exit(0)


def serve(port):
    """The server behind a forwarder. A connection's first byte: E echo, S sink (counts), G source."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener, poller, buffer = socket.socket(), new_poller(), bytearray(65536)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    poller.register(listener, IN)
    socks, fresh, view, door = {}, set(), memoryview(buffer), listener.fileno()
    while True:
        for fd, _ in poller.poll():
            if fd == door:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                socks[sock.fileno()] = sock
                fresh.add(sock.fileno())
                poller.register(sock, IN)
                continue
            try:
                count = socks[fd].recv_into(buffer, 1 if fd in fresh else 65536)
                if count and (fd not in fresh or buffer[0] == ord("E")):
                    fresh.discard(fd)
                    socks[fd].sendall(view[:count])
                    continue
            except OSError:
                count = 0
            poller.unregister(fd)
            fresh.discard(fd)
            with socks.pop(fd) as sock:
                if count:
                    fork_bulk(sock, bytes(view[:1]), [listener, *socks.values()])


def stream(port, direction, end):
    """One bulk connection until the time `end`: bytes moved, whether it failed, when it was over."""
    with dial(port) as sock:
        if direction == "up":
            sock.sendall(b"S")
            total, data = 0, memoryview(bytes(CHUNK_BYTES))
            while time.perf_counter() < end:
                sock.sendall(data)
                total += CHUNK_BYTES
            sock.shutdown(socket.SHUT_WR)
            failed = sock.recv(8, socket.MSG_WAITALL) != struct.pack("=Q", total)
        else:
            sock.sendall(b"G")
            total = receive_all(sock, end)
            failed = time.perf_counter() < end
    return total, failed, time.perf_counter()


def tput(port, direction, number, seconds):
    """Throughput of `number` bulk connections, each in a process of its own."""
    start, pipes = time.perf_counter(), []
    for _ in range(int(number)):
        pipes.append(os.pipe())
        if not os.fork():
            try:
                result = stream(port, direction, start + float(seconds))
            except OSError:
                result = 0, True, time.perf_counter()
            os.write(pipes[-1][1], json.dumps(result).encode())
            os._exit(0)
    totals, failures, ends = zip(*(json.loads(os.read(reader, 4096).decode()) for reader, _ in pipes))
    total, elapsed = sum(totals), max(ends) - start
    return {"gBps": total / elapsed / 1e9, "up": total, "down": 0, "err": sum(failures)}


def latencies(times, elapsed, **more):
    """Rate and percentiles, in microseconds, of a list of seconds."""
    times = sorted(times)
    result = {f"p{share}": times[len(times) * share // 100] * 1e6 for share in (50, 90, 99) if times}
    return dict(result, rate=len(times) / max(elapsed, 1e-9), **more)


def ping(port, number, seconds, size):
    """Closed-loop ping-pong of `number` clients with `size` bytes."""
    number, size, now, times, errors = int(number), int(size), time.perf_counter, [], 0
    data, buffer, poller, clients = bytes(size), bytearray(size), new_poller(), {}
    for _ in range(number):
        sock = dial(port)
        sock.sendall(b"E")
        errors += sock.recv(1) != b"E"
        clients[sock.fileno()] = [sock, 0.0, 0]         # socket, when it asked, bytes of the answer so far
        poller.register(sock, IN)
    start = now()
    end = start + float(seconds)
    while number == 1 and now() < end and not errors:
        asked = now()
        sock.send(data)
        errors += sock.recv_into(buffer, size, socket.MSG_WAITALL) != size
        times.append(now() - asked)
    live = number if number > 1 else 0
    for client in list(clients.values())[:live]:
        client[1] = now()
        client[0].send(data)
    while live:
        events = poller.poll(3 * SECOND)
        for fd, _ in events:
            client = clients[fd]
            count = client[0].recv_into(buffer, size - client[2])
            client[2] += count
            if client[2] == size:
                arrived = now()
                times.append(arrived - client[1])
                if arrived < end:
                    client[1:] = now(), 0
                    client[0].send(data)
                    continue
            if client[2] == size or not count:
                errors += not count
                poller.unregister(fd)
                live -= 1
        if not events:
            errors, live = errors + live, 0
    return latencies(times, now() - start, n=len(times), err=errors)


def conn(port, number, seconds):
    """Connect, a byte there and back, close: `number` of them at any time."""
    now, poller, live, times, errors = time.perf_counter, new_poller(), {}, [], 0
    start = last = now()
    end = start + float(seconds)
    while now() < (end + 5 if live else end):
        while len(live) < int(number) and now() < end:
            sock, began = socket.socket(), now()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sock.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS):
                live[sock.fileno()] = sock, began
                poller.register(sock, OUT)
            else:
                errors += 1
                time.sleep(0.001)
        for fd, events in poller.poll(SECOND):
            sock, began = live[fd]
            try:
                if events & OUT and sock.send(b"E"):
                    poller.modify(fd, IN)
                    continue
                if not sock.recv(1):
                    raise ConnectionError
                last = now()
                times.append(last - began)
            except OSError:
                errors += 1
            poller.unregister(fd)
            live.pop(fd)[0].close()
    return latencies(times, last - start, ok=len(times), err=errors + len(live))


def idle(port, number):
    """Opens `number` connections that have seen a byte, says so, and holds them until standard input ends."""
    held = []
    try:
        for _ in range(int(number)):
            sock = dial(port)
            sock.settimeout(30)
            sock.sendall(b"E")
            if not sock.recv(1):
                break
            held.append(sock)
    except OSError:
        pass
    print(json.dumps({"ready": len(held), "bad": int(number) - len(held)}), flush=True)
    sys.stdin.read()


LOADS = {"serve": serve, "tput": tput, "ping": ping, "conn": conn, "idle": idle}


# --- Control plane ------------------------------------------------------------------------------------------

PROJECT, RESOURCE = "0190a8b8-a0c0-7a0a-8a0a-a0a0a0a0a0c0", "0190a8b8-d3e3-7d3d-8d3d-d3d3d3d3d3d3"
TARGET = {"host": "10.0.0.5", "port": 5432}


class Plane(http.server.BaseHTTPRequestHandler):
    """IssueSession, GetSession and RevokeSession; its server has `endpoint`, `lifetime` and `sessions`."""

    wbufsize = -1                                       # headers and body in one segment

    def log_message(self, *args):
        """Says nothing."""

    def answer(self, status, body=None):
        """Sends a JSON body, or none."""
        raw = json.dumps(body).encode() if body else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        """GetSession."""
        session = self.server.sessions.get(self.path.split("/")[-1])
        self.answer(200 if session else 404, session)

    def do_POST(self):
        """RevokeSession and IssueSession."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/revoke"):
            self.server.sessions.pop(self.path.split("/")[-2], None)
            return self.answer(204)
        key, endpoint = str(uuid.uuid4()), self.server.endpoint
        issued, expires = (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
                           for seconds in (0, self.server.lifetime))
        session = self.server.sessions[key] = {
            "id": key, "project_id": PROJECT, "domain_id": key, "resource_id": RESOURCE, "identity_id": key,
            "kind": "tcp", "status": "active", "issued_at": issued, "expires_at": expires,
            "last_active_at": issued, "target": {"tcp": TARGET}, "listener_endpoint": endpoint}
        return self.answer(201, {"session_id": key, "token": "a.b.c", "expires_at": expires,
                                 "listener_endpoint": endpoint, "session": session})


def start_plane(endpoint, lifetime=3600, certificate=()):
    """Starts a control plane in a thread and returns its URL."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Plane)
    server.endpoint, server.lifetime, server.sessions, server.daemon_threads = endpoint, lifetime, {}, True
    if certificate:
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return "{}://127.0.0.1:{}".format("https" if certificate else "http", server.server_address[1])


# --- Processes ----------------------------------------------------------------------------------------------

STARTED = []


def say(text):
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def spawn(argv, **options):
    """Starts a process in a session of its own, to be ended by stop()."""
    process = subprocess.Popen(argv, start_new_session=True, **options)
    STARTED.append(process)
    return process


def all_processes():
    """pid -> the fields of /proc/PID/stat from the state on; empty where there is none."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc") if HAS_PROC else ()):
        try:
            with open(f"/proc/{name}/stat") as file:
                found[int(name)] = file.read().rsplit(")", 1)[1].split()
        except OSError:
            pass
    return found


def tree(pid):
    """The same, of a process and its descendants."""
    processes, children, found, todo = all_processes(), {}, {}, [pid]
    for child, fields in processes.items():
        children.setdefault(int(fields[1]), []).append(child)
    while todo:
        pid = todo.pop()
        if pid in processes:
            found[pid] = processes[pid]
            todo += children.get(pid, [])
    return found


def stop(process):
    """Ends a process in order, then whatever is left of its group and of its descendants."""
    family = tree(process.pid)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(4)
    except subprocess.TimeoutExpired:
        pass
    left = all_processes()
    # sshd's children have groups of their own. The same start time: the pid has not been used anew.
    same = [pid for pid in family if left.get(pid, [None] * 20)[19] == family[pid][19]]
    for function, pid in [(os.killpg, process.pid)] + [(os.kill, pid) for pid in same]:
        try:
            function(pid, signal.SIGKILL)
        except OSError:
            pass
    process.wait()
    STARTED.remove(process)


def cpu_seconds(process):
    """Processor time of the tree, with the children that it has waited for."""
    ticks = sum(int(field) for fields in tree(process.pid).values() for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def usage(process):
    """Descriptors and threads of the tree; RSS in KiB, and PSS, which counts shared pages once."""
    total = {"fds": 0, "threads": 0, "rss": 0, "pss": 0}
    for pid in tree(process.pid):
        try:
            with open(f"/proc/{pid}/status") as file:
                status = dict(line.split(":", 1) for line in file if ":" in line)
            total["threads"] += int(status["Threads"])
            total["rss"] += int(status.get("VmRSS", "0").split()[0])
            total["fds"] += len(os.listdir(f"/proc/{pid}/fd"))
            with open(f"/proc/{pid}/smaps_rollup") as file:
                total["pss"] += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except PermissionError:                         # sshd's child, for anyone but root
            total["pss"] = float("nan")
        except OSError:
            pass
    return total


# --- Forwarders ---------------------------------------------------------------------------------------------

# {l}: local port, {r}: port of the server, {x}: one more, {d}: scratch directory, {n}: threads, {m}: clients,
# {f}: descriptors, {module}: loads nginx's stream module. Its default buffer, 16 KiB, would halve its rate.
HAPROXY = """global
  maxconn {m}
  nbthread {n}
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
listen bench
  bind 127.0.0.1:{l}
  server s 127.0.0.1:{r}
"""
NGINX = """{module}
worker_processes {n}; daemon off; pid {d}/pid; error_log stderr crit; worker_rlimit_nofile {f};
events {{ worker_connections {f}; }}
stream {{ server {{ listen 127.0.0.1:{l} backlog=4096; proxy_pass 127.0.0.1:{r}; proxy_half_close on;
  proxy_timeout 1h; proxy_buffer_size 256k; }} }}
"""
SSHD = """HostKey {d}/host
AuthorizedKeysFile {d}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
ListenAddress 127.0.0.1:{x}
"""
SSH = """cd {d}; for k in host key; do ssh-keygen -q -t ed25519 -N '' -f $k; done
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd   # without it sshd does not start as root
"$(command -v sshd)" -D -f {d}/sshd_config & a=$!
trap 'kill $a $b' TERM EXIT
sleep 0.5
ssh -N -F none -i key -p {x} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \\
  -o BatchMode=yes -o IdentitiesOnly=yes -o ConnectionAttempts=9 -o ExitOnForwardFailure=yes \\
  -L 127.0.0.1:{l}:127.0.0.1:{r} "$(id -un)@127.0.0.1" & b=$!
wait $b
"""
SOCAT = "socat TCP-LISTEN:{l},bind=127.0.0.1,fork,reuseaddr,backlog=1024,nodelay TCP:127.0.0.1:{r},nodelay"
# Name, programs, how to ask for the version and what it looks like, settings worth telling, command, files.
PEERS = [
    ("socat", ["socat"], "-V", r"socat version (\S+)", "", SOCAT, {}),
    ("haproxy", ["haproxy"], "-v", r"(?i)version ([\d.]+)", "({} threads)", "haproxy -db -q -f {d}/conf",
     {"conf": HAPROXY}),
    ("nginx", ["nginx"], "-v", r"nginx/(\S+)", "({} workers, 256 KiB buffers)", "nginx -c {d}/conf -p {d}",
     {"conf": NGINX}),
    ("ssh -L", ["ssh", "sshd", "ssh-keygen"], "-V", r"OpenSSH_([^\s,]+)", "", "sh {d}/run",
     {"sshd_config": SSHD, "run": SSH}),
]
TCP_FORWARD = ["tcp-forward", "--server", "{server}", "--project-id", PROJECT, "--resource-id", RESOURCE,
               "--host", TARGET["host"], "--port", str(TARGET["port"]), "--output", "json"]


def free_port():
    """A free port below those that the kernel gives to outgoing connections."""
    while True:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", random.randrange(15000, 32000)))
                return sock.getsockname()[1]
            except OSError:
                continue


def echoes(port):
    """Whether a byte comes back."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as sock:
            sock.sendall(b"E")
            return sock.recv(1) == b"E"
    except OSError:
        return False


def output_of(*argv):
    """What a program prints on stdout and stderr."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=PATIENCE_SECONDS, check=False).stdout.decode(errors="replace").strip()


class Forwarder:
    """A forwarder with the server behind it; without a command, that server itself."""

    def __init__(self, bench, name, command, files=()):
        self.bench, self.name, self.command, self.files = bench, name, command, dict(files)

    def start(self):
        """Returns whether a byte came back within 20 seconds; if not, that is recorded."""
        bench, folder = self.bench, tempfile.mkdtemp(dir=self.bench.scratch)
        values = {"l": free_port(), "r": free_port(), "x": free_port(), "d": folder, "n": bench.threads,
                  "f": bench.limit, "m": (bench.limit - 200) // 2, "module": bench.nginx_module}
        if "{server}" in self.command:
            values["server"] = start_plane("127.0.0.1:{r}".format(**values), bench.lifetime)
        for name, text in self.files.items():
            with open(os.path.join(folder, name), "w") as file:
                file.write(text.format(**values))
        self.port, self.log = values["l" if self.command else "r"], os.path.join(folder, "log")
        with open(self.log, "w") as log:
            self.server = self.process = spawn([*bench.lg, "serve", str(values["r"])], stderr=log)
            if self.command:
                self.process = spawn([word.format(**values) for word in self.command], env=bench.env,
                                     stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not echoes(self.port):
            if time.monotonic() > deadline or self.process.poll() is not None:
                bench.record(self.name, "start", {"err": 1, "said": " | ".join(self.said()[-3:])})
                self.stop()
                return False
            time.sleep(0.1)
        return True

    def said(self):
        """The lines it has written."""
        with open(self.log, errors="replace") as log:
            return log.read().splitlines()

    def stop(self):
        """Ends it and its server. What plexctl warned of belongs in the report: was the peer check on?"""
        for line in self.said() if self.name == "plexctl" else ():
            if "warning" in line and "more connections at once than sessions" not in line:
                self.bench.note(line)
        for process in [self.process] + [self.server] * bool(self.command):
            stop(process)


class Bench:
    """What the tests share: options, limits, environment, results and notes."""

    def __init__(self, options, scratch):
        import resource
        self.options, self.scratch, self.rows, self.notes = options, scratch, [], []
        self.lg = [options.lg] if options.lg else [sys.executable, "-I", "-S", SELF, "_lg"]
        self.threads, self.nginx_module = max(2, min(8, os.cpu_count() or 1)), ""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.limit, hard))
        self.lifetime = max(3600, 2 * (options.soak + options.rounds * 64 * (options.seconds + 1.5)))
        # Without what would change the behaviour of plexctl, urllib or curl.
        self.env = {name: value for name, value in os.environ.items()
                    if not name.lower().endswith("_proxy") and not name.startswith(("PLEX", "NOTIFY_"))}
        self.env.update(PLEXSPHERE_TOKEN="bench", XDG_CONFIG_HOME=scratch, XDG_STATE_HOME=scratch)

    def note(self, text):
        """Keeps a line for the report, once."""
        if text not in self.notes:
            say(text)
            self.notes.append(text)

    def record(self, name, test, result):
        """Keeps a result. One with an error is noted, and left out of the medians."""
        numbers = {key: value for key, value in result.items() if str(value) != "nan"}
        self.rows.append(dict(numbers, name=name, test=test))
        if result["err"]:
            self.note("{} failed {}: {}".format(name, test, result.get("said") or f"{result['err']} errors"))

    def median(self, name, test, key):
        """The median of what was measured, or None."""
        values = [row[key] for row in self.rows
                  if row["name"] == name and row["test"] == test and key in row and not row["err"]]
        return statistics.median(values) if values else None

    def start_load(self, arguments):
        """Starts the load generator."""
        pipe = subprocess.PIPE
        return spawn([*self.lg, *arguments.split()], stdin=pipe, stdout=pipe, stderr=pipe)

    def finish_load(self, process):
        """Its answer, or {"err": 1} and what it said instead."""
        try:
            out, said = process.communicate(timeout=PATIENCE_SECONDS + self.options.seconds)
            return json.loads(out.decode())
        except ValueError:
            return {"err": 1, "said": said.decode(errors="replace").strip()[-200:]}
        except subprocess.TimeoutExpired:
            return {"err": 1, "said": "it did not end"}
        finally:
            stop(process)


# --- Tests --------------------------------------------------------------------------------------------------

def run_test(bench, forwarder, test):
    """One test of one forwarder."""
    seconds, (arguments, beside) = bench.options.seconds, TESTS[test]
    before, load = cpu_seconds(forwarder.process), None
    if beside:
        load = bench.start_load(beside.format(p=forwarder.port, b=seconds + 1))
        time.sleep(0.5)
    result = bench.finish_load(bench.start_load(arguments.format(p=forwarder.port, s=seconds)))
    if load:
        other = bench.finish_load(load)
        result.update(beside=other.get("gBps"), err=result["err"] + other["err"])
    time.sleep(0.1)                                     # until the children have been waited for
    moved = result.get("up", 0) + result.get("down", 0)
    if moved and forwarder.command and HAS_PROC:
        result["cpu_per_gb"] = (cpu_seconds(forwarder.process) - before) / moved * 1e9
    bench.record(forwarder.name, test, result)


def run_rounds(bench, forwarders, tests):
    """Each test goes round all the forwarders in turn."""
    for done, test in itertools.product(range(bench.options.rounds), tests):
        turn = done % len(forwarders)
        for forwarder in forwarders[turn:] + forwarders[:turn]:
            run_test(bench, forwarder, test)
        say(f"round {done + 1} of {bench.options.rounds}: {test}")


def run_memory(bench, forwarder, count):
    """What `count` idle connections cost a fresh instance that has seen a few."""
    bench.finish_load(bench.start_load(f"conn {forwarder.port} 4 0.2"))
    time.sleep(0.5)
    before = usage(forwarder.process)
    load = bench.start_load(f"idle {forwarder.port} {count}")
    ready = select.select([load.stdout], [], [], PATIENCE_SECONDS)[0] and load.stdout.readline()
    time.sleep(1)
    after = usage(forwarder.process)
    stop(load)
    held = json.loads(ready.decode()) if ready else {"bad": 1}
    bench.record(forwarder.name, f"mem{count}", {
        "rss": (after["rss"] - before["rss"]) / count, "pss": (after["pss"] - before["pss"]) / count,
        "err": held["bad"], "said": f"{held['bad']} not served" if ready else "not ready in time"})
    say(f"memory at {count} connections: {forwarder.name}")


def run_soak(bench, forwarder):
    """Mixed load, after which descriptors and threads are to be back where they were, memory within 10 %."""
    bench.finish_load(bench.start_load(f"conn {forwarder.port} 32 1"))
    time.sleep(1)
    before, totals, peak = usage(forwarder.process), dict.fromkeys(("up", "down", "ok", "n", "err"), 0), 0
    deadline = time.monotonic() + bench.options.soak
    while time.monotonic() < deadline:
        loads = [bench.start_load(text.format(forwarder.port)) for text in
                 ("tput {} up 2 3", "tput {} down 2 3", "ping {} 8 3 64", "conn {} 8 3")]
        time.sleep(2)
        peak = max(peak, usage(forwarder.process)["rss"])
        for result in [bench.finish_load(load) for load in loads]:
            totals = {key: totals[key] + result.get(key, 0) for key in totals}
        say(f"soak: {max(0, deadline - time.monotonic()):.0f} s left")
    kept, deadline = ["?"], time.monotonic() + 10
    while kept and time.monotonic() < deadline:
        time.sleep(0.5)
        after = usage(forwarder.process)
        limits = {"fds": before["fds"], "threads": before["threads"], "rss": before["rss"] * 1.1}
        kept = [key for key in limits if after[key] > limits[key]]
    kept += ["errors"] * bool(totals["err"])
    result = dict(totals, before=before, after=after, peak=peak, err=len(kept), said=", ".join(kept))
    bench.record(forwarder.name, "soak", result)
    changes = ", ".join(f"{key} {before[key]:,} to {after[key]:,}" for key in limits)
    return (f"Soak, {bench.options.soak:g} s: {(totals['up'] + totals['down']) / 1e9:.1f} GB, "
            f"{totals['ok']:,} connections, {totals['n']:,} round trips, {totals['err']} errors; "
            f"{changes} KiB (at most {peak:,}): {'NOT FINE: ' + result['said'] if kept else 'fine'}.\n")


SCRIPT = """import json, os, sys, urllib.request
body = {body}
body["idempotency_key"] = os.urandom(16).hex()
headers = {{"Authorization": "Bearer " + os.environ["PLEXSPHERE_TOKEN"], "Content-Type": "application/json"}}
context = None
if len(sys.argv) > 2:
    import ssl
    context = ssl.create_default_context(cafile=sys.argv[2])
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=30, context=context) as answer:
    print(json.loads(answer.read().decode())["listener_endpoint"])
"""


def certificate(folder):
    """A throw-away certificate for 127.0.0.1: the paths of certificate and key."""
    paths = os.path.join(folder, "certificate.pem"), os.path.join(folder, "certificate.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=bench",
               "-addext", "subjectAltName=IP:127.0.0.1",
               "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    subprocess.check_call([*command, "-out", paths[0], "-keyout", paths[1]], stderr=subprocess.DEVNULL)
    return paths


def startup_cases(bench):
    """Label, command and expected exit status of each row of the start-up table."""
    python, plexctl = bench.options.python, bench.options.plexctl
    script = os.path.join(bench.scratch, "post.py")
    body = json.dumps({"resource_id": RESOURCE, "kind": "tcp", "target": {"tcp": TARGET}})
    with open(script, "w") as file:
        file.write(SCRIPT.format(body=body))
    cases = [("`python -I -c pass`", [python, "-I", "-c", "pass"], 0),
             ('`python -I -c "import argparse"`', [python, "-I", "-c", "import argparse"], 0),
             ("plexctl --help", [python, plexctl, "--help"], 0),
             ("plexctl, usage error", [python, plexctl, "tcp-forward", "--project-id", "x"], 2)]
    certificates = [()]
    if bench.options.full and shutil.which("openssl"):
        certificates.append(certificate(bench.scratch))
    for pems in certificates:
        server, ca = start_plane("127.0.0.1:5432", certificate=pems), pems[:1]
        url, scheme = f"{server}/v1/projects/{PROJECT}/sessions", server.partition(":")[0]
        words = [word.format(server=server) for word in TCP_FORWARD] + ["--ca-file"] * len(ca)
        cases.append((f"plexctl, whole run, {scheme}", [python, plexctl, *words, *ca], 0))
        cases.append((f"urllib.request script, {scheme}", [python, script, url, *ca], 0))
        if shutil.which("curl"):
            cases.append((f"curl, {scheme}", [
                "curl", "-sSf", "-H", "Authorization: Bearer bench", "-H", "Content-Type: application/json",
                "-d", body, url, *["--cacert"] * len(ca), *ca], 0))
    return cases


def run_startup(bench):
    """Wall times of all cases in turn, the first time round uncounted; returns the labels."""
    cases, runs = startup_cases(bench), 4 * bench.options.rounds
    for done in range(runs + 1):
        turn = done % len(cases)
        for label, command, expected in cases[turn:] + cases[:turn]:
            signal.alarm(PATIENCE_SECONDS)              # wait(timeout) would poll, in steps of up to 50 ms
            began, quiet = time.perf_counter(), subprocess.DEVNULL
            process = spawn(command, env=bench.env, stdin=quiet, stdout=quiet, stderr=quiet)
            status, took = process.wait(), time.perf_counter() - began
            signal.alarm(0)
            STARTED.remove(process)
            if done:
                bench.record(label, "startup", {"ms": took * 1e3, "err": int(status != expected),
                                                "said": f"exit status {status}"})
    say(f"start-up: {len(cases)} programs, {runs} times each")
    return [label for label, _, _ in cases]


# --- Report -------------------------------------------------------------------------------------------------

def number(value, base=1):
    """A number or a quotient with about three digits, empty where there is none."""
    if value is None or not base:
        return ""
    value /= base
    digits = sum(abs(value) < limit for limit in (100, 10, 0.1, 0.01))
    return f"{value:,.{digits}f}"


def table(*rows):
    """A Markdown table, all but the first column aligned to the right."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def forwarder_tables(bench, names):
    """plexctl relative to each of the others, then the medians."""
    ratios, medians = [["plexctl relative to", *names[1:]]], [["median", *names]]
    for test, key, label in ROWS:
        values = [bench.median(name, test, key) for name in names]
        if any(value is not None for value in values):
            ratios.append([label] + [number(values[0], value) for value in values[1:]])
            medians.append([label] + [number(value) for value in values])
    return table(*ratios) + "\n" + table(*medians)


def startup_table(bench, labels):
    """Relative to a bare interpreter and to the other ways to post the same; then milliseconds."""
    took, rows = {label: bench.median(label, "startup", "ms") for label in labels}, []
    for label in labels:
        others = [label.replace("plexctl, whole run", other) for other in ("urllib.request script", "curl")]
        bases = [took[labels[0]]] + [took.get(other) if other != label else None for other in others]
        rows.append([label] + [number(took[label], base) for base in bases] + [number(took[label])])
    return table(["start-up", "x bare interpreter", "x urllib.request script", "x curl", "ms"], *rows)


def machine_line(bench, versions):
    """What was measured where."""
    model, options = platform.processor() or platform.machine(), bench.options
    if HAS_PROC:
        with open("/proc/cpuinfo") as file:
            model = (re.findall(r"model name\s*:\s*(.+)", file.read()) or [model])[0]
    python = "import platform as p; print(p.python_implementation(), p.python_version())"
    return "".join([
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({model}), ",
        f"{platform.system()} {platform.release()}: ",
        f"{output_of(options.python, options.plexctl, '--version')} on ",
        f"{output_of(options.python, '-c', python)}; ",
        f"{', '.join(versions)}; load generator in {'C' if options.lg else 'Python'}. ",
        f"Medians of {options.rounds} interleaved rounds of {options.seconds:g} s.\n"])


# --- Main ---------------------------------------------------------------------------------------------------

def find_forwarders(bench):
    """plexctl, direct, the peers that are installed, and those asked for; the peers' versions."""
    options, versions = bench.options, []
    plexctl = [options.python, options.plexctl, *TCP_FORWARD, "--proxy", "--local-addr", "127.0.0.1:{l}"]
    found = [Forwarder(bench, "plexctl", plexctl), Forwarder(bench, "direct", [])]
    for name, programs, flag, pattern, settings, command, files in PEERS:
        missing = [program for program in programs if not shutil.which(program)]
        if missing:
            bench.note(f"{name} not measured: no {', '.join(missing)} here")
            continue
        found.append(Forwarder(bench, name, shlex.split(command), files))
        version = re.findall(pattern, output_of(programs[0], flag))[:1]
        versions.append(" ".join([name, *version, settings.format(bench.threads)]).strip())
        if name == "nginx":
            folder = re.findall(r"--modules-path=(\S+)", output_of("nginx", "-V")) or [""]
            module = os.path.join(folder[0], "ngx_stream_module.so")    # else built in, or nginx will say so
            bench.nginx_module = f"load_module {module};" if os.path.exists(module) else ""
    found += [Forwarder(bench, name, shlex.split(command)) for name, command in options.forwarder]
    return found, versions


def run(bench):
    """Runs what was asked for and prints the report; returns the exit status."""
    options, (forwarders, versions) = bench.options, find_forwarders(bench)
    report, tests = [machine_line(bench, versions)], [test for test in options.tests if test in TESTS]
    for count in (1000, 5000)[:1 + options.full] if "mem" in options.tests else ():
        if not HAS_PROC or bench.limit < 2 * count + 500:
            bench.note(f"memory at {count} connections not measured: the descriptor limit is {bench.limit}")
            continue
        for forwarder in forwarders:
            if forwarder.command and forwarder.start():
                run_memory(bench, forwarder, count)
                forwarder.stop()
    started = [forwarder for forwarder in forwarders if tests and forwarder.start()]
    run_rounds(bench, started, tests)
    for forwarder in started:
        forwarder.stop()
    if tests or "mem" in options.tests:
        report.append(forwarder_tables(bench, [forwarder.name for forwarder in forwarders]))
    if "startup" in options.tests:
        report.append(startup_table(bench, run_startup(bench)))
    if options.soak and HAS_PROC and forwarders[0].start():
        report.append(run_soak(bench, forwarders[0]))
        forwarders[0].stop()
    print("\n".join(report + [f"- {note}" for note in bench.notes]))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": report[0], "notes": bench.notes, "results": bench.rows}, file)
    return int(any(row["err"] for row in bench.rows if row["name"].startswith("plexctl")))


def parse(argv):
    """The options. --startup and --soak without --tests leave out all else."""
    names = [*TESTS, "mem", "startup"]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=lambda text: text.split(","), help="of " + ",".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="5; start-up is measured four times as often")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each single measurement, 1.5")
    parser.add_argument("--full", action="store_true", help="5,000 idle connections and https too")
    parser.add_argument("--startup", action="store_true", help="the start-up table")
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS", help="mixed load on plexctl")
    parser.add_argument("--forwarder", action="append", default=[], metavar="NAME='COMMAND {l} {r}'",
                        help="one more forwarder, from local port {l} to port {r} on 127.0.0.1; repeatable")
    parser.add_argument("--lg", metavar="PATH", help="a compiled load generator")
    parser.add_argument("--python", metavar="PATH", default=sys.executable, help="interpreter for plexctl")
    parser.add_argument("--plexctl", metavar="PATH",
                        default=os.path.join(os.path.dirname(os.path.dirname(SELF)), "plexctl.py"))
    parser.add_argument("--json", metavar="FILE", help="all single results")
    options = parser.parse_args(argv)
    alone = ["startup"] * options.startup
    options.tests = (options.tests or []) + alone if options.tests or alone or options.soak else names
    options.forwarder = [text.partition("=")[::2] for text in options.forwarder]
    if not set(options.tests) <= set(names):
        parser.error("--tests takes " + ",".join(names))
    if not all(name and command for name, command in options.forwarder):
        parser.error("--forwarder takes NAME='COMMAND {l} {r}'")
    if options.rounds < 1 or options.seconds <= 0 or not os.path.exists(options.plexctl):
        parser.error(f"--rounds and --seconds must be positive, and {options.plexctl} must exist")
    return options


def interrupt(signum, frame):
    """Other signals end the run as Ctrl-C does. SIGALRM: a program of the start-up table hangs."""
    raise KeyboardInterrupt


def main(argv):
    """Returns the exit status."""
    if argv[:1] == ["_lg"]:
        result = LOADS[argv[1]](int(argv[2]), *argv[3:])
        return print(json.dumps(result)) if result else None
    options, scratch = parse(argv), tempfile.mkdtemp(prefix="bench-")
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(signum, interrupt)
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    try:
        return run(Bench(options, scratch))
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        for process in STARTED[::-1]:
            stop(process)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
