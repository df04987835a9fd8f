#!/usr/bin/env python3
"""Command lines, secret files and answers of a control plane, most of them with one thing wrong.

    python3 .ci/fuzz.py                              20,000 command lines, 10,000 files, 50,000 answers
    python3 .ci/fuzz.py --sample 0.1 --seed 7        a tenth of them
    python3 .ci/fuzz.py --seed 7 --case answers:1234 one of them once more, and what it said

plexctl.py is loaded as a module: main() and the public control-plane client are called, against a raw
socket server on loopback that sends prepared bytes. What must come out is known for most cases, since they
were made by putting together what is good and at most one thing that is not; for soups and torn bytes it is
the contract alone. In every case: an exit code of the contract; on failure one line `plexctl: error:` of
printable ASCII and nothing on stdout, on success the right document; no traceback, no secret, also not in an
exception's chain; no session left without a word. The seed is printed. Linux, Python 3.9 or later.
"""

import argparse
import contextlib
import email.utils
import errno
import faulthandler
import importlib.util
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import string
import struct
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import test_plexctl as simulator

COUNTS = {"lines": 20000, "files": 10000, "answers": 50000}
CONTRACT = {0, 1, 2, 3, 4, 77, 126, 127}
HANG_SECONDS = 45
RESET = object()
PLANE_NAME = "plane.example"  # resolves to the server here, so that it is not a loopback one by name
AUDIT = "PLEXCTL_AUDIT_LOG"


class Wrong(Exception):
    """What plexctl did is not what it should have done."""


def check(condition, text, *values):
    if not condition:
        raise Wrong(text % values if values else text)


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


def new_uuid(rng):
    digits = "%032x" % rng.getrandbits(128)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def issued(rng, session_id, token, endpoint="127.0.0.1:40213"):
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
    rng.choice((document, session))["listener_endpoint"] = endpoint
    return document


# ---- what every run of main() must keep to ----------------------------------------------------------------

