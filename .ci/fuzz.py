#!/usr/bin/env python3
"""Command lines, secret files and answers of a control plane, most of them with one thing wrong.

    .ci/venv/bin/pip install pytest hypothesis
    .ci/venv/bin/python .ci/fuzz.py                                  10,000 of each, three minutes
    .ci/venv/bin/python .ci/fuzz.py --examples 300 --part answers    300 answers

hypothesis makes the examples, and shrinks one that fails to its smallest form. Failures are kept in
.ci/.hypothesis, and tried first by the next run.

plexctl.py is loaded as a module: main() and the client of the control plane are called, against a server on
loopback that sends prepared bytes. Some tables of what is wrong are those of test_plexctl.py, where each is
tried alone; here they meet other options, other shapes of an answer, and what hypothesis thinks of. In
every case: an exit code of the contract, that of the fault where it is known; on failure one line
`plexctl: error:` of printable ASCII and nothing on stdout, on success the right document; no traceback, no
secret, also not in an exception's chain; no session left without a word. Linux, Python 3.9 or later.
"""

import argparse
import collections
import contextlib
import faulthandler
import http.client
import importlib.util
import io
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time

import hypothesis
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import test_plexctl as simulator

EXAMPLES = 10000
CONTRACT = {0, 1, 2, 3, 4, 77, 126, 127}
HANG_SECONDS = 45
PLANE_NAME = "plane.example"  # resolves to the server here, so that it is not a loopback one by name
BEARER, TOKEN, STRAY = "psk-5b1fc0e6a7d94283", "eyJ-93d7ae41f08b6c25", "psk-e27c60d18f3ab954c07d51"
SECRETS = (BEARER, TOKEN, STRAY)
SESSION_ID = "0190a8b8-5e55-7e55-8e55-0123456789ab"
ENDPOINT = "100.64.0.12:40213"
RESET = object()
HOSTILE = ["\x1b[2J\x1b]0;title\x07", "a\r\nplexctl: error: forged", "\u202e\u2066", "x" * 100000,
           "\x00\x7f\x80\x9b31m", "%s%d{0}", "\U0001f600", "  \u2028 ", simulator.NASTY]
BAD_MEMBERS = st.sampled_from([b'"x": NaN', b'"x": 1, "x": 1', b'"x": 1e400', b'"x": "\\ud800"',
                               b'"x": %s1%s' % (b"[" * 30000, b"]" * 30000)])
NO_JSON = st.sampled_from([b"", b" ", b"<html>", b"NaN", b"{}", b"{'a': 1}", b'"\\ud800"', b"\xff", b"7" * 99,
                           b"[" * 50000, b'{"a": 1, "a": 1}', b"\xef\xbb\xbf{}", "{}".encode("utf-16")])
ANYTHING = st.sampled_from([None, 0, -1, 1e9, True, [], {}, ["x"], {"x": 1}] + HOSTILE) | st.text(max_size=40)


def check(condition, text, *values):
    """What plexctl did is what it should have done."""
    if not condition:
        raise AssertionError(text % values if values else text)


def leaks(text):
    """Whether a text has a secret, or eight characters of one."""
    return any(secret[at:at + 8] in text for secret in SECRETS for at in range(4, len(secret) - 7))


@st.composite
def spoilt(draw, raw):
    """The same bytes, up to four of them changed; a secret that is changed could not be known again."""
    changed = bytearray(raw)
    places = st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255))
    for at, byte in draw(st.lists(places, min_size=1, max_size=4)):
        changed[at] = byte
    for found in re.finditer("|".join(SECRETS).encode(), raw):
        changed[found.start():found.end()] = found.group()
    return bytes(changed)


# ---- the server: prepared bytes ---------------------------------------------------------------------------

Request = collections.namedtuple("Request", "operation path headers body")


class Plane:
    """A server on loopback. `steps` has what each operation is answered: bytes, seconds to wait, RESET."""

    def __init__(self):
        self.seen, self.steps = [], {}
        self.port = simulator.Listener(self._serve).address[1]
        self.url = "http://127.0.0.1:%d" % self.port

    def begin(self, **steps):
        """Forget the example before this one."""
        self.seen, self.steps = [], dict({"revoke": [answer_bytes(204)]}, **steps)

    def operations(self):
        """What was asked for, in order."""
        return [request.operation for request in self.seen]

    def _serve(self, connection, _listener):
        with contextlib.suppress(ValueError), connection.makefile("rb") as stream:
            method, path, _ = stream.readline().decode("latin-1").split()
            headers = http.client.parse_headers(stream)
            body = stream.read(int(headers["Content-Length"] or 0))
            operation = simulator.route(method, path)[0]
            self.seen.append(Request(operation, path, headers, body))
            for step in self.steps.get(operation, [REFUSAL]):
                if isinstance(step, bytes):
                    connection.sendall(step)
                elif step is RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, simulator.RESET_ON_CLOSE)
                else:
                    time.sleep(step)


