"""An invocation of plexctl.py in each of its modes, as torture.py and signals.py drive and judge it.

Each runs against a simulation of its own (test_plexctl.py): credentials from a token file, a config file or
the environment, one connection that exchanges bytes with an echo target. Python 3.9 or later, Linux.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import test_plexctl as simulator

MODES = ("print", "reveal", "proxy", "command", "stdio")
WORD = b"one line, there and back\n"
COMMAND_OK, COMMAND_RESET, COMMAND_FAILED = 7, 8, 9
CLIENT_SECONDS = 30
PULSE_SECONDS, STILL_SECONDS, ATTEMPTS = 0.2, 3, 5
CLIENT = """\
import os, socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), %d) as sock:
        sock.sendall(%r)
        answer = b""
        while len(answer) < %d:
            answer += sock.recv(100) or sys.exit(%d)
except ConnectionResetError:
    sys.exit(%d)
except OSError:
    sys.exit(%d)
sys.exit(%d)
""" % (CLIENT_SECONDS, WORD, len(WORD), COMMAND_FAILED, COMMAND_RESET, COMMAND_FAILED, COMMAND_OK)
TRACES = ("Traceback", "internal error", "Exception ignored", "Fatal Python error", "Exception in thread",
          "Segmentation", "core dumped")
TOTAL = re.compile(r"plexctl: \d+ connections?, .* up, .* down, ")
TOKEN_LINE = re.compile(r"PLEXCTL_SESSION_TOKEN=\S+\n")
BARE_NAME = re.compile(r"(^|[: ])[A-Za-z.]*(Error|Exception)$")


def echo_a_line(connection, _target):
    """The target: sends back what comes; a whole line ends it, and so the connection."""
    for data in simulator.chunks(connection):
        connection.sendall(data)
        if data.endswith(b"\n"):
            return


class Invocation:
    """One run of plexctl.py in one mode. `wrong` collects what is not as it should be."""

    def __init__(self, mode, plexctl, python=sys.executable):
        self.mode, self.plexctl, self.python = mode, plexctl, python
        self.simulation = simulator.Simulation(
            echo_a_line, endpoint_on={"proxy": "read", "reveal": "session"}.get(mode, "issue"))
        self.plane = self.simulation.plane
        self.scratch = tempfile.mkdtemp(prefix="plexctl-%s-" % mode)
        self.audit_log = os.path.join(self.scratch, "state", "plexctl", "audit.log")
        self.wrong, self.process, self.answer, self.client_end = [], None, b"", ""
        self.status, self.revocations = None, 1
        self.began = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *details):
        if self.process:
            self.process.close()
        self.simulation.__exit__()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # how it is called

    def command(self):
        """The command line."""
        args = ["tcp-forward", *simulator.REQUIRED_FLAGS]
        if self.mode in ("print", "command"):
            token_file = os.path.join(self.scratch, "token")
            args += ["--token-file", simulator.write_private(token_file, self.plane.bearer + "\n")]
        args += {"print": ["--output", "json"], "reveal": ["--reveal-secrets", "--output", "yaml"],
                 "proxy": ["--proxy", "--output", "json"], "stdio": ["--stdio"],
                 "command": ["--", self.python, "-I", "-S", "-c", CLIENT, "{host}", "{port}"]}[self.mode]
        return [self.python, "-I", self.plexctl, *args]

    def environment(self):
        """Its environment; in reveal mode the config file has everything."""
        given = {"HOME": self.scratch, "XDG_STATE_HOME": os.path.join(self.scratch, "state")}
        if self.mode == "reveal":
            profile = {"server": self.plane.url, "token": self.plane.bearer}
            simulator.write_config(self.scratch, {"default": "sim", "profiles": {"sim": profile}})
        else:
            given["PLEXSPHERE_URL"] = self.plane.url
        if self.mode in ("proxy", "stdio"):
            given["PLEXSPHERE_TOKEN"] = self.plane.bearer
        return simulator.clean_environment(given)

    # what its user does meanwhile

    def start(self, wrapper=(), **popen):
        """Start it."""
        if self.mode == "stdio":
            popen["stdin"] = subprocess.PIPE
        self.began = time.monotonic()
        self.process = simulator.Process([*wrapper, *self.command()], env=self.environment(), **popen)

    def use(self):
        """What a user does: one connection in proxy and stdio mode; returns at its end."""
        if self.mode == "proxy":
            self._use_proxy()
        elif self.mode == "stdio":
            self._use_stdio()

    def _use_proxy(self):
        try:
            address = json.loads(self.process.ready(seconds=CLIENT_SECONDS))["local_addr"]
        except (AssertionError, ValueError) as error:
            self.client_end = "not ready: %.200s" % error
            return
        try:
            with simulator.dial(address, CLIENT_SECONDS) as sock:
                sock.sendall(WORD)
                while len(self.answer) < len(WORD) and not self.client_end:
                    data = sock.recv(100)
                    self.answer += data
                    self.client_end = "" if data else "ended"
        except OSError as error:
            known = {socket.timeout: "hung", ConnectionResetError: "reset"}
            self.client_end = known.get(type(error), str(error))

    def _use_stdio(self):
        try:
            os.write(self.process.stdin.fileno(), WORD)
            self.process.wait_for(lambda: len(self.process.out) >= len(WORD)
                                  or self.process.poll() is not None, CLIENT_SECONDS)
            self.process.stdin.close()  # as ssh does once it has had its answer
        except OSError as error:
            self.client_end = str(error)
        except AssertionError:
            self.client_end = "hung"

    def await_request(self, seconds):
        """Wait for the first request to the control plane, or the end."""
        try:
            self.plane.wait_for(lambda: self.plane.requests or self.process.poll() is not None, seconds)
        except AssertionError:
            pass

    def finish(self, seconds):
        """Wait for its end; False, and killed, if it goes on."""
        try:
            self.process.finish(max(0.1, seconds))
        except AssertionError:
            self.process.kill()
            self.process.finish()
            self.wrong.append("hangs")
            return False
        finally:
            self.status = self.process.returncode
            if self.mode == "stdio":
                self.answer = self.process.out.encode()
            self.settle()
        return True

    def settle(self):
        """Give what the process sent right before its end the time to arrive."""
        deadline = time.monotonic() + 2
        while self.plane.active() and time.monotonic() < deadline and not self.is_kept():
            time.sleep(0.02)

    # what is judged

    def is_kept(self):
        """Whether a session may stay: print mode that came to its own end."""
        return self.status == 0 and self.mode in ("print", "reveal")

    def check(self, condition, text, *values):
        """Note what is wrong."""
        if not condition:
            self.wrong.append(text % values if values else text)

    def judge_streams(self):
        """No secret, nothing that Python wrote, one line each. Returns the lines that are errors."""
        out, err = self.process.out, self.process.err
        rest = TOKEN_LINE.sub("", err, count=1) if self.mode == "reveal" else err
        self.check(self.plane.bearer not in out + err, "the bearer token was shown")
        self.check(simulator.SESSION_TOKEN_MARK not in out + rest, "a session token was shown")
        for words in TRACES:
            self.check(words not in err, "%s on stderr", words)
        lines = rest.splitlines()
        strange = [line for line in lines if not line.startswith("plexctl: ")]
        self.check(not strange, "a line that is not plexctl's: %.80s", strange[:1])
        self.check(all(" " <= c <= "~" or c == "\n" for c in err), "stderr is not printable ASCII")
        if rest != err:
            self.check(self.has_record(), "the token was shown without an audit record")
        errors = [line for line in lines if line.startswith("plexctl: error: ")]
        for line in errors:
            self.check(not BARE_NAME.search(line), "an unclear line: %s", line)
        others = [line for line in lines if line not in errors and not TOTAL.match(line)
                  and not line.startswith(("plexctl: warning: ", "plexctl: waiting for the Node"))]
        self.check(not others, "a line that is neither an error nor a warning: %s", others[:1])
        return errors

    def has_record(self):
        """Whether the audit log has a record of a session that was issued."""
        try:
            with open(self.audit_log) as stream:
                record = json.loads(stream.read().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return False
        return record.get("session_id") in self.plane.issued

    def judge_sessions(self):
        """Each session that was issued is revoked once, or kept by print mode, or somebody was told."""
        err = self.process.err
        asked = [request.ids[1] for request in self.plane.requests if request.operation == "revoke"]
        for session_id in self.plane.issued:
            times = asked.count(session_id)
            if self.is_kept():
                self.check(times == 0, "a session in use was revoked")
            elif session_id not in self.plane.revoked:
                told = "session %s is not revoked" % session_id in err or "session may" in err
                self.check(told, "a session was left without a word")
            else:
                # an answer that was lost is asked for again
                self.check(1 <= times <= self.revocations, "a session was revoked %d times", times)

    def judge_document(self):
        """What is on stdout in print mode is whole, or nothing."""
        out = self.process.out
        if self.mode in ("command", "stdio") or not out:
            return
        try:
            document = simulator.parse_document(out, "yaml" if self.mode == "reveal" else "json")
            self.check(document["session_id"] in self.plane.issued, "another session in the document")
        except (ValueError, LookupError, AssertionError):
            self.check(False, "half a document on stdout: %.80r", out)

    def story(self):
        """What is to be known of a failure."""
        return "status %s, client %r %s, issued %d, revoked %d\nstdout %r\nstderr %r" % (
            self.status, self.answer, self.client_end, len(self.plane.issued), len(self.plane.revoked),
            self.process.out[:500], self.process.err[:3000])


def create_parser(description, case):
    """What both programs take; `case` names the parts of one case."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--plexctl", type=os.path.abspath, default=simulator.PLEXCTL)
    parser.add_argument("--sample", type=float, default=1.0, metavar="FRACTION")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--case", metavar=case, help="this one alone, and its story")
    return parser