class Bench:
    """The module, a scratch directory, the server; one case at a time."""

    def __init__(self, module, scratch):
        self.plexctl, self.scratch, self.server = module, scratch, Server()
        self.audit_log = os.path.join(scratch, "audit.log")
        self.secrets = []
        self.said = ""

    def environment(self, **more):
        environ = {"HOME": self.scratch, "PATH": os.defpath, AUDIT: self.audit_log,
                   "XDG_CONFIG_HOME": os.path.join(self.scratch, "config")}
        environ.update(more)
        return {name: value for name, value in environ.items() if value is not None}

    def secret(self, rng, prefix="psk_"):
        """A token that no stream may show, not even eight characters of it."""
        token = prefix + "".join(rng.choices(string.ascii_letters + string.digits,
                                             k=rng.choice((16, 24, 60))))
        self.secrets.append(token)
        return token

    def leaks(self, text):
        return any(token[at:at + 8] in text for token in self.secrets for at in range(4, len(token) - 7))

    def main(self, argv, environ):
        """main() as a command would be: exit code, stdout, stderr; checked against the contract."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.plexctl.main(argv, environ)
            except BaseException as error:
                raise Wrong("main raised %s" % type(error).__name__) from error
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
UUID_BAD = ["", "x", "{%s}" % simulator.PROJECT_ID, "urn:uuid:" + simulator.PROJECT_ID,
            simulator.PROJECT_ID + "0",
            simulator.PROJECT_ID.replace("-", ""), simulator.PROJECT_ID[:-1], " " + simulator.PROJECT_ID,
            simulator.PROJECT_ID + "\n", simulator.PROJECT_ID.replace("0", "g"),
            "0190a8b-8a0c0-7a0a-8a0a-a0a0a0a0a0c0",
            simulator.PROJECT_ID.replace("8", "\u0668"), "\x1b[31m"]
NUMBER_BAD = ["", "1_000", " 5", "5 ", "+5", "\u0665", "1e3", "0x10", "five", "1.5.", "9" * 30, "\x00", "\n",
              "--", "1,5"]
LOCAL_GOOD = ["127.0.0.1:0", "[::1]:0", "localhost:0", "127.0.0.2:0"]
LOCAL_BAD = ["", "127.0.0.1", ":0", "127.0.0.1:65536", "127.0.0.1:-1", "::1:0", "[::1]", "example.com:0",
             "127.1:0",
             "0:0", "[127.0.0.1]:0", "unix:", "unix:relative", "unix:/" + "x" * 120, "unix:/a\nb",
             "127.0.0.1:1_0",
             "010.0.0.1:0", "tcp:127.0.0.1:0", "127.0.0.1:0 ", "[::1%lo]:0"]
SERVER_BAD = ["ftp://127.0.0.1", "127.0.0.1", "http://", "https://", "http://u:p@127.0.0.1",
              "https://a.example/?q",
              "https://a.example/#f", "https://a example", "https://a\\b", "https://a.example:0",
              "https://a.example:65536", "https://a.example:x", "https://[::1", "https://\x1b[31m",
              "//127.0.0.1",
              "http://example.com", "http://128.0.0.1", "file:///etc/passwd", "https://127.1",
              "https://-a.example",
              "https://a..example", "https://\u00e4.example", "https://a.example:80:80"]
SWITCHES = ["--allow-http", "--reveal-secrets", "--yes", "--proxy", "--stdio", "--renew", "--keep-session",
            "--allow-other-users"]
PERSISTENT = {"--server", "--profile", "--token-file", "--output", "--ca-file", "--allow-http",
              "--reveal-secrets",
              "--yes", "-v", "--verbose"}
GOOD = {
    "--project-id": UUID_GOOD, "--resource-id": UUID_GOOD,
    "--host": ["10.0.0.5", "db.internal", "fd00::5", "x" * 200, "a_b", "1"],
        "--port": ["1", "5432", "65535", "080"],
    "--local-addr": LOCAL_GOOD, "--ttl-seconds": ["0", "1", "1800", "000"],
        "--output": ["text", "json", "yaml"],
    "--wait-seconds": ["0", "0.0", "1.5", "90"], "--max-sessions": ["2", "4", "32"],
        "--min-sessions": ["1", "2"]}
BAD = {
    "--project-id": UUID_BAD, "--resource-id": UUID_BAD,
    "--host": ["", " ", "\t", "a b", "a\nb", "\x1b[31m", "x" * 254, "h:80", "\u2028"],
    "--port": ["0", "65536", "-1"] + NUMBER_BAD, "--local-addr": LOCAL_BAD,
       "--ttl-seconds": ["-1"] + NUMBER_BAD,
    "--output": ["", "xml", "JSON", "text ", "tex"], "--wait-seconds": ["-1", "inf", "nan", "1e3", ".5",
                                                                        "5."] + NUMBER_BAD,
    "--max-sessions": ["0", "33", "-1"] + NUMBER_BAD, "--min-sessions": ["0", "33", "-1"] + NUMBER_BAD,
    "--server": SERVER_BAD}
STRANGE_FLAGS = ["--token", "--reveal", "--prox", "--project", "--bearer", "--portt", "--hosts", "-x", "-p",
                 "--", "---",
                 "--Port", "--reveal_secrets", "--\x1b[31m", "-\u00e9", "--ttl", "--password", "--no-proxy",
                 "-V", "--v"]


def shuffled(rng, things):
    things = list(things)
    rng.shuffle(things)
    return things


def spell(rng, flag, value):
    """A flag as one word or two; a value that starts with a hyphen needs the first way."""
    if flag in SWITCHES:
        return [flag] if value and rng.random() < 0.6 else ["%s=%s" % (flag, "true" if value else "false")]
    if value.startswith("-") or rng.random() < 0.5:
        return ["%s=%s" % (flag, value)]
    return [flag, value]


def made_line(bench, rng):
    """A command line put together, and the exit codes that it may have, given one thing wrong at most."""
    mode = rng.choice(("print", "print", "print", "--proxy", "--stdio", "command"))
    values = {flag: rng.choice(GOOD[flag]) for flag in ("--project-id", "--resource-id", "--host", "--port")}
    optional = ["--ttl-seconds", "--wait-seconds", "--output"]
    if mode != "print":
        optional += ["--keep-session"]
        if mode != "--stdio":
            optional += ["--max-sessions", "--renew", "--allow-other-users"]
    if mode != "--stdio":
        optional.append("--local-addr")
    optional += ["--yes", "--allow-http", "--reveal-secrets", "-v"]
    for flag in rng.sample(optional, rng.randint(0, len(optional) // 2)):
        values[flag] = True if flag in SWITCHES or flag == "-v" else rng.choice(GOOD[flag])
    if "--max-sessions" in values and rng.random() < 0.4:
        values["--min-sessions"] = rng.choice(GOOD["--min-sessions"])
    if mode in ("--proxy", "--stdio"):
        values[mode] = True
    command = {"command": ["true", "{host}", "--proxy", "-h"]}.get(mode)
    wanted, wrong = {0 if mode == "print" else 4}, "nothing"
    before, after, extra = [], [], []
    if rng.random() < 0.7:
        wrong = rng.choice(("value", "value", "value", "missing", "unknown", "together", "credentials",
                            "command", "positional", "switch", "no command"))
        wanted = {2}
    if wrong == "value":
        flag = rng.choice(sorted(flag for flag in BAD if mode != "print" or "-sessions" not in flag))
        values[flag] = rng.choice(BAD[flag])
    elif wrong == "missing":
        del values[rng.choice(("--project-id", "--resource-id", "--host", "--port"))]
    elif wrong == "unknown":
        flag = rng.choice([each for each in STRANGE_FLAGS if each != "--"])
        extra = [rng.choice([[flag], [flag + "=" + bench.secret(rng)], [flag, bench.secret(rng)]])]
    elif wrong == "together":
        problems = [["--proxy", "--stdio"], ["--stdio", "--local-addr=127.0.0.1:0"], ["--stdio", "--renew"],
                    ["--stdio", "--max-sessions=2"], ["--stdio", "--allow-other-users"],
                    ["--stdio", "--token-file=-"],
                    ["--proxy", "--max-sessions=2", "--min-sessions=3"]]
        if mode == "print":
            values.pop("--local-addr", None)
            problems = [["--renew"], ["--keep-session"], ["--allow-other-users"], ["--max-sessions=2"],
                        ["--local-addr=unix:" + bench.scratch + "/s"], ["--min-sessions=1"]]
        after = [rng.choice(problems)]
        if mode != "print":
            for flag in ("--proxy", "--stdio", "--local-addr", "--renew", "--max-sessions",
                         "--allow-other-users",
                         "--min-sessions"):
                values.pop(flag, None)
            command = None
    elif wrong == "credentials":
        what, wanted = rng.choice(((["--token-file", os.path.join(bench.scratch, "absent")], {3}),
                                   (["--token-file", bench.scratch], {3}),
                                   (["--token-file", "/dev/full"], {3}),
                                   (["--profile", "absent"], {3}), (["--profile=\x1b[31m"], {3}),
                                   (["--token-file=a\0b"], {2, 3}), (["--profile", ""], {2, 3})))
        extra = [what]
    elif wrong == "command":
        command, wanted = rng.choice((([], {2}), ([""], {2, 127}), (["/nonexistent/program"], {127}),
                                      (["no-such-program-\x1b"], {127}), (["/etc/passwd"], {126}),
                                      (["/"], {126})))
        for flag in ("--proxy", "--stdio"):
            values.pop(flag, None)
    elif wrong == "positional":
        after = [[rng.choice(("tcp-forward", bench.secret(rng), "\x1b[31m", "true", "10.0.0.5:22"))]]
    elif wrong == "switch":
        flag = rng.choice(SWITCHES)
        after = [[flag + "=" + rng.choice(("", "1", "yes", "True", " true", "truefalse", bench.secret(rng)))]]
    for flag, value in shuffled(rng, values.items()):
        words = [rng.choice(("-v", "-vv", "--verbose"))] if flag == "-v" else spell(rng, flag, value)
        (before if rng.random() < 0.3 else after).append(words)
        if flag in GOOD and rng.random() < 0.05 and wrong in ("nothing", "unknown"):  # the last one wins
            before.insert(0, spell(rng, flag, rng.choice(GOOD[flag])))
    rng.choice((before, after)).extend(extra)
    argv = [word for words in before for word in words]
    name = rng.choice(("tcp-forwards", "", "forward", "TCP-FORWARD", bench.secret(rng), "\x1b[31m"))
    argv += ["tcp-forward"] if wrong != "no command" else rng.choice(([], [name]))
    if wrong == "value" and values.get("--allow-http") and values.get("--server", "") in SERVER_BAD[15:17]:
        wanted = {1}  # it may be asked then, but cannot be reached
    argv += [word for words in after for word in words]
    if command is not None:
        argv += ["--"] + command
    return argv, mode, values, wanted, wrong


def soup(bench, rng):
    """Words that belong, and some that do not, in any order."""
    pool = ["tcp-forward", "tcp-forward", "--", "-h", "--help", "--version", "-v", "-vvv", "true", "=", "--=",
            "-",
            bench.secret(rng), "--token=" + bench.secret(rng), "\x1b]0;x\x07", "\udcff", "\u202e", "{host}",
            "a" * 5000]
    for flag, values in GOOD.items():
        pool += [flag, flag + "=" + rng.choice(values), rng.choice(values),
                 flag + "=" + rng.choice(BAD[flag])]
    pool += SWITCHES + STRANGE_FLAGS + [flag + "=false" for flag in SWITCHES]
    argv = rng.choices(pool, k=rng.randint(0, 14))
    if rng.random() < 0.5:
        argv = ["tcp-forward"] + simulator.REQUIRED_FLAGS + argv
    if argv and rng.random() < 0.5:  # one character of one word
        at = rng.randrange(len(argv))
        word = list(argv[at] or "x")
        word[rng.randrange(len(word))] = rng.choice(string.printable + "\x00\x1b\u00e9\u0665")
        argv[at] = "".join(word)
    return argv


def fuzz_line(bench, rng):
    """main() with a command line. A mode that would stay is refused by the server, with 403."""
    session_id, token = new_uuid(rng), bench.secret(rng, "eyJ.")
    document, problem = issued(rng, session_id, token), {"code": "no", "title": "no", "status": 403}
    if rng.random() < 0.25:
        argv, mode, values, wanted, wrong = soup(bench, rng), None, {}, CONTRACT, "soup"
        keeps = not {"--proxy", "--stdio", "--"} & {word.partition("=")[0] for word in argv}
    else:
        argv, mode, values, wanted, wrong = made_line(bench, rng)
        keeps = mode == "print"

    def reply(method, path, headers, body):
        if path.endswith("/revoke"):
            return [http_answer(204)]
        if method == "POST" and keeps:
            return [http_answer(201, document)]
        return [http_answer(403, problem)]

    bench.server.reply = reply
    bench.said = repr(argv)
    environ = bench.environment(PLEXSPHERE_URL=bench.server.url, PLEXSPHERE_TOKEN=bench.secret(rng))
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


def token_bytes(bench, rng):
    token = bench.secret(rng).encode()
    return token, rng.choice((
        lambda: token, lambda: token + b"\n", lambda: token + b"\r\n", lambda: token + b"\n\n",
                              lambda: b" " + token,
        lambda: token + rng.choice((b" ", b"\t", b"\x1c", b"\x85", b"\xa0", b"\r", b"\0", b"\x7f")),
        lambda: token[:8] + bytes([rng.randrange(256)]) + token[8:], lambda: b"", lambda: b"\n",
                              lambda: b"\xef\xbb\xbf" + token,
        lambda: token.decode().encode("utf-16"), lambda: token + b"\xe2\x80\xa8", lambda: token + b"\nX: y",
        lambda: token * rng.randint(100, 900), lambda: (token * 900)[:rng.choice((8191, 8192, 8193))],
        lambda: token * 5000, lambda: bytes(rng.randrange(256) for _ in range(rng.randint(1, 80))),
        lambda: token + b"\n" + token))()


def write_file(rng, path, raw, mode, kind):
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


def config_document(bench, rng, url):
    """A config file's document, what is wrong with it, and the token of its default profile."""
    token = bench.secret(rng)
    document = {"default": "prod", "profiles": {"prod": {"server": url, "token": token},
                                                "other": {"server": "https://o.example",
                                                          "token": bench.secret(rng)}}}
    wrong = rng.choice(("nothing", "nothing", "top", "profiles", "entry", "field", "extra", "default",
                        "token", "server",
                        "no token", "no server", "bytes", "syntax", "origin"))
    strange = rng.choice((None, 1, True, [], "x", {}, [token], {"a": token}, 1e308, ""))
    raw = None
    if wrong == "top":
        document = rng.choice((None, 1, [document], token, [], {"profiles": None}, {"default": "prod"}))
    elif wrong == "profiles":
        document["profiles"] = strange if strange != {} else []
    elif wrong == "entry":
        document["profiles"]["prod"] = strange if not isinstance(strange, dict) else [token]
    elif wrong == "field":
        document["profiles"]["prod"][rng.choice(("server",
                                                 "token"))] = strange if not isinstance(strange, str) else 5
    elif wrong == "extra":
        rng.choice((document, document["profiles"]["prod"]))[rng.choice(("tokens", "url", "",
                                                                         "Token"))] = token
    elif wrong == "default":
        document["default"] = rng.choice(("absent", "\x1b[31m", "Prod", 5, None, [], token))
    elif wrong == "token":
        document["profiles"]["prod"]["token"] = rng.choice(("", " ", token + " ", token + "\r\nX: y",
                                                            "\u00e9" + token,
                                                            (token * 900)[:8193], "\0" + token))
    elif wrong == "server":
        document["profiles"]["prod"]["server"] = rng.choice(SERVER_BAD)
    elif wrong in ("no token", "no server"):
        del document["profiles"]["prod"][wrong[3:]]
    elif wrong == "origin":
        document["profiles"]["prod"]["server"] = rng.choice(("http://127.0.0.2:1", "https://127.0.0.1"))
    text = json.dumps(document)
    if wrong == "syntax":
        raw = rng.choice((
            text[:rng.randrange(len(text))], text + "x", text.replace('"default"',
                                                                      '"default": "prod", "default"', 1),
            text.replace(token, "\\ud800"), text.replace('"prod": {', '"prod": NaN, "x": {'), "[" * 30000,
                          text.replace('"', "'"),
            '{"default": "prod", "profiles": {"prod": ' + "1" * 5000 + "}}", "", " ", "//" + text,
                          text.replace("}", ",}"))).encode()
    elif wrong == "bytes":
        raw = bytearray(text.encode())
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        raw = rng.choice((bytes(raw), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"),
                          text.encode() + b"\xff"))
    return token, raw if raw is not None else text.encode(), wrong