def answer_head(status, headers=()):
    """The head of an answer, without its length."""
    lines = ["HTTP/1.1 %d Word" % status, "Content-Type: application/json", "Connection: close"]
    return "\r\n".join(lines + ["%s: %s" % item for item in headers]).encode("latin-1")


def sized(head, body, length=None):
    """An answer with a Content-Length."""
    return b"%s\r\nContent-Length: %s\r\n\r\n%s" % (head, length or b"%d" % len(body), body)


def answer_bytes(status, document=None):
    """An ordinary answer."""
    return sized(answer_head(status), b"" if document is None else json.dumps(document).encode())


REFUSAL = answer_bytes(403, {"code": "no", "title": "no", "status": 403})


def know_names(real):
    """getaddrinfo that has PLANE_NAME here and every other name elsewhere, and asks no one."""
    def getaddrinfo(host, *more, **named):
        if host == PLANE_NAME or re.search("[.][a-z]+$", host):
            host = "127.0.0.1" if host == PLANE_NAME else "192.0.2.7"
        return real(host, *more, **named)
    return getaddrinfo


# ---- what every run of main() must keep to ----------------------------------------------------------------

class Bench:
    """The module, a scratch directory, the server; one example at a time. `said` tells what it was."""

    def __init__(self, path, scratch):
        spec = importlib.util.spec_from_file_location("plexctl", path)
        self.plexctl = sys.modules["plexctl"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.plexctl)
        self.scratch, self.plane, self.said = scratch, Plane(), ""
        os.makedirs(os.path.join(scratch, "plexctl"))

    def main(self, argv, **environ):
        """main() as a command would be: exit code, stdout, stderr; checked against the contract."""
        environ.update(HOME=self.scratch, PATH=os.defpath, XDG_CONFIG_HOME=self.scratch,
                       PLEXCTL_AUDIT_LOG=os.path.join(self.scratch, "audit.log"))
        self.said += "\nargv %r" % (argv,)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.plexctl.main(argv, environ)
            except BaseException as error:
                raise AssertionError("main raised %s" % type(error).__name__) from error
        out, err = out.getvalue(), err.getvalue()
        self.said += "\nexit %s\nstdout %r\nstderr %r" % (code, out, err)
        rest = re.sub("(?m)^PLEXCTL_SESSION_TOKEN=%s\n" % TOKEN, "", err, count=1)
        lines = rest.splitlines()
        check(code in CONTRACT, "exit code %s is not in the contract", code)
        check(not leaks(out + rest), "a secret was shown")
        check(all(" " <= c <= "~" or c == "\n" for c in out + err), "what is printed is not printable ASCII")
        check(all(re.match("plexctl: ...", line) for line in lines), "a line without plexctl:")
        check("Traceback" not in err and "internal error" not in err, "a defect is reported")
        errors = [line for line in lines if line.startswith("plexctl: error: ")]
        check(len(errors) == (code != 0), "%d error lines with exit code %d", len(errors), code)
        check(not (code and out), "something on stdout with exit code %d", code)
        check(code != 2 or len(lines) == 1, "a usage error is more than one line")
        return code, out, err

    def check_document(self, out, output, endpoint=ENDPOINT, host=simulator.HOST, port=simulator.PORT):
        """The document on stdout is that of the session."""
        document = simulator.parse_document(out, output)
        check(document["session_id"] == SESSION_ID, "another session id in the document")
        check(document["listener_endpoint"] == endpoint, "another endpoint in the document")
        document["target"]["host"] = document["target"]["host"].strip("[]")  # text has it as host:port
        check(document["target"] == {"host": host, "port": port}, "another target in the document")

    def check_sessions(self, code, err, is_known):
        """No session left without a word: in use, revoked once, or a line about it."""
        operations = self.plane.operations()
        revoked = [SESSION_ID in each.path for each in self.plane.seen if each.operation == "revoke"]
        if code == 0:
            check(not revoked, "a session in use was revoked")
        elif is_known and "issue" in operations:
            check(revoked == [True] or not revoked and "may exist" in err,
                  "%d revocations of the session, and no word of it", len(revoked))


# ---- command lines ----------------------------------------------------------------------------------------