def default_signals():
    """A child is not to inherit what a shell's background job ignores."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def run_one(work, text):
    """A case that is named on the command line: its story. Whether it failed."""
    wrong, kind, story = work(tuple(int(word) if word.isdigit() else word for word in text.split(":")))
    print("%s\n%s\n%s" % (kind, story, wrong or "as it should be"))
    return wrong is not None


def run_all(cases, work, options, again):
    """work(case) for each case, in so many processes: (None or what is wrong, its kind, its story).

    Prints what failed, and `again`, the command that repeats it. Returns the number of each kind, and whether
    any failed."""
    kinds, failures, began = collections.Counter(), collections.defaultdict(list), time.monotonic()
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for case, (wrong, kind, story) in pool.imap_unordered(
                functools.partial(_call, work), cases, chunksize=4):
            kinds[kind] += 1
            if wrong:
                failures[re.sub(r"0x[0-9a-f]+|\d+", "N", wrong)[:150]].append((case, story))
    for wrong, group in sorted(failures.items(), key=lambda item: -len(item[1])):
        print("\n%d x %s" % (len(group), wrong))
        for case, story in group[:4]:
            print("  %s --case %s\n    %s" % (again, ":".join(map(str, case)), story.replace("\n", "\n    ")))
    print("%d failed of %d, %.0f s, seed %d" % (sum(map(len, failures.values())), len(cases),
                                                time.monotonic() - began, options.seed))
    return kinds, bool(failures)


def _call(work, case):
    """work(case), again where the machine was halted meanwhile: that says nothing of plexctl."""
    for _ in range(ATTEMPTS):
        pulse = Pulse()
        result = work(case)
        if pulse.end() < STILL_SECONDS:
            break
    return case, result


class Pulse(threading.Thread):
    """For how long, at most, this process has stood still."""

    def __init__(self):
        super().__init__(daemon=True)
        self._longest, self._is_over = 0.0, threading.Event()
        self.start()

    def run(self):
        is_over = False
        while not is_over:
            began = time.monotonic()
            is_over = self._is_over.wait(PULSE_SECONDS)
            self._longest = max(self._longest, time.monotonic() - began)

    def end(self):
        self._is_over.set()
        self.join()
        return self._longest
