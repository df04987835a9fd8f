#!/usr/bin/env python3
"""Command lines, secret files and answers of a control plane, most of them with one thing wrong.

    .ci/venv/bin/pip install pytest hypothesis
    .ci/venv/bin/python .ci/fuzz.py                                  10,000 of each, about ten minutes
    .ci/venv/bin/python .ci/fuzz.py --examples 300 --part answers    300 answers

hypothesis makes the examples, and shrinks one that fails to its smallest form. Failures are kept in
.ci/.hypothesis, and tried first by the next run.

plexctl.py is loaded as a module: main() and the public control-plane client are called, against a raw socket
server on loopback that sends prepared bytes. What must come out is known for most examples, since they are
put together from what is good and at most one thing that is not; for soups and torn bytes it is the contract
alone. In every case: an exit code of the contract; on failure one line `plexctl: error:` of printable ASCII
and nothing on stdout, on success the right document; no traceback, no secret, also not in an exception's
chain; no session left without a word. Linux, Python 3.9 or later.
"""

import argparse
import contextlib
import email.utils
import errno
import faulthandler
import hashlib
import importlib.util
import io
import json
import os
import re
import select
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid

import hypothesis
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import test_plexctl as simulator

EXAMPLES = 10000
CONTRACT = {0, 1, 2, 3, 4, 77, 126, 127}
HANG_SECONDS = 45
RESET = object()
PLANE_NAME = "plane.example"  # resolves to the server here, so that it is not a loopback one by name
AUDIT = "PLEXCTL_AUDIT_LOG"


def check(condition, text, *values):
    """What plexctl did is what it should have done."""
    if not condition:
        raise AssertionError(text % values if values else text)


class Draw:
    """What hypothesis decides, in short words. The first option is the one that it shrinks to."""

    def __init__(self, data):
        self.draw = data.draw

    def one(self, options):
        """One of them."""
        return self.draw(st.sampled_from(list(options)))

    def number(self, low, high):
        """A whole number in that range."""
        return self.draw(st.integers(low, high))

    def chance(self, percent):
        """True so often."""
        return self.number(0, 99) >= 100 - percent

    def some(self, options, low=0, high=None):
        """Some of them, each once, in any order."""
        return self.draw(st.lists(st.sampled_from(list(options)), unique=True, min_size=low, max_size=high))

    def words(self, options, high):
        """Up to so many of them, also several times."""
        return self.draw(st.lists(st.sampled_from(options), max_size=high))

    def text(self, high=40):
        """Any text."""
        return self.draw(st.text(max_size=high))

    def bytes(self, low=0, high=80):
        """Any bytes."""
        return self.draw(st.binary(min_size=low, max_size=high))

    def spoil(self, raw):
        """The same bytes, up to four of them changed."""
        changed = bytearray(raw)
        for at, byte in self.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)),
                                           min_size=1, max_size=4)):
            changed[at] = byte
        return bytes(changed)


def stay_on_loopback(event, arguments):
    """An audit hook: nothing of this leaves the machine."""
    if event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
        host = arguments[1][0]
        host = host.decode("latin-1") if isinstance(host, bytes) else host
        if not host.startswith("127.") and host not in ("::1", "localhost"):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


def know_names(real):
    """getaddrinfo that has PLANE_NAME and *.localhost here, every other name elsewhere, and asks no one.

    Whether a host's resolver knows a.localhost is its own affair.
    """
    def getaddrinfo(host, *more, **named):
        name = host.decode("latin-1") if isinstance(host, bytes) else host
        last = name.strip(".").rpartition(".")[2] if name and ":" not in name else ""
        if name == PLANE_NAME or last.lower() == "localhost":
            name = "127.0.0.1"
        elif last[:1].isalpha():
            name = "192.0.2.7"
        return real(name, *more, **named)
    return getaddrinfo