IDS = [simulator.PROJECT_ID, simulator.PROJECT_ID.upper(), "00000000-0000-0000-0000-000000000000"]
SWITCHES = ["--yes", "--allow-http", "--reveal-secrets", "--renew", "--keep-session", "--allow-other-users"]
GOOD = {
    "--project-id": IDS, "--resource-id": IDS, "--port": ["1", "5432", "65535", "080"],
    "--host": ["10.0.0.5", "db.internal", "fd00::5", "x" * 200, "a_b", "1"],
    "--ttl-seconds": ["0", "1", "1800", "000"], "--output": ["text", "json", "yaml"],
    "--max-sessions": ["2", "4", "32"], "--min-sessions": ["1", "3"],
    "--wait-seconds": ["0", "0.0", "1.5", "90"],
    "--local-addr": ["127.0.0.1:0", "[::1]:0", "localhost:0", "127.0.0.2:0"]}
REQUIRED = ["--project-id", "--resource-id", "--host", "--port"]
EVERYWHERE = ["--ttl-seconds", "--wait-seconds", "--output", "--yes", "--reveal-secrets"]
MODES = {  # what may be given in each, besides
    "print": ["--local-addr", "--allow-http"], "--stdio": ["--keep-session"],
    "--proxy": ["--local-addr", "--max-sessions", "--min-sessions"] + SWITCHES[3:],
    "command": ["--local-addr", "--max-sessions", "--min-sessions"] + SWITCHES[3:]}
STRANGE = ["--token", "-x", "---", "--Port", "--reveal_secrets", "--\x1b[31m", "-\u00e9", "--no-proxy", "-V",
           "--token=" + STRAY, STRAY, "=", "--=", "-", "\x1b]0;x\x07", "\udcff", "\u202e", "a" * 5000, "--",
           "-h", "--version", "-vvv", "true", "{host}", "tcp-forward", "--proxy", "--stdio"]
LINE = ["tcp-forward"] + simulator.REQUIRED_FLAGS


@st.composite
def spelled(draw, flag, value):
    """An option as one word or two; a value that starts with a hyphen needs the first way."""
    if flag in SWITCHES or flag in MODES:
        return draw(st.sampled_from([[flag], [flag + "=true"]]))
    return draw(st.sampled_from([[flag + "=" + value]] + [[flag, value]] * (value[:1] != "-")))


@st.composite
def options(draw, flags, required=()):
    """Some of these options with good values, and all that are required: [(flag, value)], in any order."""
    chosen = draw(st.lists(st.sampled_from(flags), unique=True, max_size=5))
    return [(flag, draw(st.sampled_from(GOOD.get(flag, [True]))))
            for flag in draw(st.permutations([*required, *chosen]))]


@st.composite
def good_lines(draw):
    """A command line, its mode, the values in it."""
    mode = draw(st.sampled_from(sorted(MODES)))
    values = draw(options(EVERYWHERE + MODES[mode], REQUIRED + [mode] * mode.startswith("--")))
    before, after = [], []
    for flag, value in values:
        draw(st.sampled_from((after, before))).extend(draw(spelled(flag, value)))
    for flag in draw(st.lists(st.sampled_from(REQUIRED), max_size=2)):  # the last one wins
        before[:0] = draw(spelled(flag, draw(st.sampled_from(GOOD[flag]))))
    command = ["--", "true", "{host}", "--proxy", "-h"] if mode == "command" else []
    verbose = draw(st.sampled_from(([], ["-v"], ["-vv"], ["--verbose"])))
    return verbose + before + ["tcp-forward"] + after + command, mode, dict(values)


@st.composite
def wrong_lines(draw):
    """A command line with one thing wrong."""
    front = [word for pair in draw(options(EVERYWHERE)) for word in draw(spelled(*pair))]
    if draw(st.booleans()):
        return front + draw(st.sampled_from(simulator.USAGE_ERRORS))[0]
    flag = draw(st.sampled_from(SWITCHES + sorted(GOOD.keys() - {"--host"})))
    value = draw(st.just("--") | st.text().filter(lambda text: not re.fullmatch("[0-9.]+|[a-z]+", text)))
    return front + LINE + ["%s=%s" % (flag, value)]


@st.composite
def soups(draw):
    """Words that belong, and some that do not, in any order, with something within one of them."""
    known = [word for flag in GOOD for word in (flag, flag + "=" + GOOD[flag][0], GOOD[flag][-1])]
    pool = known + STRANGE + SWITCHES + [flag + "=false" for flag in SWITCHES]
    argv = draw(st.sampled_from(([], LINE))) + draw(st.lists(st.sampled_from(pool), max_size=14))
    if argv and draw(st.booleans()):
        at, text = draw(st.integers(0, len(argv) - 1)), draw(st.text(max_size=3))
        cut = draw(st.integers(0, len(argv[at])))
        argv[at] = argv[at][:cut] + text + argv[at][cut + draw(st.integers(0, 1)):]
    if "--" in argv:  # the name of a COMMAND that is not there is shown, whatever it is
        argv[argv.index("--") + 1:] = ["true"]
    return argv