def fuzz_file(bench, rng):
    """main() with a token or config file. The server refuses with 403, and sees the token or nothing."""
    for path in os.listdir(bench.scratch):
        path = os.path.join(bench.scratch, path)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    bench.server.reply = lambda *request: [http_answer(403, {"code": "no", "title": "no"})]
    mode = rng.choice((0o600,) * 8 + (0o400, 0o640, 0o604, 0o660, 0o666, 0o610, 0o700, 0o644))
    kind = rng.choice(("file",) * 12 + ("link", "directory", "fifo", "device", "socket", "absent",
                                        "stranger"))
    argv = ["tcp-forward"] + simulator.REQUIRED_FLAGS
    if rng.random() < 0.4:
        token, raw = token_bytes(bench, rng)
        path = os.path.join(bench.scratch, rng.choice(("token", "t\u00e9", "a b", "x\x1b[31m", "-")))
        good = write_file(rng, path, raw, mode, kind)
        wanted = {4} if good and is_token(raw) else {3}
        expected, what = is_token(raw), "token file, %s, mode %o: %r" % (kind, mode, raw[:200])
        argv += ["--token-file", path]
        environ = bench.environment(PLEXSPHERE_URL=bench.server.url)
    else:
        token, raw, wrong = config_document(bench, rng, bench.server.url)
        os.makedirs(os.path.join(bench.scratch, "config", "plexctl"))
        good = write_file(rng, os.path.join(bench.scratch, "config", "plexctl", "config.json"), raw, mode,
                          kind)
        expected, what = token.encode(), "config file, wrong: %s, %s, mode %o: %r" % (wrong, kind, mode,
                                                                                      raw[:300])
        wanted = {"nothing": {4}, "no token": {3}, "no server": {2}, "server": {2},
                  "bytes": CONTRACT - {0}}.get(wrong, {3})
        if wrong == "origin":
            argv += ["--server", bench.server.url]
        given = rng.random() < 0.3
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
             "2099-05-02T10:30:60Z",
             "2099-05-02T10:30:00+05:30", "2099-05-02T10:30:00-00:00", "2001-01-01T00:00:00Z",
             "9999-12-31T23:59:59Z"]