def load(path):
    """The plexctl.py of that path, as the module plexctl."""
    spec = importlib.util.spec_from_file_location("plexctl", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plexctl"] = module
    spec.loader.exec_module(module)
    return module


# ---- the server: one connection after another, prepared bytes ---------------------------------------------

class Server:
    """A raw server. `reply(method, path, headers, body)` gives a list of bytes, RESET or seconds to stall."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.socket.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port
        self.seen, self.reply = [], None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection = self.socket.accept()[0]
            try:
                connection.settimeout(5)
                self._answer(connection)
            except (OSError, ValueError):
                pass
            finally:
                connection.close()

    def _answer(self, connection):
        raw = b""
        while b"\r\n\r\n" not in raw:
            piece = connection.recv(65536)
            if not piece:
                return
            raw += piece
        head, _, body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, path = lines[0].split(" ")[:2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":")
                                                                      for line in lines[1:])}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536) or b"\n" * 10 ** 6
        self.seen.append((method, path, headers, body))
        for step in self.reply(method, path, headers, body):
            if step is RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if isinstance(step, bytes):
                connection.sendall(step)
            else:  # until the client has given up
                select.select([connection], [], [], step)
        connection.shutdown(socket.SHUT_WR)
        select.select([connection], [], [], 0.2)

    def operations(self):
        """What was asked for: issue, get, revoke, in order."""
        return [simulator.route(method, path)[0] for method, path, _, _ in self.seen]


def http_answer(status, document=None, headers=(), raw=None):
    """The bytes of an ordinary answer."""
    body = raw if raw is not None else b"" if document is None else json.dumps(document).encode()
    lines = ["HTTP/1.1 %d Word" % status, "Content-Type: application/json", "Connection: close"]
    lines += ["Content-Length: %d" % len(body)] if status != 204 else []
    lines += ["%s: %s" % item for item in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def issued(draw, session_id, token, endpoint="127.0.0.1:40213"):
    """A good IssuedSession, with the endpoint in one of the two places."""
    now = time.time()
    session = {
        "id": session_id, "project_id": simulator.PROJECT_ID, "domain_id": simulator.DOMAIN_ID,
        "resource_id": simulator.RESOURCE_ID, "identity_id": simulator.IDENTITY_ID, "kind": "tcp",
        "status": "active", "issued_at": simulator.stamp(now), "expires_at": simulator.stamp(now + 1800),
        "last_active_at": simulator.stamp(now), "idle_timeout_seconds": 900,
        "target": {"tcp": {"host": simulator.HOST, "port": simulator.PORT}}}
    document = {"session_id": session_id, "token": token, "expires_at": simulator.stamp(now + 1800),
                "session": session}
    draw.one((document, session))["listener_endpoint"] = endpoint
    return document


# ---- what every run of main() must keep to ----------------------------------------------------------------

class Bench:
    """The module, a scratch directory, the server; one case at a time."""

    def __init__(self, module, scratch):
        self.plexctl, self.scratch, self.server = module, scratch, Server()
        self.audit_log = os.path.join(scratch, "audit.log")
        self.begin()

    def environment(self, **more):
        environ = {"HOME": self.scratch, "PATH": os.defpath, AUDIT: self.audit_log,
                   "XDG_CONFIG_HOME": os.path.join(self.scratch, "config")}
        environ.update(more)
        return {name: value for name, value in environ.items() if value is not None}

    def begin(self):
        """Forget the example before this one; the same tokens and ids again, so that it can be repeated."""
        self.secrets, self.said, self.made = [], "", 0
        self.server.seen = []

    def secret(self, prefix="psk_", length=24):
        """A token that no stream may show, not even eight characters of it."""
        self.made += 1
        self.secrets.append(prefix + hashlib.sha256(b"%d" % self.made).hexdigest()[:length])
        return self.secrets[-1]

    def new_uuid(self):
        """An id."""
        self.made += 1
        return str(uuid.UUID(int=self.made << 64 | 0x8000 << 48 | self.made))

    def leaks(self, text):
        return any(token[at:at + 8] in text for token in self.secrets for at in range(4, len(token) - 7))

    def main(self, argv, environ):
        """main() as a command would be: exit code, stdout, stderr; checked against the contract."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.plexctl.main(argv, environ)
            except BaseException as error:
                raise AssertionError("main raised %s" % type(error).__name__) from error
        out, err = out.getvalue(), err.getvalue()
        self.said = "exit %s\nstdout %r\nstderr %r" % (code, out, err)
        check(code in CONTRACT, "exit code %s is not in the contract", code)
        shown = [line for line in err.splitlines() if line.startswith("PLEXCTL_SESSION_TOKEN=")]
        rest = "".join(line + "\n" for line in err.splitlines() if line not in shown)
        check(len(shown) <= 1, "two tokens revealed")
        check(not self.leaks(out + rest), "a secret was shown")
        check(all(" " <= c <= "~" or c == "\n" for c in out + err), "what is printed is not printable ASCII")
        lines = rest.splitlines()
        check(all(line.startswith("plexctl: ") and len(line) > 12 for line in lines),
              "a line without plexctl:")
        check("Traceback" not in err and "internal error" not in err, "a defect is reported")
        errors = [line for line in lines if line.startswith("plexctl: error: ")]
        check(len(errors) == (code != 0), "%d error lines with exit code %d", len(errors), code)
        if code:
            check(not out, "something on stdout with exit code %d", code)
        if code == 2:
            check(len(lines) == 1, "a usage error is more than one line")
        return code, out, err

    def check_document(self, out, output, session_id, endpoint="127.0.0.1:40213", host=simulator.HOST,
                       port=simulator.PORT):
        document = simulator.parse_document(out, output)
        check(document["session_id"] == session_id, "another session id in the document")
        check(document["listener_endpoint"] == endpoint, "another endpoint in the document")
        document["target"]["host"] = document["target"]["host"].strip("[]")  # text has it as host:port
        check(document["target"] == {"host": host, "port": port}, "another target in the document")
        return document

    def check_sessions(self, code, err, session_id):
        """No session left without a word: in use, revoked once, or a line about it."""
        operations = self.server.operations()
        if code == 0:
            check("revoke" not in operations, "a session in use was revoked")
        elif session_id and "issue" in operations:
            known = [path for _, path, _, _ in self.server.seen if session_id in path
                     and path.endswith("/revoke")]
            check(len(known) == 1 or not known and "may exist" in err,
                  "%d revocations of the session, and no word of it", len(known))


# ---- command lines ----------------------------------------------------------------------------------------

UUID_GOOD = [simulator.PROJECT_ID, simulator.PROJECT_ID.upper(), "00000000-0000-0000-0000-000000000000"]
UUID_BAD = ["", "x", "{%s}" % UUID_GOOD[0], "urn:uuid:" + UUID_GOOD[0], UUID_GOOD[0] + "0", UUID_GOOD[0][:-1],
            UUID_GOOD[0].replace("-", ""), " " + UUID_GOOD[0], UUID_GOOD[0] + "\n", UUID_GOOD[0].replace("0",
                                                                                                         "g"),
            "0190a8b-8a0c0-7a0a-8a0a-a0a0a0a0a0c0", UUID_GOOD[0].replace("8", "\u0668"), "\x1b[31m"]
NUMBER_BAD = ["", "1_000", " 5", "5 ", "+5", "\u0665", "1e3", "0x10", "five", "1.5.", "9" * 30, "\x00", "\n",
              "--", "1,5"]
LOCAL_BAD = ["", "127.0.0.1", ":0", "127.0.0.1:65536", "127.0.0.1:-1", "::1:0", "[::1]", "example.com:0",
             "127.1:0", "0:0", "[127.0.0.1]:0", "unix:", "unix:relative", "unix:/" + "x" * 120, "unix:/a\nb",
             "127.0.0.1:1_0", "010.0.0.1:0", "tcp:127.0.0.1:0", "127.0.0.1:0 ", "[::1%lo]:0"]
SERVER_HTTP = ["http://example.com", "http://128.0.0.1"]  # which --allow-http permits
SERVER_BAD = SERVER_HTTP + [
    "ftp://127.0.0.1", "127.0.0.1", "http://", "https://", "http://u:p@127.0.0.1", "https://a.example/?q",
    "https://a.example/#f", "https://a example", "https://a\\b", "https://a.example:0", "//127.0.0.1",
    "https://a.example:65536", "https://a.example:x", "https://[::1", "https://\x1b[31m",
    "file:///etc/passwd",
    "https://127.1", "https://-a.example", "https://a..example", "https://\u00e4.example",
    "https://a.example:80:80"]
SWITCHES = ["--allow-http", "--reveal-secrets", "--yes", "--proxy", "--stdio", "--renew", "--keep-session",
            "--allow-other-users"]
REQUIRED = ["--project-id", "--resource-id", "--host", "--port"]
GOOD = {
    "--project-id": UUID_GOOD, "--resource-id": UUID_GOOD,
    "--host": ["10.0.0.5", "db.internal", "fd00::5", "x" * 200, "a_b", "1"],
    "--port": ["1", "5432", "65535", "080"], "--ttl-seconds": ["0", "1", "1800", "000"],
    "--local-addr": ["127.0.0.1:0", "[::1]:0", "localhost:0", "127.0.0.2:0"],
    "--output": ["text", "json", "yaml"], "--wait-seconds": ["0", "0.0", "1.5", "90"],
    "--max-sessions": ["2", "4", "32"], "--min-sessions": ["1", "2"]}
BAD = {
    "--project-id": UUID_BAD, "--resource-id": UUID_BAD, "--local-addr": LOCAL_BAD, "--server": SERVER_BAD,
    "--host": ["", " ", "\t", "a b", "a\nb", "\x1b[31m", "x" * 254, "h:80", "\u2028"],
    "--port": ["0", "65536", "-1"] + NUMBER_BAD, "--ttl-seconds": ["-1"] + NUMBER_BAD,
    "--output": ["", "xml", "JSON", "text ", "tex"],
    "--wait-seconds": ["-1", "inf", "nan", "1e3", ".5", "5."] + NUMBER_BAD,
    "--max-sessions": ["0", "33", "-1"] + NUMBER_BAD, "--min-sessions": ["0", "33", "-1"] + NUMBER_BAD}
STRANGE_FLAGS = ["--token", "--reveal", "--prox", "--project", "--bearer", "--portt", "--hosts", "-x", "-p",
                 "---", "--Port", "--reveal_secrets", "--\x1b[31m", "-\u00e9", "--ttl", "--password",
                 "--no-proxy", "-V", "--v"]
TOGETHER = {  # what cannot stand together, by the mode that it would be
    "print": [["--renew"], ["--keep-session"], ["--allow-other-users"], ["--max-sessions=2"],
              ["--local-addr=unix:/tmp/s"], ["--min-sessions=1"]],
    "": [["--proxy", "--stdio"], ["--stdio", "--local-addr=127.0.0.1:0"], ["--stdio", "--renew"],
         ["--stdio", "--max-sessions=2"], ["--stdio", "--allow-other-users"], ["--stdio", "--token-file=-"],
         ["--proxy", "--max-sessions=2", "--min-sessions=3"]]}


def spell(draw, flag, value):
    """A flag as one word or two; a value that starts with a hyphen needs the first way."""
    if flag in SWITCHES:
        return [flag] if value and draw.chance(60) else ["%s=%s" % (flag, "true" if value else "false")]
    if value.startswith("-") or draw.chance(50):
        return ["%s=%s" % (flag, value)]
    return [flag, value]


def made_line(bench, draw):
    """A command line put together, and the exit codes that it may have, given one thing wrong at most."""
    mode = draw.one(("print", "print", "print", "--proxy", "--stdio", "command"))
    values = {flag: draw.one(GOOD[flag]) for flag in REQUIRED}
    optional = ["--ttl-seconds", "--wait-seconds", "--output", "--yes", "--allow-http", "--reveal-secrets",
                "-v"]
    optional += ["--keep-session"] * (mode != "print") + ["--local-addr"] * (mode != "--stdio")
    optional += ["--max-sessions", "--renew", "--allow-other-users"] * (mode in ("--proxy", "command"))
    for flag in draw.some(optional, high=len(optional) // 2):
        values[flag] = True if flag in SWITCHES or flag == "-v" else draw.one(GOOD[flag])
    if "--max-sessions" in values and draw.chance(40):
        values["--min-sessions"] = draw.one(GOOD["--min-sessions"])
    if mode in SWITCHES:
        values[mode] = True
    command = ["true", "{host}", "--proxy", "-h"] if mode == "command" else None
    wanted, wrong, after, extra, name = {0 if mode == "print" else 4}, "nothing", [], [], ["tcp-forward"]
    if draw.chance(70):
        wanted, wrong = {2}, draw.one(("value", "value", "value", "missing", "unknown", "together",
                                       "credentials",
                                       "command", "positional", "switch", "no command"))
    if wrong == "value":
        flag = draw.one(sorted(flag for flag in BAD if mode != "print" or "-sessions" not in flag))
        values[flag] = draw.one(BAD[flag])
        if values.get("--allow-http") and values.get("--server") in SERVER_HTTP:
            wanted = {1}  # it may be asked then, but cannot be reached
    elif wrong == "missing":
        del values[draw.one(REQUIRED)]
    elif wrong == "unknown":
        flag = draw.one(STRANGE_FLAGS)
        extra = [draw.one([[flag], [flag + "=" + bench.secret()], [flag, bench.secret()]])]
    elif wrong == "together":
        values = {flag: values[flag] for flag in values if mode != "print" and flag not in (
            "--proxy", "--stdio", "--renew", "--allow-other-users", "--local-addr", "--max-sessions",
            "--min-sessions") or flag in REQUIRED}
        command, after = None, [draw.one(TOGETHER["print" if mode == "print" else ""])]
    elif wrong == "credentials":
        extra, wanted = draw.one((([["--token-file", os.path.join(bench.scratch, "absent")]], {3}),
                                  ([["--token-file", bench.scratch]], {3}), ([["--token-file", "/dev/full"]],
                                                                             {3}),
                                  ([["--profile", "absent"]], {3}), ([["--profile=\x1b[31m"]], {3}),
                                  ([["--token-file=a\0b"]], {2, 3}), ([["--profile", ""]], {2, 3})))
    elif wrong == "command":
        command, wanted = draw.one((([], {2}), ([""], {2, 127}), (["/nonexistent/program"], {127}),
                                    (["no-such-program\x1b"], {127}), (["/etc/passwd"], {126}), (["/"],
                                                                                                 {126})))
        values = {flag: values[flag] for flag in values if flag not in ("--proxy", "--stdio")}
    elif wrong == "positional":
        after = [[draw.one(("tcp-forward", bench.secret(), "\x1b[31m", "true", "10.0.0.5:22"))]]
    elif wrong == "switch":
        value = draw.one(("", "1", "yes", "True", " true", "truefalse", bench.secret()))
        after = [[draw.one(SWITCHES) + "=" + value]]
    elif wrong == "no command":
        name = draw.one(([],
                         [draw.one(("tcp-forwards", "", "forward", "TCP-FORWARD", bench.secret(),
                                    "\x1b[31m"))]))
    before = []
    for flag, value in draw.draw(st.permutations(list(values.items()))):
        words = [draw.one(("-v", "-vv", "--verbose"))] if flag == "-v" else spell(draw, flag, value)
        (before if draw.chance(30) else after).append(words)
        if flag in GOOD and wrong in ("nothing", "unknown") and draw.chance(5):  # the last one wins
            before.insert(0, spell(draw, flag, draw.one(GOOD[flag])))
    (before if draw.chance(50) else after).extend(extra)
    argv = [word for words in before for word in words] + name + [word for words in after for word in words]
    return argv + ([] if command is None else ["--"] + command), mode, values, wanted, wrong


def soup(bench, draw):
    """Words that belong, and some that do not, in any order."""
    pool = ["tcp-forward", "--", "-h", "--help", "--version", "-v", "-vvv", "true", "=", "--=", "-", "{host}",
            bench.secret(), "--token=" + bench.secret(), "\x1b]0;x\x07", "\udcff", "\u202e", "a" * 5000]
    for flag, values in GOOD.items():
        pool += [flag, flag + "=" + values[0], values[-1], flag + "=" + draw.one(BAD[flag])]
    pool += SWITCHES + STRANGE_FLAGS + [flag + "=false" for flag in SWITCHES]
    argv = draw.words(pool, 14)
    if draw.chance(50):
        argv = ["tcp-forward"] + simulator.REQUIRED_FLAGS + argv
    if argv and draw.chance(50):  # something within a word
        at = draw.number(0, len(argv) - 1)
        cut = draw.number(0, len(argv[at]))
        argv[at] = argv[at][:cut] + draw.text(3) + argv[at][cut + draw.number(0, 1):]
    return argv


def fuzz_line(bench, draw):
    """main() with a command line. A mode that would stay is refused by the server, with 403."""
    session_id, token = bench.new_uuid(), bench.secret("eyJ.")
    document, problem = issued(draw, session_id, token), {"code": "no", "title": "no", "status": 403}
    if draw.chance(25):
        argv, mode, values, wanted, wrong = soup(bench, draw), None, {}, CONTRACT, "soup"
        keeps = not {"--proxy", "--stdio", "--"} & {word.partition("=")[0] for word in argv}
    else:
        argv, mode, values, wanted, wrong = made_line(bench, draw)
        keeps = mode == "print"

    def reply(method, path, headers, body):
        if path.endswith("/revoke"):
            return [http_answer(204)]
        if method == "POST" and keeps:
            return [http_answer(201, document)]
        return [http_answer(403, problem)]

    bench.server.reply = reply
    bench.said = repr(argv)
    environ = bench.environment(PLEXSPHERE_URL=bench.server.url, PLEXSPHERE_TOKEN=bench.secret())
    code, out, err = bench.main(argv, environ)
    bench.said = "argv %r (wrong: %s, expected %s)\n%s" % (argv, wrong, sorted(wanted), bench.said)
    check(code in wanted, "exit code %d, not %s", code, sorted(wanted))
    if code == 2:
        check(not bench.server.seen, "a request was sent for a command line that is wrong")
    if wrong == "soup":
        return
    bench.check_sessions(code, err, session_id if keeps else None)
    asked = [json.loads(body) for method, path, _, body in bench.server.seen
             if simulator.route(method, path)[0] == "issue"]
    for body in asked:
        tcp = {"host": values["--host"], "port": int(values["--port"])}
        check(body["target"] == {"tcp": tcp}, "asked for another target: %s", body["target"])
        check(body["resource_id"] == values["--resource-id"].lower(), "asked for another Resource")
        ttl = int(values.get("--ttl-seconds", 0))
        check(body.get("requested_ttl_seconds", 0) == ttl and ("requested_ttl_seconds" in body) == (ttl > 0),
              "asked for another TTL")
    if code == 0:
        bench.check_document(out, values.get("--output", "text"), session_id, host=values["--host"],
                             port=int(values["--port"]))
        check(("PLEXCTL_SESSION_TOKEN=%s\n" % token in err) == bool(values.get("--reveal-secrets")),
              "the token was shown, and nobody asked, or the other way round")


# ---- token and config files -------------------------------------------------------------------------------

def is_token(raw):
    """What SPEC section 2 says of a token."""
    kept = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1] if raw.endswith(b"\n") else raw
    return kept if 1 <= len(kept) <= 8192 and all(0x21 <= each <= 0x7E for each in kept) else None


def token_bytes(bench, draw):
    """The bytes of a token file, most of them not good."""
    token = bench.secret().encode()
    kind = draw.one(("after", "after", "before", "within", "length", "any", "utf-16"))
    if kind == "after":
        return token + draw.one((b"", b"\n", b"\r\n", b"\n\n", b" ", b"\t", b"\x1c", b"\x85", b"\xa0", b"\r",
                                 b"\0",
                                 b"\x7f", b"\xe2\x80\xa8", b"\nX: y", b"\n" + token))
    if kind == "before":
        return draw.one((b" ", b"\xef\xbb\xbf", b"\n", b"Bearer ")) + token
    if kind == "within":
        return token[:8] + draw.bytes(1, 1) + token[8:]
    if kind == "length":
        return (token * 5000)[:draw.one((0, 1, 8191, 8192, 8193, 65535, 65536, 65537, 140000))]
    return draw.bytes() if kind == "any" else token.decode().encode("utf-16")


def write_file(draw, path, raw, mode, kind):
    """A file, or something in its place. Returns whether it is good, as far as it is not about its bytes."""
    if kind == "directory":
        os.mkdir(path, 0o700)
        return False
    if kind == "fifo":
        os.mkfifo(path, 0o600)
        return False  # nobody writes: empty
    if kind == "device":
        os.symlink("/dev/zero", path)
        return False
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
        return False
    if kind == "absent":
        return False
    where = path
    if kind == "link":
        where = path + ".real"
        os.symlink(where, path)
    with open(os.open(where, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
        stream.write(raw)
    os.chmod(where, mode)
    if kind == "stranger" and os.geteuid() == 0:
        os.chown(where, 12345, 12345)
        return False
    return not mode & 0o077


def config_document(bench, draw, url):
    """A config file's document, what is wrong with it, and the token of its default profile."""
    token = bench.secret()
    document = {"default": "prod", "profiles": {"prod": {"server": url, "token": token},
                                                "other": {"server": "https://o.example",
                                                          "token": bench.secret()}}}
    wrong = draw.one(("nothing", "nothing", "top", "profiles", "entry", "field", "extra", "default", "token",
                      "server", "no token", "no server", "bytes", "syntax", "origin"))
    strange = draw.one((None, 1, True, [], "x", {}, [token], {"a": token}, 1e308, ""))
    raw = None
    if wrong == "top":
        document = draw.one((None, 1, [document], token, [], {"profiles": None}, {"default": "prod"}))
    elif wrong == "profiles":
        document["profiles"] = strange if strange != {} else []
    elif wrong == "entry":
        document["profiles"]["prod"] = strange if not isinstance(strange, dict) else [token]
    elif wrong == "field":
        document["profiles"]["prod"][draw.one(("server", "token"))] = 5 if isinstance(strange,
                                                                                      str) else strange
    elif wrong == "extra":
        where = draw.one((document, document["profiles"]["prod"]))
        where[draw.one(("tokens", "url", "", "Token"))] = token
    elif wrong == "default":
        document["default"] = draw.one(("absent", "\x1b[31m", "Prod", 5, None, [], token))
    elif wrong == "token":
        document["profiles"]["prod"]["token"] = draw.one((
            "", " ", token + " ", token + "\r\nX: y", "\u00e9" + token, (token * 900)[:8193], "\0" + token))
    elif wrong == "server":
        document["profiles"]["prod"]["server"] = draw.one(SERVER_BAD)
    elif wrong in ("no token", "no server"):
        del document["profiles"]["prod"][wrong[3:]]
    elif wrong == "origin":
        document["profiles"]["prod"]["server"] = draw.one(("http://127.0.0.2:1", "https://127.0.0.1"))
    text = json.dumps(document)
    if wrong == "syntax":
        raw = draw.one((
            text[:draw.number(0, len(text) - 1)], text + "x", text.replace(token,
                                                                           "\\ud800"), "", " ", "//" + text,
            text.replace('"default"', '"default": "prod", "default"', 1), text.replace('"', "'"), "[" * 30000,
            text.replace('"prod": {', '"prod": NaN, "x": {'), text.replace("}", ",}"),
            '{"default": "prod", "profiles": {"prod": ' + "1" * 5000 + "}}")).encode()
    elif wrong == "bytes":
        raw = draw.one((draw.spoil(text.encode()), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"),
                        text.encode() + b"\xff"))
    return token, raw if raw is not None else text.encode(), wrong


def fuzz_file(bench, draw):
    """main() with a token or config file. The server refuses with 403, and sees the token or nothing."""
    for path in os.listdir(bench.scratch):
        path = os.path.join(bench.scratch, path)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    bench.server.reply = lambda *request: [http_answer(403, {"code": "no", "title": "no"})]
    mode = draw.one((0o600,) * 8 + (0o400, 0o640, 0o604, 0o660, 0o666, 0o610, 0o700, 0o644))
    kind = draw.one(("file",) * 12 + ("link", "directory", "fifo", "device", "socket", "absent",
                                        "stranger"))
    argv = ["tcp-forward"] + simulator.REQUIRED_FLAGS
    if draw.chance(40):
        raw = token_bytes(bench, draw)
        path = os.path.join(bench.scratch, draw.one(("token", "t\u00e9", "a b", "x\x1b[31m", "-")))
        good = write_file(draw, path, raw, mode, kind)
        wanted = {4} if good and is_token(raw) else {3}
        expected, what = is_token(raw), "token file, %s, mode %o: %r" % (kind, mode, raw[:200])
        argv += ["--token-file", path]
        environ = bench.environment(PLEXSPHERE_URL=bench.server.url)
    else:
        token, raw, wrong = config_document(bench, draw, bench.server.url)
        os.makedirs(os.path.join(bench.scratch, "config", "plexctl"))
        good = write_file(draw, os.path.join(bench.scratch, "config", "plexctl", "config.json"), raw, mode,
                          kind)
        expected, what = token.encode(), "config file, wrong: %s, %s, mode %o: %r" % (wrong, kind, mode,
                                                                                      raw[:300])
        wanted = {"nothing": {4}, "no token": {3}, "no server": {2}, "server": {2},
                  "bytes": CONTRACT - {0}}.get(wrong, {3})
        if wrong == "origin":
            argv += ["--server", bench.server.url]
        given = draw.chance(30)
        if given:
            argv += ["--profile", "prod"]
            wanted = CONTRACT - {0} if wrong == "default" else wanted
        if kind == "absent":
            wanted = {3} if given or wrong == "origin" else {2}
        elif not good:
            wanted = {3}
        # a default of null or of another type is a shape of its own; without one there is no server
        wanted = wanted | {2} if wrong in ("default", "top", "syntax") and good else wanted
        environ = bench.environment()
    bench.said = what
    code, _out, _err = bench.main(argv, environ)
    bench.said = "%s (expected %s)\n%s" % (what, sorted(wanted), bench.said)
    check(code in wanted, "exit code %d, not %s", code, sorted(wanted))
    if code != 4:
        check(not bench.server.seen or code == 1, "a request was sent all the same")
    elif len(wanted) == 1:
        sent = bench.server.seen[0][2].get("authorization")
        check(sent == "Bearer " + expected.decode(), "another token was sent")


# ---- answers ----------------------------------------------------------------------------------------------

TIME_GOOD = ["2099-05-02T10:30:00Z", "2099-05-02t10:30:00z", "2099-05-02T10:30:00.123456789Z",
             "2099-05-02T10:30:60Z", "2099-05-02T10:30:00+05:30", "2099-05-02T10:30:00-00:00",
             "2001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"]
TIME_BAD = ["", "2099-05-02 10:30:00Z", "2099-05-02T10:30:00", "2099-13-02T10:30:00Z",
            "2099-02-30T10:30:00Z", "2099-05-02T24:00:00Z", "2099-05-02T10:30:00.1234567890Z",
            "2099-05-02T10:30:00+24:00", "2099-05-02T10:30Z", "0000-05-02T10:30:00Z", "2099-5-2T10:30:00Z",
            "tomorrow", "\u0662\u0660\u0669\u0669-05-02T10:30:00Z", "2099-05-02T10:30:00Z\n",
            " 2099-05-02T10:30:00Z", "99999-05-02T10:30:00Z", "2099-05-02T10:30:00.Z"]
ENDPOINT_GOOD = ["100.64.0.12:40213", "node.example:1", "[2001:db8::1]:65535", "[fd00::1]:80", "n-1.a:5",
                 "8.8.8.8:053"]
ENDPOINT_BAD = ["", "host", ":80", "host:", "host:0", "host:65536", "host:117925", "host:-1", "1.2.3:80",
                "127.1:80", "0:80", "2130706433:80", "010.0.0.1:80", "0x7f.0.0.1:80", "::1:80", "[::1",
                "[host]:80", "a b:80", "a\nb:80", "h\u00f6st:80", "host:8\u0660", "host:80/",
                "tcp://host:80", "u@host:80", "host:80:80", "[fe80::1%lo]:80", "-a:80", "a-:80", "a..b:80",
                "x" * 64 + ":80", "a:1e3", "a: 80", "a:+80", "\x1b[31m:80", "[1.2.3.4]:80", "1.2.3.4.5:80",
                "256.1.1.1:80", "/run/sock:80", "a%2e:80"]
ENDPOINT_NEAR = ["127.0.0.1:80", "127.9.9.9:80", "0.0.0.0:80", "[::]:80", "[::1]:80", "224.0.0.1:80",
                 "239.1.1.1:80", "[ff02::1]:80", "[::ffff:127.0.0.1]:80", "[::ffff:0.0.0.0]:80",
                 "[::ffff:7f00:1]:80", "169.254.169.254:80", "[fe80::1]:80", "[febf::1]:80",
                 "[::ffff:169.254.169.254]:80"]
OTHER_TYPES = [None, 0, -1, 1e9, True, False, [], {}, ["x"], {"x": 1}]
STATUSES = [200, 202, 203, 204, 206, 226, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401, 402, 403, 404,
            405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 425, 426, 428,
            429, 431, 451, 499, 500, 501, 502, 503, 504, 505, 507, 511, 520, 599, 600, 700, 999]
HOSTILE = ["\x1b[2J\x1b]0;title\x07", "a\r\nplexctl: error: forged", "\u202e\u2066", "x" * 100000,
           "\x00\x7f\x80\x9b31m", "%s%d{0}", "\ud83d\ude00", "  \u2028 ", "\b\b\b\b"]
JSON_BAD = [  # of a good text t
    lambda t: t.replace("{", '{"token": "x", "token": "y", ', 1), lambda t: t.replace("{", '{"x": NaN, ', 1),
    lambda t: t.replace("{", '{"x": Infinity, ', 1), lambda t: t.replace("{", '{"x": -Infinity, ', 1),
    lambda t: t.replace("{", '{"x": "\\ud800", ', 1), lambda t: t.replace("{", '{"x": %s, ' % ("1" * 5000),
                                                                          1),
    lambda t: t.replace("{", '{"x": %s1%s, ' % ("[" * 30000, "]" * 30000), 1), lambda t: t + "{}",
    lambda t: t[:-1], lambda t: t.replace("{", '{"x": {"y": 1, "y": 1}, ', 1), lambda t: t.replace('"', "'"),
    lambda t: "", lambda t: " ", lambda t: "null", lambda t: "[%s]" % t, lambda t: json.dumps(t),
    lambda t: "\ufeff" + t, lambda t: t.replace(":", "=", 1), lambda t: "/* */" + t,
    lambda t: t.replace("}", ",}", 1), lambda t: t + "\x00", lambda t: t.encode("utf-16"),
    lambda t: t.encode("utf-32-le"), lambda t: t.encode() + b"\xff", lambda t: b"\x1f\x8b" + t.encode(),
    lambda t: t.replace("tcp", "t\x01cp").encode(), lambda t: t.encode().replace(b'"tcp"', b'"\xc0\x80"', 1),
    lambda t: t.replace("{", '{"x": 1e400, ', 1)]  # a number that is read as infinity


class Case:
    """An answer: its bytes (steps), and what must come of it."""

    def __init__(self, status, document, outcome="ok", codes=(0,), headers=(), name=""):
        self.status, self.document, self.outcome, self.codes = status, document, outcome, set(codes)
        self.headers, self.name, self.raw, self.steps = list(headers), name, None, None
        self.seconds, self.may_exist = None, False

    def fail(self, name, *codes, outcome="error"):
        self.name, self.outcome, self.codes = name, outcome, set(codes or (1,))
        return self

    def body(self):
        if self.raw is not None:
            return self.raw
        return b"" if self.document is None else json.dumps(self.document).encode()

    def bytes(self):
        return http_answer(self.status, headers=self.headers, raw=self.body())


def bad_field(bench, draw, case, document, name):
    """One field is missing, of another type, or of a value that is not right."""
    values = {"session_id": UUID_BAD, "id": UUID_BAD + [bench.new_uuid()], "expires_at": TIME_BAD,
              "issued_at": TIME_BAD, "listener_endpoint": ENDPOINT_BAD, "kind": ["", "TCP", "udp", "tcp "],
              "status": ["", "ACTIVE", "pending", "active\n"], "session": ["x"],
              "token": ["", "a b", "a\n", "a\tb", "\u00e9", "x" * 65537, "\x7f"]}[name]
    optional = name in ("issued_at", "listener_endpoint")
    how = draw.one(("value", "value", "type") if optional else ("value", "value", "type", "missing"))
    if how == "missing":
        document.pop(name)
    elif how == "type":
        document[name] = draw.one(OTHER_TYPES[optional:])
    else:
        document[name] = draw.one(values)
    case.fail("field %s: %s %r" % (name, how, str(document.get(name))[:60]))


TORN = ("torn", "torn chunks", "torn reset", "long length", "huge length", "large", "headers", "long line",
        "reset",
        "nothing", "stall", "continue", "bad chunk")  # no answer can come of these
UNCLEAR = ("short length", "length", "header", "status line", "noise")
NEED_BODY = ("close", "chunked", "torn", "torn chunks", "torn reset", "long length", "short length",
             "huge length",
             "bad chunk", "large")


def spoil_but_tokens(draw, raw):
    """A token that is spoiled is no secret that anybody could know again."""
    spoiled = draw.spoil(raw)
    for found in re.finditer(rb"(psk|eyJ)-[a-z0-9]+", raw):
        spoiled = spoiled[:found.start()] + found.group() + spoiled[found.end():]
    return spoiled


def spoil_http(draw, case):
    """The same answer in another shape, still right, or torn, or wrong. Returns how."""
    body, whole = case.body(), case.bytes()
    head = whole.partition(b"\r\n\r\n")[0]
    without = re.sub(b"(?i)\r\ncontent-length: .*", b"", head)
    has_body = case.status != 204 and len(body) > 2
    how = draw.one(("pieces", "interim", "header", "status line", "noise", "length") + TORN + (
        NEED_BODY if has_body else ()))
    if how in ("stall", "continue") and draw.chance(80):  # they take a tenth of a second
        how = "nothing"
    if not has_body and how in NEED_BODY:
        how = "pieces"
    chunked = without + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    if "chunk" in how:
        size = len(body) // draw.number(1, 40) + 1
        for at in range(0, len(body), size):
            piece = body[at:at + size]
            chunked += b"%x%s\r\n%s\r\n" % (len(piece), draw.one((b"", b";a=b")), piece)
    sized = without + b"\r\nContent-Length: %s\r\n\r\n"
    cut = draw.number(len(head) + 4, len(whole) - 1) if how in ("torn", "torn reset") else 0
    seconds = 0.1 if how in ("stall", "continue") else None
    steps = {
        "close": lambda: [without + b"\r\n\r\n" + body],
        "chunked": lambda: [chunked + b"0\r\n" + draw.one((b"", b"X: y\r\n")) + b"\r\n"],
        "pieces": lambda: [whole[at:at + 97] for at in range(0, min(len(whole), 3880), 97)] + [whole[3880:]],
        "interim": lambda: [b"HTTP/1.1 100 Continue\r\nLink: </a>\r\n\r\n" * draw.number(1, 4) + whole],
        "torn": lambda: [whole[:cut]],
        "torn reset": lambda: [whole[:cut], 0.02, RESET],
        "torn chunks": lambda: [chunked[:draw.number(len(without) + 32, len(chunked) - 1)]],
        "bad chunk": lambda: [without + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + draw.one(
            (b"zz\r\n", b"-5\r\nabcde\r\n", b"ffffffffffffffff\r\nabc", b"5\r\nab", b"\r\n",
             b"0x5\r\nabcde"))],
        "long length": lambda: [sized % b"%d" % (len(body) + draw.number(1, 99)) + body],
        "huge length": lambda: [sized % (b"1" + b"0" * draw.one((9, 18, 30))) + body],
        "short length": lambda: [sized % b"%d" % draw.number(0, len(body) - 1) + body],
        "length": lambda: [sized % draw.one((b"-1", b"x", b"", b"1_0", b"+5", b"5, 5")) + body],
        "large": lambda: [http_answer(case.status, headers=case.headers, raw=body + b" " * (1 << 20))],
        "headers": lambda: [head + b"\r\nX: y" * 200 + b"\r\n\r\n" + body],
        "long line": lambda: [head + b"\r\nX: " + b"y" * 70000 + b"\r\n\r\n" + body],
        "header": lambda: [head + b"\r\n" + draw.one((
            b"no colon", b": empty", b" folded: x", b"X\0: y", b"X: \xff\xfe", b"X y: z", b"Date: never",
            b"Content-Encoding: gzip", b"Retry-After: \x1b[31m", b"Content-Type: \x00",
            b"Transfer-Encoding: x")) + b"\r\n\r\n" + body],
        "status line": lambda: [draw.one((
            b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 x", b"HTTP/1.1 20", b"HTTP/1.1 -200 x",
            b"HTTP/1.1 2000",
            b"HTTP/9.9 200 x", b"HTTP/0.9 200", b"ICY 200 OK", b"\x16\x03\x01\x02", b"SSH-2.0-x", b"{}",
            b"HTTP/1.1 200" + b"x" * 70000, b"GET / HTTP/1.1", b"HTTP/1.1\t200 OK", b"HTTP/1.1 099 x",
            draw.bytes(0, 20).replace(b"\n",
                                      b""))) + b"\r\n" + head.partition(b"\r\n")[2] + b"\r\n\r\n" + body],
        "reset": lambda: [RESET],
        "nothing": lambda: [],
        "noise": lambda: [spoil_but_tokens(draw, whole)],
        "continue": lambda: [b"HTTP/1.1 100 Continue\r\n\r\n" * 400, 0.3],
        "stall": lambda: [whole[:draw.number(0, len(whole) - 1)], 0.3]}[how]()
    case.steps, case.seconds, case.name = steps, seconds, "%s, http: %s" % (case.name, how)
    if how in UNCLEAR or how in TORN and (case.outcome in ("status", "any") or case.status not in (200, 201)):
        case.outcome = "any"  # of an error the status is known, and the body was only to explain it
        case.codes = {1} if how in UNCLEAR else case.codes
    elif how in TORN:
        case.outcome, case.codes = "error", {1}
    return how


def make_answer(bench, draw, operation, session_id, token, bearer, local):
    """A Case for one operation. `local`: the server is a loopback one, by its name."""
    endpoint = draw.one(ENDPOINT_GOOD)
    document = issued(draw, session_id, token, endpoint)
    session = document["session"]
    if operation == "get":
        session["listener_endpoint"] = endpoint
    good = {"issue": Case(201, document), "get": Case(200, session), "revoke": Case(204, None)}[operation]
    case, kind = good, draw.one(("good", "field", "field", "field", "json", "status", "status", "endpoint",
                                 "secret",
                                 "extra"))
    case.name = kind
    if operation == "revoke" and kind in ("field", "json", "endpoint", "extra", "secret"):
        kind = "status"
    if kind == "field" and operation == "issue":
        where, name = draw.one(
            [(document, name) for name in ("session_id", "token", "expires_at", "session")]
            + [(session, name) for name in ("id", "kind", "status", "issued_at")]
            + [(each, "listener_endpoint") for each in (document, session)])
        bad_field(bench, draw, case, where, name)
        case.may_exist = name == "session_id"
    elif kind == "field":
        bad_field(bench, draw, case, session,
                  draw.one(("id", "kind", "status", "issued_at", "listener_endpoint")))
    elif kind == "json":
        which = draw.number(0, len(JSON_BAD) - 1)
        raw = JSON_BAD[which](json.dumps(case.document))
        case.raw = raw.encode() if isinstance(raw, str) else raw
        case.fail("json %d" % which)
        case.may_exist = operation == "issue"
        if which == len(JSON_BAD) - 1:
            case.outcome = "any"
    elif kind == "endpoint" and not local:
        where = document if operation == "issue" and draw.chance(50) else session
        document.pop("listener_endpoint", None)
        session.pop("listener_endpoint", None)
        where["listener_endpoint"] = draw.one(ENDPOINT_NEAR)
        case.fail("endpoint " + where["listener_endpoint"])
    elif kind == "endpoint":
        endpoint = draw.one(ENDPOINT_GOOD + ENDPOINT_NEAR[:4])
        session["listener_endpoint"] = document["listener_endpoint"] = endpoint
    elif kind == "secret":
        where = draw.one((document, session))
        secret = draw.one((bearer, token))
        name = draw.one(("listener_endpoint", "status", "kind", "expires_at", "id", "revoke_reason"))
        if operation == "get":
            where, secret = session, bearer  # it has not seen the other one
        where[name] = secret + ":80" if name == "listener_endpoint" else secret
        # one that is not read there does no harm
        case.fail("a secret as %s" % name, outcome="any" if name != "listener_endpoint" else "error")
    elif kind == "extra":
        where = draw.one((document, session))
        where[draw.one(("x", "", "\x1b", "Token"))] = draw.one(OTHER_TYPES + HOSTILE + [draw.text()])
    elif kind == "status":
        case = problem_case(draw, operation, bearer)
    if case.status in (201, 200) and kind in ("good", "extra") and draw.chance(30):
        session["expires_at"] = document["expires_at"] = draw.one(TIME_GOOD)
        session["status"] = draw.one(("active", "expired", "revoked"))
        session["issued_at"] = draw.one((None, "2001-01-01T00:00:00Z", session["issued_at"]))
        case.name += ", other values"
    case.endpoint = endpoint
    how = spoil_http(draw, case) if draw.chance(35) else ""
    case.known = (operation == "issue" and case.status == 201 and kind != "json"
                  and "session_id" not in case.name)
    if how in TORN:
        case.known = False
        case.may_exist = operation == "issue" and not (case.outcome == "any" or 300 <= case.status < 500)
    return case


def problem_case(draw, operation, bearer):
    """An error status with problem details, some of them hostile."""
    status = draw.one(STATUSES)
    code = draw.one(("", "x", "rebac_denied", "step_up_required", "session_limit_exceeded",
                     "idempotent_replay"))
    words = ["plain words", bearer, "Bearer " + bearer, "x" * 290 + bearer, ["a", bearer], 5, None,
             {"x": bearer},
             draw.text()] + HOSTILE
    document = {name: draw.one(words) for name in ("title", "detail", "reason", "relation_path",
                                                   "correlation_id")}
    document.update({"status": status, "code": code} if code else {"status": status})
    headers = [
        ("Retry-After", draw.one(("0", "0", "x", "-1", "9" * 400, "\u00b2", email.utils.formatdate(0),
                                  "Thu, 99 Foo 2099"))),
        ("Location", draw.one(("http://127.0.0.1:1/" + bearer, "\x1b[31m", "/x", "file:///etc/passwd"))),
        ("WWW-Authenticate", draw.one(('Bearer acr_values="%s"' % bearer, "Bearer acr_values=\x1b[31m",
                                       'acr_values="', "x" * 5000, "Basic")))]
    case = Case(status, document, headers=draw.some(headers),
                name="status %d %s" % (status, code))
    wanted = 1
    if status == 401:
        wanted = 3
    elif status == 403:
        wanted = 77 if code == "rebac_denied" else 4
    case.outcome, case.codes = "status", {wanted}
    if draw.chance(30):
        case.raw = draw.one((b"", b"<html>%s</html>" % bearer.encode(), b"[" * 50000, b'{"code": "\xff"}',
                             b'{"title": NaN}', b'"%s"' % bearer.encode(), b"null", b"x" * 100000,
                             draw.bytes()))
        if status == 403:
            case.codes = {4}
    if operation == "revoke" and (200 <= status < 300 or status in (404, 409, 410)):
        case.outcome, case.codes = "ok", {0}
        if status in (200, 202, 203, 206, 226):
            case.outcome = "any"
    elif operation == "get" and status == 200:
        case.outcome, case.codes = "error", {1}
    if status == 204:
        case.raw = b""
    return case


def chain_text(error):
    """Everything that an exception and those behind it say."""
    text, seen = "", set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text += "%s %r %s\n" % (error, error.args, " ".join(map(repr, vars(error).values())))
        error = error.__cause__ or error.__context__
    return text


def fuzz_answer(bench, draw):
    """One exchange with the client of the control plane, or a whole print mode of main()."""
    plexctl, server = bench.plexctl, bench.server
    session_id, token, bearer = bench.new_uuid(), bench.secret("eyJ-"), bench.secret("psk-")
    local = draw.chance(70)
    operation = draw.one(("issue", "issue", "issue", "get", "get", "revoke"))
    case = make_answer(bench, draw, operation, session_id, token, bearer, local)
    steps = case.steps if case.steps is not None else [case.bytes()]

    def reply(method, path, headers, body):
        if simulator.route(method, path)[0] == operation:
            return steps
        return [http_answer(204)] if path.endswith("/revoke") else [http_answer(404, {})]

    server.reply = reply
    url = server.url if local else "http://%s:%d" % (PLANE_NAME, server.port)
    bench.said = "%s: %s (expected %s, %s)" % (operation, case.name, case.outcome, sorted(case.codes))
    slow = case.outcome == "any" or case.seconds or case.steps is not None or case.status in (502, 503, 504,
                                                                                              409)
    if operation == "issue" and not slow and draw.chance(30):
        through_main(bench, draw, case, session_id, token, bearer, url)
        return
    lines, ids = [], []
    stop = threading.Event()
    if not (case.outcome == "status" and ("Retry-After", "0") in case.headers):
        stop.set()  # one attempt, no pause
    plane = plexctl.ControlPlane(plexctl.parse_server(url, True), plexctl.Secret(bearer, "--token-file"),
                                 None, {},
                                 stop, lines.append)
    more = {"seconds": case.seconds} if case.seconds and operation != "issue" else {}
    if case.seconds and operation == "issue":
        return  # its limit is 30 s
    error = result = None
    try:
        if operation == "issue":
            request = plexctl.SessionRequest(simulator.PROJECT_ID, simulator.RESOURCE_ID, "10.0.0.5", 22)
            result = plane.issue(request, ids.append)
        elif operation == "get":
            result = plane.get(simulator.PROJECT_ID, session_id, **more)
        else:
            result = plane.revoke(simulator.PROJECT_ID, session_id, **more)
    except plexctl.PlexctlError as failure:
        error = failure
    except Exception as failure:
        raise AssertionError("%s was raised: not a PlexctlError" % type(failure).__name__) from failure
    bench.said += "\nresult %r\nerror %r" % (result, error)
    check(not bench.leaks("\n".join(lines)), "a secret was reported")
    check(not bench.leaks(repr(result)), "a secret is in a repr")
    if case.outcome == "ok":
        check(error is None, "it failed")
    elif case.outcome in ("error", "status"):
        check(error is not None, "it did not fail")
    if error is not None:
        check(error.exit_code in CONTRACT - {0}, "exit code %s", error.exit_code)
        check(case.outcome == "any" or error.exit_code in case.codes, "exit code %d", error.exit_code)
        text = str(error)
        check(text and all(" " <= c <= "~" for c in text), "its text is not printable ASCII")
        check(not bench.leaks(chain_text(error)), "a secret is in the exception or behind it")
        check(len(text) < 4000, "its text has %d characters", len(text))
        if case.may_exist:
            check("may exist" in text or ids, "a session may exist, and no word of it")
    if operation == "issue":
        keys = {json.loads(body)["idempotency_key"] for _, _, _, body in server.seen}
        check(len(keys) == 1 and len(server.seen) <= 3, "%d requests, %d keys", len(server.seen), len(keys))
        if case.known and case.outcome != "any":
            check(ids == [session_id], "the session's id was not told, it could not be revoked")
    if result is not None and case.outcome == "ok":
        check(result.session_id == session_id, "another session id")
        if "other values" not in case.name:
            endpoint = result.listener_endpoint
            check(str(endpoint).replace(":53", "") == case.endpoint.replace(":053", ""),
                  "another endpoint: %s", endpoint)
        if operation == "issue":
            check(result.token.reveal() == token, "another token")


def through_main(bench, draw, case, session_id, token, bearer, url):
    """Print mode, from the command line to what is left on the server."""
    output, reveal = draw.one(("text", "json", "yaml")), draw.chance(30)
    argv = ["tcp-forward", "--allow-http", "--server", url, "--output", output, "--wait-seconds", "0"]
    argv += simulator.REQUIRED_FLAGS + ["--reveal-secrets"] * reveal + ["-v"] * (draw.chance(30))
    said = bench.said
    code, out, err = bench.main(argv, bench.environment(PLEXSPHERE_TOKEN=bearer))
    bench.said = said + "\n" + bench.said
    known = session_id if case.known else None
    if case.outcome in ("error", "status"):
        check(code in case.codes, "exit code %d", code)
    if case.outcome == "ok" and "other values" not in case.name:
        check(code == 0, "exit code %d", code)
        bench.check_document(out, output, session_id, case.endpoint.replace(":053", ":53"))
    check(("PLEXCTL_SESSION_TOKEN=" in err) <= reveal, "the token was revealed, and nobody asked")
    bench.check_sessions(code, err, known)
    if case.may_exist:
        revoked = [path for _, path, _, _ in bench.server.seen if path.endswith("/revoke")]
        check("may exist" in err or revoked, "a session may exist, and no word of it")


# ---- all of it --------------------------------------------------------------------------------------------

PARTS = {"lines": fuzz_line, "files": fuzz_file, "answers": fuzz_answer}


def create_test(bench, part, examples):
    """The property of a part, as a function without arguments."""
    @hypothesis.settings(
        max_examples=examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True)
    @hypothesis.given(st.data())
    def holds(data):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        bench.begin()
        try:
            PARTS[part](bench, Draw(data))
        finally:
            faulthandler.cancel_dump_traceback_later()
            hypothesis.note(bench.said)
    return holds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plexctl", default=simulator.PLEXCTL)
    parser.add_argument("--examples", type=int, default=EXAMPLES, metavar="N", help="of each part")
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    options = parser.parse_args()
    set_hypothesis_home_dir(os.path.join(HERE, ".hypothesis"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # --token-file - and --stdio find nothing there
    sys.addaudithook(stay_on_loopback)
    socket.getaddrinfo = know_names(socket.getaddrinfo)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(load(options.plexctl), scratch)
        for part in options.part or PARTS:
            began = time.monotonic()
            create_test(bench, part, options.examples)()
            print("%s: %d hold, %.0f s" % (part, options.examples, time.monotonic() - began), flush=True)


if __name__ == "__main__":
    main()