def fuzz_lines(bench, draw):
    """main() with a command line. A mode that would stay is refused by the server, with 403."""
    kind = draw(st.sampled_from(("good", "wrong", "wrong", "soup")))
    mode, values, codes = "", {}, CONTRACT
    if kind == "good":
        argv, mode, values = draw(good_lines())
        codes = {0 if mode == "print" else 4}
    elif kind == "wrong":
        argv, codes = draw(wrong_lines()), {2}
    else:
        argv = draw(soups())
    bench.plane.begin(issue=[answer_bytes(201, issued_session(ENDPOINT)) if mode == "print" else REFUSAL])
    bench.said = "%s, expected %s" % (kind, sorted(codes))
    if int(values.get("--min-sessions", 1)) > int(values.get("--max-sessions", 4)):
        codes = {2}
    code, out, err = bench.main(argv, PLEXSPHERE_URL=bench.plane.url, PLEXSPHERE_TOKEN=BEARER)
    check(code in codes, "exit code %d, not %s", code, sorted(codes))
    check(code != 2 or not bench.plane.seen, "a request was sent for a command line that is wrong")
    if kind != "good":
        return
    bench.check_sessions(code, err, is_known=mode == "print")
    host, port, ttl = values["--host"], int(values["--port"]), int(values.get("--ttl-seconds", 0))
    for request in bench.plane.seen:
        body = json.loads(request.body)
        check(body["target"] == {"tcp": {"host": host, "port": port}}, "asked for another target: %s", body)
        check(body["resource_id"] == values["--resource-id"].lower(), "asked for another Resource")
        check(body.get("requested_ttl_seconds") == (ttl or None), "asked for another TTL: %s", body)
    if code == 0:
        bench.check_document(out, values.get("--output", "text"), host=host, port=port)
        check((TOKEN in err) == ("--reveal-secrets" in values), "the token is shown to whoever asks for it")


# ---- token and config files -------------------------------------------------------------------------------

BAD_TOKENS = st.sampled_from([b"", b"\n", b" psk_1", b"psk 1", b"Bearer psk_1", b"psk_1\x7f", b"psk_\xc2\xa0",
                              b"\xef\xbb\xbfpsk_1", b"psk\r\nX-Header: 1", b"psk_1\n\n", b"a" * 8193])
ENDS = st.sampled_from([b"", b"\n", b"\r\n", b"\n\n", b"\nX: y", b"\r", b"\0", b"\x1c", b"\x85"])
LENGTHS = st.sampled_from([1, 8192, 8193, 65536, 65537])
TOKENS = (BAD_TOKENS | st.binary(max_size=80) | ENDS.map(lambda end: BEARER.encode() + end)
          | st.binary(min_size=1, max_size=1).map(lambda byte: byte.join([b"psk-5b1f", b"c0e6a7d9"]))
          | LENGTHS.map(lambda length: (BEARER * 4000)[:length].encode()))


def read_token(raw):
    """What SPEC section 2 says of the bytes of a token: the token, None if it is none."""
    kept = re.sub(rb"\r?\n\Z", b"", raw)
    return kept.decode() if re.fullmatch(rb"[!-~]{1,8192}", kept) else None


@st.composite
def config_files(draw, url):
    """The bytes of a config file, and the exit codes that they lead to."""
    document = {"default": "prod", "profiles": {"prod": {"server": url, "token": BEARER}}}
    profiles, prod, raw = document["profiles"], document["profiles"]["prod"], json.dumps(document).encode()
    kind = draw(st.sampled_from(("good", "value", "token", "text", "spoilt")))
    if kind == "value":
        where, name = draw(st.sampled_from([(document, "profiles"), (document, "default"), (profiles, "prod"),
                                            (prod, "server"), (prod, "token"), (prod, "more")]))
        where[name] = draw(st.sampled_from([None, 1, True, [], [BEARER], {"a": BEARER}, 1e308]))
        return json.dumps(document).encode(), {3}
    if kind == "token":
        prod["token"] = draw(BAD_TOKENS).decode("latin-1")
        return json.dumps(document).encode(), {3}
    if kind == "text":
        return draw(NO_JSON | st.integers(0, len(raw) - 1).map(lambda cut: raw[:cut])
                    | st.just(raw.replace(BEARER.encode(), b"\\ud800"))), {3}
    return (draw(spoilt(raw)), CONTRACT - {0}) if kind == "spoilt" else (raw, {4})