TIME_BAD = ["", "2099-05-02 10:30:00Z", "2099-05-02T10:30:00", "2099-13-02T10:30:00Z", "2099-02-30T10:30:00Z",
            "2099-05-02T24:00:00Z", "2099-05-02T10:30:00.1234567890Z", "2099-05-02T10:30:00+24:00",
            "2099-05-02T10:30Z",
            "0000-05-02T10:30:00Z", "2099-5-2T10:30:00Z", "tomorrow",
            "\u0662\u0660\u0669\u0669-05-02T10:30:00Z",
            "2099-05-02T10:30:00Z\n", " 2099-05-02T10:30:00Z", "99999-05-02T10:30:00Z",
            "2099-05-02T10:30:00.Z"]
ENDPOINT_GOOD = ["100.64.0.12:40213", "node.example:1", "[2001:db8::1]:65535", "[fd00::1]:80", "n-1.a:5",
                 "8.8.8.8:053"]
ENDPOINT_BAD = ["", "host", ":80", "host:", "host:0", "host:65536", "host:117925", "host:-1", "1.2.3:80",
                "127.1:80",
                "0:80", "2130706433:80", "010.0.0.1:80", "0x7f.0.0.1:80", "::1:80", "[::1", "[host]:80",
                "a b:80", "a\nb:80",
                "h\u00f6st:80", "host:8\u0660", "host:80/", "tcp://host:80", "u@host:80", "host:80:80",
                "[fe80::1%lo]:80",
                "-a:80", "a-:80", "a..b:80", "x" * 64 + ":80", "a:1e3", "a: 80", "a:+80", "\x1b[31m:80",
                "[1.2.3.4]:80",
                "1.2.3.4.5:80", "256.1.1.1:80", "/run/sock:80", "a%2e:80"]