def fuzz_files(bench, draw):
    """main() with a token or config file. The server refuses with 403, and sees the token or nothing."""
    bench.plane.begin()
    mode = draw(st.sampled_from([0o600, 0o600, 0o600, 0o400, 0o640, 0o604, 0o610]))
    argv, environ, token = LINE, {}, BEARER
    if draw(st.booleans()):
        raw = draw(TOKENS)
        token, environ = read_token(raw), {"PLEXSPHERE_URL": bench.plane.url}
        path = os.path.join(bench.scratch, draw(st.sampled_from(("token", "t\u00e9 x", "x\x1b[31m", "-"))))
        argv, codes = argv + ["--token-file", path], {4} if token else {3}
    else:
        raw, codes = draw(config_files(bench.plane.url))
        argv = argv + draw(st.sampled_from(([], ["--profile", "prod"])))
        path = os.path.join(bench.scratch, "plexctl", "config.json")
    codes = {3} if mode & 0o077 else codes
    bench.said = "mode %o, %r, expected %s" % (mode, raw[:300], sorted(codes))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    simulator.write_private(path, raw, mode)
    code, _out, _err = bench.main(argv, **environ)
    os.unlink(path)
    check(code in codes, "exit code %d, not %s", code, sorted(codes))
    check(code in (1, 4) or not bench.plane.seen, "a request was sent all the same")
    if codes == {4}:
        check(bench.plane.seen[0].headers["Authorization"] == "Bearer " + token, "another token was sent")


# ---- answers ----------------------------------------------------------------------------------------------

TIMES = ["2099-05-02t10:30:00z", "2099-05-02T10:30:60.123456789Z", "2099-05-02T10:30:00+05:30",
         "2001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"]
BAD_VALUES = collections.defaultdict(list)  # by the path of a field
for bad_path, bad_value in simulator.BAD_FIELDS:
    BAD_VALUES[bad_path].append(bad_value)
ENDPOINTS = [ENDPOINT, "node.example:1", "[2001:db8::1]:65535", "[fd00::1]:80", "n-1.a:5", "8.8.8.8:53"]
NEAR = ["127.0.0.1:80", "127.9.9.9:80", "0.0.0.0:80", "[::1]:80"]  # which a server on loopback may name
NEVER = ["169.254.169.254:80", "[fe80::1]:80", "[::ffff:169.254.169.254]:80", "[::ffff:127.0.0.1]:80",
         "224.0.0.1:80", "[ff02::1]:80", "[::]:80"]
STATUSES = st.sampled_from([204, 401, 403, 403, 404, 407, 409, 410, 429, 503]) | st.integers(200, 999)
PROBLEM_CODES = ["", "x", "rebac_denied", "step_up_required", "session_limit_exceeded", "idempotent_replay"]
PROBLEM_WORDS = [BEARER, "x" * 290 + BEARER, ["a", BEARER], {"x": BEARER}, 5, None] + HOSTILE
PROBLEM_HEADERS = [("Retry-After", value) for value in ("0", "x", "-1", "9" * 400, "\u00b2")] + [
    ("Location", value) for value in ("http://127.0.0.1:1/" + BEARER, "\x1b[31m", "file:///etc/passwd")] + [
    ("WWW-Authenticate", 'Bearer acr_values="%s"' % value) for value in (BEARER, "\x1b[31m", "x" * 5000)]
PROBLEM_BODIES = [b"", b"<html>%s</html>" % BEARER.encode(), b"[" * 50000, b'{"code": "\xff"}', b"null"]


def issued_session(endpoint, is_nested=False):
    """A good IssuedSession, with the endpoint in one of the two places."""
    now = time.time()
    session = {
        "id": SESSION_ID, "project_id": simulator.PROJECT_ID, "domain_id": simulator.DOMAIN_ID,
        "resource_id": simulator.RESOURCE_ID, "identity_id": simulator.IDENTITY_ID, "kind": "tcp",
        "status": "active", "issued_at": simulator.stamp(now), "expires_at": simulator.stamp(now + 1800),
        "last_active_at": simulator.stamp(now), "idle_timeout_seconds": 900,
        "target": {"tcp": {"host": simulator.HOST, "port": simulator.PORT}}}
    document = {"session_id": SESSION_ID, "token": TOKEN, "expires_at": session["expires_at"],
                "session": session}
    (session if is_nested else document)["listener_endpoint"] = endpoint
    return document


class Case:
    """An answer, and what must come of it: "ok", "error" with one of these exit codes, or "any"."""

    def __init__(self, operation, endpoint):
        self.operation, self.endpoint, self.headers = operation, endpoint, []
        self.status = {"issue": 201, "get": 200, "revoke": 204}[operation]
        self.outcome, self.codes, self.name, self.shape, self.steps = "ok", {0}, "good", "as usual", []
        self.is_known = self.may_exist = False  # the session's id can be read; a session may exist

    def fail(self, name, *codes, outcome="error"):
        """It cannot succeed."""
        self.name, self.outcome, self.codes = name, outcome, set(codes or (1,))


@st.composite
def cases(draw, operation, is_local):
    """A Case; `is_local`: the server is on loopback, by its name."""
    kind = draw(st.sampled_from(("good", "field", "field", "json", "values", "endpoint", "secret", "more",
                                 "problem", "problem") if operation != "revoke" else ("good", "problem")))
    case = Case(operation, draw(st.sampled_from(ENDPOINTS + NEAR * (is_local and kind == "endpoint"))))
    document = issued_session(case.endpoint, is_nested=operation == "get" or draw(st.booleans()))
    session = document["session"]
    top = {"issue": document, "get": session, "revoke": None}[operation]
    case.name, case.is_known = kind, operation == "issue"
    if kind == "field":
        path = draw(st.sampled_from([path for path in sorted(BAD_VALUES) if
                                     operation == "issue" or path[0] == "session" != path[-1]]))
        value = draw(st.sampled_from(BAD_VALUES[path]))
        (session if len(path) == 2 else document)[path[-1]] = value
        case.fail("field %s: %.60r" % (path, value))
    elif kind == "values":
        document["expires_at"] = session["expires_at"] = draw(st.sampled_from(TIMES))
        session["status"] = draw(st.sampled_from(("active", "expired", "revoked")))
        session["issued_at"] = draw(st.sampled_from((None, "2001-01-01T00:00:00Z", session["issued_at"])))
    elif kind == "endpoint" and not (is_local and draw(st.booleans())):
        for each in (document, session):
            each.pop("listener_endpoint", None)
        where = draw(st.sampled_from((top, session)))
        where["listener_endpoint"] = draw(st.sampled_from(NEVER[:3] if is_local else NEVER + NEAR))
        case.fail("endpoint " + where["listener_endpoint"])
    elif kind == "secret":  # get has not seen the session's token
        secret = draw(st.sampled_from((BEARER, TOKEN) if operation == "issue" else (BEARER,)))
        where, name = draw(st.sampled_from((top, session))), draw(st.sampled_from(
            ("listener_endpoint", "status", "kind", "expires_at", "id", "revoke_reason")))
        where[name] = secret + ":80" if name == "listener_endpoint" else secret
        # one that is not read there does no harm
        case.fail("a secret as " + name, outcome="error" if name == "listener_endpoint" else "any")
    elif kind == "more":
        where, name = draw(st.sampled_from((top, session))), draw(st.sampled_from(("x", "", "\x1b")))
        where[name] = draw(ANYTHING)
    elif kind == "problem":
        top = draw(problems(case))
    body = b"" if top is None else top if isinstance(top, bytes) else json.dumps(top).encode()
    if kind == "json":
        body = draw(BAD_MEMBERS.map(lambda member: body.replace(b"{", b"{%s, " % member, 1)) | NO_JSON
                    | st.integers(0, len(body) - 1).map(lambda cut: body[:cut])
                    | st.sampled_from([body + b"{}", b"[%s]" % body, b"\x1f\x8b" + body, body + b"\xff"]))
        case.fail("json")
        case.is_known, case.may_exist = False, operation == "issue"
    draw(shaped(case, b"" if case.status == 204 else body))
    return case


@st.composite
def problems(draw, case):
    """The document of an error, with its status and headers; some of it hostile."""
    case.status, code = draw(STATUSES), draw(st.sampled_from(PROBLEM_CODES))
    case.headers = draw(st.lists(st.sampled_from(PROBLEM_HEADERS), unique_by=lambda item: item[0]))
    case.fail("problem %d %s" % (case.status, code),
              {401: 3, 403: 77 if code == "rebac_denied" else 4}.get(case.status, 1))
    if case.operation == "revoke" and (case.status < 300 or case.status in (404, 409, 410)):
        case.outcome = "any" if case.status < 300 and case.status != 204 else "ok"
    case.is_known = False
    if draw(st.integers(0, 2)) == 0:
        case.codes = {4} if case.status == 403 else case.codes
        return draw(st.sampled_from(PROBLEM_BODIES) | st.binary(max_size=80))
    document = {name: draw(st.sampled_from(PROBLEM_WORDS) | st.text(max_size=40))
                for name in ("title", "detail", "reason", "relation_path", "correlation_id")}
    return dict(document, status=case.status, **{"code": code} if code else {})