ENDPOINT_NEAR = ["127.0.0.1:80", "127.9.9.9:80",
                 "0.0.0.0:80", "[::]:80",
                 "[::1]:80", "224.0.0.1:80", "239.1.1.1:80", "[ff02::1]:80",
                 "[::ffff:127.0.0.1]:80",
                 "[::ffff:0.0.0.0]:80", "[::ffff:7f00:1]:80", "169.254.169.254:80", "[fe80::1]:80",
                 "[febf::1]:80",
                 "[::ffff:169.254.169.254]:80"]
OTHER_TYPES = [None, 0, -1, 1e9, True, False, [], {}, ["x"], {"x": 1}]
STATUSES = [200, 202, 203, 204, 206, 226, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401, 402, 403, 404,
            405, 406, 407, 408,
            409, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 425, 426, 428, 429, 431, 451, 499,
            500, 501, 502, 503,
            504, 505, 507, 511, 520, 599, 600, 700, 999]
HOSTILE = ["\x1b[2J\x1b]0;title\x07", "a\r\nplexctl: error: forged", "\u202e\u2066", "x" * 100000,
           "\x00\x7f\x80\x9b31m",
           "%s%d{0}", "\ud83d\ude00", "  \u2028 ", "\b\b\b\b"]
JSON_BAD = [
    lambda t: t.replace("{", '{"token": "x", "token": "y", ', 1), lambda t: t.replace("{", '{"x": NaN, ', 1),
    lambda t: t.replace("{", '{"x": Infinity, ', 1), lambda t: t.replace("{", '{"x": -Infinity, ', 1),
    lambda t: t.replace("{", '{"x": "\\ud800", ', 1), lambda t: t.replace("{", '{"x": %s, ' % ("1" * 5000),
                                                                          1),
    lambda t: t.replace("{", '{"x": %s1%s, ' % ("[" * 30000, "]" * 30000), 1), lambda t: t + "{}",
            lambda t: t[:-1],
    lambda t: t.replace("{", '{"x": {"y": 1, "y": 1}, ', 1), lambda t: t.replace('"', "'"), lambda t: "",
            lambda t: " ",
    lambda t: "null", lambda t: "[%s]" % t, lambda t: json.dumps(t), lambda t: "\ufeff" + t,
            lambda t: t.replace(":", "=", 1),
    lambda t: "/* */" + t, lambda t: t.replace("}", ",}", 1), lambda t: t + "\x00",
            lambda t: t.encode("utf-16"),
    lambda t: t.encode("utf-32-le"), lambda t: t.encode() + b"\xff",
            lambda t: t.replace("tcp", "t\x01cp").encode(),
    lambda t: t.encode().replace(b'"tcp"', b'"\xc0\x80"', 1), lambda t: b"\x1f\x8b" + t.encode(),
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


def bad_field(rng, case, document, name, session_id):
    """One field is missing, of another type, or of a value that is not right."""
    values = {"session_id": UUID_BAD, "id": UUID_BAD + [new_uuid(rng)], "expires_at": TIME_BAD,
              "issued_at": TIME_BAD,
              "listener_endpoint": ENDPOINT_BAD, "kind": ["", "TCP", "udp", "tcp "],
              "status": ["", "ACTIVE", "pending", "active\n"], "session": ["x"],
              "token": ["", "a b", "a\n", "a\tb", "\u00e9", "x" * 65537, "\x7f"]}[name]
    optional = name in ("issued_at", "listener_endpoint")
    how = rng.choice(("value", "value", "type") if optional else ("value", "value", "type", "missing"))
    if how == "missing":
        document.pop(name)
    elif how == "type":
        document[name] = rng.choice(OTHER_TYPES[optional:])
    else:
        document[name] = rng.choice(values)
    case.fail("field %s: %s %r" % (name, how, str(document.get(name))[:60]))
    if name == "token" and isinstance(document.get(name), str) and len(document[name]) > 7:
        case.name += " (long)"


def spoil_http(rng, case):
    """The same answer in another shape, still right, or torn, or wrong."""
    body, whole = case.body(), case.bytes()
    head, _, _ = whole.partition(b"\r\n\r\n")
    without = b"\r\n".join(line for line in head.split(b"\r\n")
                           if not line.lower().startswith(b"content-length"))
    chunks, at = b"", 0
    while at < len(body):
        size = rng.randint(1, 300)
        chunks += b"%x%s\r\n%s\r\n" % (len(body[at:at + size]), rng.choice((b"", b";a=b")),
                                       body[at:at + size])
        at += size
    chunked = without + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    how = rng.choice(("close", "chunked", "pieces", "interim", "torn", "torn", "torn chunks", "long length",
                      "short length",
                      "length", "large", "headers", "long line", "header", "status line", "reset",
                      "torn reset", "nothing",
                      "stall", "continue", "noise", "huge length", "bad chunk"))
    if how in ("stall", "continue") and rng.random() < 0.8:  # they take a tenth of a second
        how = "nothing"
    has_body = case.status != 204 and len(body) > 2
    if not has_body and how in ("close", "chunked", "torn", "torn chunks", "long length", "short length",
                                "torn reset",
                                "huge length", "bad chunk", "large"):
        how = "pieces"
    fails = {"torn", "torn chunks", "long length", "huge length", "headers", "long line", "reset",
             "torn reset", "nothing",
             "stall", "continue", "bad chunk", "large"}
    cut = rng.randrange(len(head) + 4, len(whole)) if has_body else 0
    if how == "close":
        steps = [without + b"\r\n\r\n" + body]
    elif how == "chunked":
        steps = [chunked + b"0\r\n" + rng.choice((b"", b"X: y\r\n")) + b"\r\n"]
    elif how == "pieces":
        steps = [whole[at:at + 97] for at in range(0, len(whole), 97)][:40]
        steps.append(whole[sum(map(len, steps)):])
    elif how == "interim":
        more = b"".join(b"HTTP/1.1 100 Continue\r\n%s\r\n" % rng.choice((b"", b"Link: </a>\r\n"))
                        for _ in range(rng.randint(1, 4)))
        steps = [more + whole]
    elif how == "torn":
        steps = [whole[:cut]]
    elif how == "torn reset":
        steps = [whole[:cut], 0.02, RESET]
    elif how == "torn chunks":
        steps = [chunked[:rng.randrange(len(chunked) - len(chunks), len(chunked))]]
    elif how == "bad chunk":
        steps = [without + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
                 + rng.choice((b"zz\r\n", b"-5\r\nabcde\r\n", b"ffffffffffffffff\r\nabc", b"5\r\nab", b"\r\n",
                               b"0x5\r\nabcde"))]
    elif how == "long length":
        steps = [without + b"\r\nContent-Length: %d\r\n\r\n" % (len(body) + rng.randint(1, 99)) + body]
    elif how == "huge length":
        steps = [without + b"\r\nContent-Length: 1%s\r\n\r\n" % (b"0" * rng.choice((9, 18, 30))) + body]
    elif how == "short length":
        steps = [without + b"\r\nContent-Length: %d\r\n\r\n" % rng.randrange(len(body)) + body]
    elif how == "length":
        steps = [without + b"\r\nContent-Length: %s\r\n\r\n" % rng.choice((b"-1", b"x", b"", b"1_0", b"+5",
                                                                           b"5, 5")) + body]
    elif how == "large":
        steps = [http_answer(case.status, headers=case.headers, raw=body + b" " * (1 << 20))]
    elif how == "headers":
        steps = [head + b"\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(200)) + b"\r\n" + body]
    elif how == "long line":
        steps = [head + b"\r\nX: " + b"y" * 70000 + b"\r\n\r\n" + body]
    elif how == "header":
        line = rng.choice((b"no colon", b": empty", b" folded: x", b"X\0: y", b"X: \xff\xfe", b"X y: z",
                           b"Date: never",
                           b"Content-Encoding: gzip", b"Retry-After: \x1b[31m", b"Content-Type: \x00",
                           b"Transfer-Encoding: x"))
        steps = [head + b"\r\n" + line + b"\r\n\r\n" + body]
    elif how == "status line":
        line = rng.choice((b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 x", b"HTTP/1.1 20", b"HTTP/1.1 -200 x",
                           b"HTTP/1.1 2000",
                           b"HTTP/9.9 200 x", b"HTTP/0.9 200", b"ICY 200 OK", b"\x16\x03\x01\x02",
                           b"SSH-2.0-x", b"{}",
                           b"HTTP/1.1 200" + b"x" * 70000, b"GET / HTTP/1.1", b"HTTP/1.1\t200 OK",
                           b"HTTP/1.1 099 x"))
        steps = [line + b"\r\n" + head.partition(b"\r\n")[2] + b"\r\n\r\n" + body]
    elif how in ("reset", "nothing"):
        steps = [RESET] if how == "reset" else []
    elif how == "noise":
        spoiled = bytearray(whole)
        # not within a token: one that is spoiled is no secret that anybody could know again
        tokens = [found.span() for found in re.finditer(rb"(psk|eyJ)-[A-Za-z0-9]+", whole)]
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(spoiled))
            if not any(start <= at < end for start, end in tokens):
                spoiled[at] = rng.randrange(256)
        steps = [bytes(spoiled)]
    elif how == "continue":
        steps, case.seconds = [b"HTTP/1.1 100 Continue\r\n\r\n" * 400, 0.3], 0.1
    else:
        steps, case.seconds = [whole[:rng.randrange(len(whole))], 0.3], 0.1
    case.steps = steps
    case.name += ", http: " + how
    if how in ("short length", "length", "header", "status line", "noise"):
        case.fail(case.name, outcome="any")
    elif how in fails:
        if case.outcome == "status" or case.status not in (200, 201):
            # the status is known and the body was only to explain it
            case.outcome = "any"
        elif case.outcome != "any":
            case.outcome, case.codes = "error", {1}
    return how


def make_answer(bench, rng, operation, session_id, token, bearer, local):
    """A Case for one operation. `local`: the server is a loopback one, by its name."""
    endpoint = rng.choice(ENDPOINT_GOOD)
    document = issued(rng, session_id, token, endpoint)
    session = document["session"]
    if operation == "get":
        session["listener_endpoint"] = endpoint
    good = {"issue": Case(201, document), "get": Case(200, session), "revoke": Case(204, None)}[operation]
    case, kind = good, rng.choice(("good", "field", "field", "field", "json", "status", "status", "endpoint",
                                   "secret", "extra"))
    case.name = kind
    if operation == "revoke" and kind in ("field", "json", "endpoint", "extra", "secret"):
        kind = "status"
    if kind == "field" and operation == "issue":
        where, name = rng.choice([(document, name) for name in ("session_id", "token", "expires_at",
                                                                "session")]
                                 + [(session, name) for name in ("id", "kind", "status", "issued_at")]
                                 + [(rng.choice((document, session)), "listener_endpoint")])
        bad_field(rng, case, where, name, session_id)
        case.may_exist = name == "session_id"
    elif kind == "field":
        bad_field(rng, case, session, rng.choice(("id", "kind", "status", "issued_at", "listener_endpoint")),
                  session_id)
    elif kind == "json":
        which = rng.randrange(len(JSON_BAD))
        raw = JSON_BAD[which](json.dumps(case.document))
        case.raw = raw.encode() if isinstance(raw, str) else raw
        case.fail("json %d" % which)
        case.may_exist = operation == "issue"
        if which == len(JSON_BAD) - 1:
            case.outcome = "any"
    elif kind == "endpoint" and not local:
        where = document if operation == "issue" and rng.random() < 0.5 else session
        document.pop("listener_endpoint", None)
        session.pop("listener_endpoint", None)
        where["listener_endpoint"] = rng.choice(ENDPOINT_NEAR)
        case.fail("endpoint " + where["listener_endpoint"])
    elif kind == "endpoint":
        endpoint = rng.choice(ENDPOINT_GOOD + ENDPOINT_NEAR[:4])
        session["listener_endpoint"] = document["listener_endpoint"] = endpoint
    elif kind == "secret":
        where = rng.choice((document, session))
        secret = rng.choice((bearer, token))
        name = rng.choice(("listener_endpoint", "status", "kind", "expires_at", "id", "revoke_reason"))
        if operation == "get":
            where, secret = session, bearer  # it has not seen the other one
        where[name] = secret + ":80" if name == "listener_endpoint" else secret
        # one that is not read there does no harm
        case.fail("a secret as %s" % name, outcome="any" if name != "listener_endpoint" else "error")
    elif kind == "extra":
        rng.choice((document, session))[rng.choice(("x", "", "\x1b",
                                                    "Token"))] = rng.choice(OTHER_TYPES + HOSTILE)
    elif kind == "status":
        case = problem_case(rng, operation, bearer)
    if case.status in (201, 200) and kind in ("good", "extra") and rng.random() < 0.3:
        session["expires_at"] = document["expires_at"] = rng.choice(TIME_GOOD)
        session["status"] = rng.choice(("active", "expired", "revoked"))
        session["issued_at"] = rng.choice((None, "2001-01-01T00:00:00Z", session["issued_at"]))
        case.name += ", other values"
    case.endpoint = endpoint
    how = spoil_http(rng, case) if rng.random() < 0.35 else ""
    case.known = (operation == "issue" and case.status == 201 and kind != "json"
                  and "session_id" not in case.name)
    if how in ("torn", "torn chunks", "torn reset", "long length", "huge length", "large", "reset", "nothing",
               "stall",
               "headers", "long line", "continue", "bad chunk"):
        case.known = False
        case.may_exist = operation == "issue" and not (case.outcome == "any" or 300 <= case.status < 500)
    return case


def problem_case(rng, operation, bearer):
    """An error status with problem details, some of them hostile."""
    status = rng.choice(STATUSES)
    code = rng.choice(("", "x", "rebac_denied", "step_up_required", "session_limit_exceeded",
                       "idempotent_replay"))
    words = ["plain words", bearer, "Bearer " + bearer, "x" * 290 + bearer] + HOSTILE + [["a", bearer], 5,
                                                                                         None, {"x": bearer}]
    document = {"title": rng.choice(words), "detail": rng.choice(words), "status": status,
                "reason": rng.choice(words),
                "relation_path": rng.choice(words), "correlation_id": rng.choice(words)}
    if code:
        document["code"] = code
    headers = [("Retry-After", rng.choice(("0", "0", "x", "-1", "9" * 400, "\u00b2",
                                           email.utils.formatdate(0), "Thu, 99 Foo 2099"))),
               ("Location", rng.choice(("http://127.0.0.1:1/" + bearer, "\x1b[31m", "/x",
                                        "file:///etc/passwd"))),
               ("WWW-Authenticate", rng.choice(('Bearer acr_values="%s"' % bearer,
                                                "Bearer acr_values=\x1b[31m", 'acr_values="',
                                                "x" * 5000, "Basic")))]
    case = Case(status, document, headers=rng.sample(headers, rng.randint(0, 3)),
                name="status %d %s" % (status, code))
    wanted = 1
    if status == 401:
        wanted = 3
    elif status == 403:
        wanted = 77 if code == "rebac_denied" else 4
    case.outcome, case.codes = "status", {wanted}
    if rng.random() < 0.3:
        case.raw = rng.choice((b"", b"<html>%s</html>" % bearer.encode(), b"[" * 50000, b'{"code": "\xff"}',
                               b'{"title": NaN}',
                               b'"%s"' % bearer.encode(), b"null", b"x" * 100000))
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


def fuzz_answer(bench, rng):
    """One exchange with the client of the control plane, or a whole print mode of main()."""
    plexctl, server = bench.plexctl, bench.server
    session_id, token, bearer = new_uuid(rng), bench.secret(rng, "eyJ-"), bench.secret(rng, "psk-")
    local = rng.random() < 0.7
    operation = rng.choice(("issue", "issue", "issue", "get", "get", "revoke"))
    case = make_answer(bench, rng, operation, session_id, token, bearer, local)
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
    if operation == "issue" and rng.random() < (0.3 if not slow else 0.002):
        through_main(bench, rng, case, session_id, token, bearer, url)
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
        raise Wrong("%s was raised: not a PlexctlError" % type(failure).__name__) from failure
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


def through_main(bench, rng, case, session_id, token, bearer, url):
    """Print mode, from the command line to what is left on the server."""
    output, reveal = rng.choice(("text", "json", "yaml")), rng.random() < 0.3
    argv = ["tcp-forward", "--allow-http", "--server", url, "--output", output, "--wait-seconds", "0"]
    argv += simulator.REQUIRED_FLAGS + ["--reveal-secrets"] * reveal + ["-v"] * (rng.random() < 0.3)
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

FUZZERS = {"lines": fuzz_line, "files": fuzz_file, "answers": fuzz_answer}


def run_case(bench, seed, part, number):
    """None, or what was wrong with the case."""
    bench.secrets, bench.said = [], ""
    bench.server.seen = []
    try:
        FUZZERS[part](bench, random.Random("%d:%s:%d" % (seed, part, number)))
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return "the fuzzer itself: %s: %s" % (type(error).__name__, error)
    return None


def watch(state):
    """A case that does not end is said, with all stacks, and ends the run."""
    while True:
        time.sleep(1)
        if time.monotonic() - state["began"] > HANG_SECONDS:
            print("HANGS: %s" % state["case"], flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plexctl", default=os.path.join(os.path.dirname(HERE), "plexctl.py"))
    parser.add_argument("--sample", type=float, default=1.0, metavar="FRACTION")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--part", choices=sorted(COUNTS), action="append")
    parser.add_argument("--case", metavar="PART:NUMBER", help="this one alone, and what it said")
    parser.add_argument("--show", type=int, default=30, help="how many failures are printed in full")
    options = parser.parse_args()
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)  # --token-file - and --stdio find nothing there
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.addaudithook(stay_on_loopback)
    socket.getaddrinfo = know_names(socket.getaddrinfo)
    state = {"case": "start", "began": time.monotonic()}
    threading.Thread(target=watch, args=(state,), daemon=True).start()
    failures, began = {}, time.monotonic()
    again = "python3 .ci/fuzz.py --seed %d --case %%s:%%d" % options.seed
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(load(options.plexctl), scratch)
        if options.case:
            part, _, number = options.case.partition(":")
            wrong = run_case(bench, options.seed, part, int(number))
            print("%s\n%s" % (bench.said, wrong or "as it should be"))
            return wrong is not None
        print("seed %d" % options.seed, flush=True)
        for part in options.part or COUNTS:
            count, part_began = max(1, int(COUNTS[part] * options.sample)), time.monotonic()
            for number in range(count):
                state.update(case=again % (part, number), began=time.monotonic())
                wrong = run_case(bench, options.seed, part, number)
                if wrong:
                    failures.setdefault(wrong, []).append((again % (part, number), bench.said))
            seconds = time.monotonic() - part_began
            print("%s: %d in %.0f s, %.0f a second" % (part, count, seconds, count / seconds), flush=True)
    shown = 0
    for wrong, cases in sorted(failures.items(), key=lambda item: -len(item[1])):
        print("\n%d x %s" % (len(cases), wrong))
        for command, said in cases[:3]:
            shown += 1
            if shown <= options.show:
                print("  %s\n    %s" % (command, said[:1500].replace("\n", "\n    ")))
    total = sum(map(len, failures.values()))
    print("%d failed, %.0f s, seed %d" % (total, time.monotonic() - began, options.seed))
    return total > 0


if __name__ == "__main__":
    sys.exit(main())