def chunked(head, body, size):
    """An answer in chunks."""
    pieces = [body[at:at + size] for at in range(0, len(body), size)]
    return b"%s\r\nTransfer-Encoding: chunked\r\n\r\n%s0\r\nX: y\r\n\r\n" % (
        head, b"".join(b"%x;a=b\r\n%s\r\n" % (len(piece), piece) for piece in pieces))


def part(raw, number):
    """The beginning of these bytes; not all of them."""
    return raw[:number % max(1, len(raw))]


ODD_HEADERS = [b"no colon", b": empty", b" folded: x", b"X\0: y", b"X: \xff\xfe", b"X y: z", b"Date: never",
               b"Content-Encoding: gzip", b"Retry-After: \x1b[31m", b"Transfer-Encoding: x",
               b"Content-Length: -1", b"Content-Length: x", b"Content-Length: ", b"Content-Length: 5, 5"]
ODD_STATUS_LINES = [b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 x", b"HTTP/1.1 20", b"HTTP/1.1 -200 x", b"{}",
                    b"HTTP/9.9 200 x", b"HTTP/0.9 200", b"ICY 200 OK", b"\x16\x03\x01", b"HTTP/1.1\t200 OK"]
NO_HTTP = sorted(simulator.NOT_HTTP.values())
# name: head, body, a number -> steps. The same answer; none that anybody could take for one; who knows
SAME = {
    "to the end": lambda head, body, n: [head + b"\r\n\r\n" + body],
    "chunked": lambda head, body, n: [chunked(head, body, n % 900 + 1)],
    "in pieces": lambda head, body, n: [sized(head, b"", b"%d" % len(body)), body[:n], 0.01, body[n:]],
    "after 100": lambda head, body, n: [b"HTTP/1.1 100 Continue\r\n\r\n" * (n % 4 + 1) + sized(head, body)]}
TORN = {
    "cut": lambda head, body, n: [part(sized(head, body), n)],
    "cut and reset": lambda head, body, n: [part(sized(head, body), n), 0.02, RESET],
    "large": lambda head, body, n: [sized(head, body + b" " * (1 << 20))],
    "long length": lambda head, body, n: [sized(head, body, b"%d" % (len(body) + 1 + n % 99))],
    "reset": lambda head, body, n: [RESET],
    "no HTTP": lambda head, body, n: [NO_HTTP[n % len(NO_HTTP)]]}
ODD = {
    "short length": lambda head, body, n: [sized(head, body, b"%d" % (n % max(1, len(body))))],
    "odd header": lambda head, body, n: [sized(head + b"\r\n" + ODD_HEADERS[n % len(ODD_HEADERS)], body)],
    "odd status line": lambda head, body, n: [ODD_STATUS_LINES[n % len(ODD_STATUS_LINES)] + b"\r\n"
                                              + sized(head, body).partition(b"\r\n")[2]],
    "noise": lambda head, body, n: []}


@st.composite
def shaped(draw, case, body):
    """Give a case its bytes: as usual, in another shape that is right too, torn, or odd."""
    head = answer_head(case.status, case.headers)
    if not draw(st.integers(0, 2)):
        shapes = draw(st.sampled_from((SAME, TORN, ODD)))
        case.shape = draw(st.sampled_from(sorted(shapes)))
        case.steps = shapes[case.shape](head, body, draw(st.integers(0, 9999)))
        # a revocation that is answered with 200 has happened, also if that is cut off amid its head
        if shapes is TORN and case.status in (200, 201) and body and case.operation != "revoke":
            case.outcome, case.codes, case.may_exist = "error", {1}, case.operation == "issue"
        elif shapes is not SAME:  # of an error the status is known; the body was only to explain it
            case.outcome, case.may_exist = "any", False
        case.is_known = case.is_known and shapes is SAME
    if case.shape == "noise":
        case.steps = [draw(spoilt(sized(head, body)))]
    case.steps = case.steps or [sized(head, body)]


def chain_text(error):
    """Everything that an exception and those behind it say."""
    text, seen = "", set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text += "%s %r %s\n" % (error, error.args, " ".join(map(repr, vars(error).values())))
        error = error.__cause__ or error.__context__
    return text


def fuzz_answers(bench, draw):
    """One exchange with the client of the control plane, or a whole print mode of main()."""
    operation, is_local = draw(st.sampled_from(("issue", "issue", "get", "revoke"))), draw(st.booleans())
    case = draw(cases(operation, is_local))
    bench.plane.begin(**{operation: case.steps})
    url = bench.plane.url if is_local else "http://%s:%d" % (PLANE_NAME, bench.plane.port)
    bench.said = "%s: %s, http: %s, expected %s %s" % (
        operation, case.name, case.shape, case.outcome, sorted(case.codes))
    is_quick = case.shape == "as usual" and case.status not in (409, 429, 502, 503, 504)
    if operation == "issue" and is_quick and draw(st.booleans()):
        try_main(bench, draw, case, url)
    else:
        try_client(bench, case, url)


def try_client(bench, case, url):
    """One operation of the client."""
    plexctl, lines, ids, cancel = bench.plexctl, [], [], threading.Event()
    if case.operation != "get" and (("Retry-After", "0") not in case.headers or case.outcome == "any"):
        cancel.set()  # one attempt, no pause
    plane = plexctl.ControlPlane(plexctl.parse_server(url, True), plexctl.Secret(BEARER), environ={},
                                 cancel=cancel, say=lines.append)
    request = plexctl.SessionRequest(simulator.PROJECT_ID, simulator.RESOURCE_ID, "10.0.0.5", 22)
    error = result = None
    try:
        result = {"issue": lambda: plane.issue(request, ids.append),
                  "get": lambda: plane.get(simulator.PROJECT_ID, SESSION_ID),
                  "revoke": lambda: plane.revoke(simulator.PROJECT_ID, SESSION_ID)}[case.operation]()
    except plexctl.PlexctlError as failure:
        error = failure
    except Exception as failure:
        raise AssertionError("%s was raised: not a PlexctlError" % type(failure).__name__) from failure
    bench.said += "\nresult %r\nerror %r" % (result, error)
    check(not leaks("\n".join(lines) + repr(result)), "a secret was reported, or is in a repr")
    check(case.outcome == "any" or (error is None) == (case.outcome == "ok"), "it failed, or it did not")
    if error is not None:
        text = str(error)
        check(error.exit_code in (CONTRACT - {0} if case.outcome == "any" else case.codes),
              "exit code %s", error.exit_code)
        check(text and all(" " <= c <= "~" for c in text), "its text is not printable ASCII")
        check(len(text) < 4000, "its text has %d characters", len(text))
        check(not leaks(chain_text(error)), "a secret is in the exception or behind it")
        check(not case.may_exist or "may exist" in text or ids, "a session may exist, and no word of it")
    if case.operation == "issue":
        keys = {json.loads(each.body)["idempotency_key"] for each in bench.plane.seen}
        check(len(keys) == 1 and len(bench.plane.seen) <= 3, "%d keys, or too many requests", len(keys))
        check(not case.is_known or ids == [SESSION_ID], "the session's id was not told")
    if result is not None and case.outcome == "ok":
        check(result.session_id == SESSION_ID, "another session id")
        check(str(result.listener_endpoint) == case.endpoint, "another endpoint")
        check(case.operation != "issue" or result.token.reveal() == TOKEN, "another token")


def try_main(bench, draw, case, url):
    """Print mode, from the command line to what is left on the server."""
    output, extra = draw(st.sampled_from(GOOD["--output"])), draw(st.lists(st.sampled_from(
        ("--reveal-secrets", "-v")), unique=True))
    argv = LINE + ["--allow-http", "--server", url, "--output", output, "--wait-seconds", "0"] + extra
    code, out, err = bench.main(argv, PLEXSPHERE_TOKEN=BEARER)
    if case.outcome == "error":
        check(code in case.codes, "exit code %d", code)
    elif case.outcome == "ok" and case.name != "values":
        check(code == 0, "exit code %d", code)
        bench.check_document(out, output, case.endpoint)
    check("--reveal-secrets" in extra or TOKEN not in err, "the token was revealed, and nobody asked")
    bench.check_sessions(code, err, case.is_known)
    check(not case.may_exist or "may exist" in err or "revoke" in bench.plane.operations(),
          "a session may exist, and no word of it")


# ---- all of it --------------------------------------------------------------------------------------------

PARTS = {"lines": fuzz_lines, "files": fuzz_files, "answers": fuzz_answers}


def create_test(bench, part, examples):
    """The property of a part, as a function without arguments."""
    @hypothesis.settings(max_examples=examples, deadline=None, print_blob=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def holds(data):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            PARTS[part](bench, data.draw)
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
    socket.getaddrinfo = know_names(socket.getaddrinfo)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.plexctl, scratch)
        for part in options.part or PARTS:
            began = time.monotonic()
            create_test(bench, part, options.examples)()
            print("%s: %d hold, %.0f s" % (part, options.examples, time.monotonic() - began), flush=True)


if __name__ == "__main__":
    main()
