"""Tests of plexctl, with the simulator they run against and a demonstration that uses it too.

    python3 test_plexctl.py          show plexctl at work on the simulator, and check what it does
    python3 test_plexctl.py serve    keep the simulator running, to try plexctl by hand
    python3 -m pytest                the tests

The simulator is real sockets on loopback: a control plane that answers by the published API, a Node
with one listener per mediated session, and targets behind it. It needs only the standard library.
"""
import collections
import hashlib
import http.server
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from typing import Any, NamedTuple, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
PLEXCTL = os.path.join(HERE, "plexctl.py")

PROJECT_ID = "0190a8b8-a0c0-7a0a-8a0a-a0a0a0a0a0c0"
RESOURCE_ID = "0190a8b8-d3e3-7d3d-8d3d-d3d3d3d3d3d3"
DOMAIN_ID = "0190a8b8-a0c0-7a0a-8a0a-a0a0a0a0a0c1"
IDENTITY_ID = "0190a8b8-a0c0-7a0a-8a0a-a0a0a0a0a0a9"
HOST, PORT = "10.0.0.5", 5432
SESSIONS_PATH = "/v1/projects/%s/sessions" % PROJECT_ID
REQUIRED_FLAGS = ["--project-id", PROJECT_ID, "--resource-id", RESOURCE_ID,
                  "--host", HOST, "--port", str(PORT)]

BEARER = "psk_operator-bearer-secret-of-the-simulator"
SESSION_TOKEN_MARK = "c2Vzc2lvbi10b2tlbi1zZWNyZXQ"  # in every session token, so in any leak of one
STEP_UP_ACR = "urn:plexsphere:acr:hardware-key"
RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER on, for 0 s


# ---- simulator: waiting and listening -----------------------------------------------------------

class Watched:
    """Something whose state is waited for: `changed` guards it, and is notified of every change."""

    def __init__(self):
        self.changed = threading.Condition()

    def wait_for(self, predicate, seconds=10):
        """Return predicate() once it is true; AssertionError with the state if not in that time."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while True:
                value = predicate()
                if value:
                    return value
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError("not within %s s: %s" % (seconds, self.describe()))
                self.changed.wait(min(left, 0.05))  # a predicate may look at other things as well

    def describe(self):
        """The state in a line or two, for a failure's message."""
        return repr(self)

    def close(self):
        """Stop; safe to call twice."""

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.close()


class Listener:
    """A loopback listener; serve(connection, listener) runs for each connection, in a thread."""

    def __init__(self, serve, one_at_a_time=False):
        self.serve, self.one_at_a_time = serve, one_at_a_time
        self.connections, self.closed, self._lock = set(), False, threading.Lock()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self._socket.settimeout(0.1)  # macOS: neither shutdown nor close wakes a blocked accept
        self.address = self._socket.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection = self._socket.accept()[0]
            except socket.timeout:
                continue
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections.add(connection)
                late = self.closed
            if late:
                hang_up(connection)
            if self.one_at_a_time:
                self._run(connection)
            else:
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection):
        try:
            self.serve(connection, self)
        except OSError:
            pass
        finally:
            with self._lock:
                self.connections.discard(connection)
                connection.close()

    def refuse(self):
        """Accept nobody any more; what is open goes on."""
        hang_up(self._socket)
        self._socket.close()

    def close(self):
        """Accept nobody any more, and end what is open."""
        self.refuse()
        with self._lock:
            self.closed = True
            for connection in self.connections:
                hang_up(connection)


def hang_up(sock, how=socket.SHUT_RDWR):
    """shutdown(), which wakes the threads blocked on the socket; it may be gone already."""
    try:
        sock.shutdown(how)
    except OSError:
        pass


# ---- simulator: targets -------------------------------------------------------------------------

class Target(Watched):
    """A TCP service behind the Node: serve(connection, target), then a half-close, then a drain.

    `accepted` counts connections; `ends` has "eof" or "reset" for each, as the peer ended it."""

    def __init__(self, serve):
        super().__init__()
        self.serve, self.accepted, self.ends, self.closing = serve, 0, [], threading.Event()
        self._listener = Listener(self._serve)
        self.address = self._listener.address

    def describe(self):
        return "target accepted %d, ends %s" % (self.accepted, self.ends)

    def _serve(self, connection, _listener):
        with self.changed:
            self.accepted += 1
            self.changed.notify_all()
        try:
            self.serve(connection, self)
            hang_up(connection, socket.SHUT_WR)
            for _ in chunks(connection):
                pass
            end = "eof"
        except ConnectionError:
            end = "reset"
        with self.changed:
            self.ends.append(end)
            self.changed.notify_all()

    def close(self):
        self.closing.set()
        self._listener.close()


def chunks(connection):
    """What the peer sends, in pieces, until its end of input."""
    return iter(lambda: connection.recv(1 << 16), b"")


def pattern(size, seed=0):
    """So many bytes that look random and do not repeat; a shorter run is a prefix of a longer."""
    return hashlib.shake_128(b"%d" % seed).digest(size)


def echo(connection, _target):
    """Send back whatever comes."""
    for data in chunks(connection):
        connection.sendall(data)


def source(size, seed=0):
    """A service that sends pattern(size, seed) to whoever connects."""
    data = pattern(size, seed)
    return lambda connection, _target: connection.sendall(data)


def sink_answer(data):
    """What `sink` answers to these bytes: their count in 8 bytes, then their SHA-256."""
    return struct.pack(">Q", len(data)) + hashlib.sha256(data).digest()


def sink(connection, _target):
    """Read to the end of input, then answer as sink_answer() does."""
    count, digest = 0, hashlib.sha256()
    for data in chunks(connection):
        count += len(data)
        digest.update(data)
    connection.sendall(struct.pack(">Q", count) + digest.digest())


LATE_ANSWER = b"what was asked for, long after the question ended"


def late_answer(event):
    """A service that reads to the end of input, waits for the event, then sends LATE_ANSWER."""
    def serve(connection, _target):
        for _ in chunks(connection):
            pass
        event.wait(60)
        connection.sendall(LATE_ANSWER)
    return serve


def resetter(after_bytes):
    """A service that reads so many bytes, then resets the connection; `ends` does not list it."""
    def serve(connection, _target):
        left = after_bytes
        while left > 0:
            left -= len(connection.recv(left)) or left
        reset_close(connection)
    return serve


def reset_close(connection):
    """Close a socket with a reset instead of an end of input."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    connection.close()


def silent(_connection, target):
    """Accept, and neither read nor write, until the target is closed."""
    target.closing.wait()


# ---- simulator: the Node ------------------------------------------------------------------------

class Node(Watched):
    """The on-Node mediated listeners, one per session, all carrying connections to one address.

    As on a real Node a listener serves one connection at a time (the next waits in the backlog),
    and the end of input on either side ends both, unless half_close is true. A reset is passed on
    as a reset. `connections` counts by session."""

    def __init__(self, target_address, one_at_a_time=True, half_close=False):
        super().__init__()
        self.target_address, self.half_close = target_address, half_close
        self.one_at_a_time = one_at_a_time
        self.connections, self._listeners = collections.Counter(), {}

    def describe(self):
        return "node accepted %s" % dict(self.connections)

    def open(self, session_id):
        """Listen for a session; returns the endpoint as host:port."""
        def carry(connection, listener):
            self._carry(session_id, connection, listener)
        with self.changed:
            self._listeners[session_id] = Listener(carry, self.one_at_a_time)
        return self.endpoint(session_id)

    def endpoint(self, session_id):
        """The session's endpoint, the last one if its listener is closed."""
        return "%s:%d" % self._listeners[session_id].address

    def busy(self, session_id):
        """How many connections the session's listener carries now."""
        return len(self._listeners[session_id].connections)

    def refuse(self, session_id):
        """Close the listener only: what is open goes on, and the session stays active."""
        self._listeners[session_id].refuse()

    def close(self, session_id=None):
        """Close one session's listener and connections, or all of them."""
        with self.changed:
            for each in [session_id] if session_id else self._listeners:
                self._listeners[each].close()
            self.changed.notify_all()

    def restart(self):
        """End every connection, and listen on another port for each session that is not closed."""
        with self.changed:
            for session_id, old in list(self._listeners.items()):
                if not old.closed:
                    self.open(session_id)
                    old.close()
            self.changed.notify_all()

    def _carry(self, session_id, client, listener):
        with self.changed:
            self.connections[session_id] += 1
            self.changed.notify_all()
        target = socket.create_connection(self.target_address, 5)
        target.settimeout(None)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reset_seen = threading.Event()
        back = threading.Thread(target=self._pump, args=(target, client, listener, reset_seen))
        back.daemon = True
        back.start()
        self._pump(client, target, listener, reset_seen)
        back.join()
        if reset_seen.is_set():
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        target.close()

    def _pump(self, here, there, listener, reset_seen):
        try:
            for data in chunks(here):
                there.sendall(data)
        except ConnectionResetError:
            reset_seen.set()
        except OSError:
            pass
        if reset_seen.is_set():
            hang_up(there, socket.SHUT_RD)  # wakes the other direction, and sends nothing yet
        elif self.half_close and not listener.closed:
            hang_up(there, socket.SHUT_WR)
        else:
            hang_up(there)
            hang_up(here)


# ---- simulator: the control plane ---------------------------------------------------------------

class Answer(NamedTuple):
    """An HTTP answer: `body` as JSON, or `raw` as it is; headers replace the usual ones."""

    status: int
    body: Any = None
    headers: tuple = ()
    raw: Optional[bytes] = None


class Request(NamedTuple):
    """A request as it was seen; the body is parsed where it is JSON; `time` is time.monotonic()."""

    operation: str  # issue, get, revoke, other
    method: str
    path: str
    ids: tuple  # of the project and the session, as they stand in the path
    headers: Any
    body: Any
    time: float


ROUTES = (  # operation, method, path
    ("issue", "POST", "/v1/projects/([^/]*)/sessions"),
    ("get", "GET", "/v1/projects/([^/]*)/sessions/([^/]*)"),
    ("revoke", "POST", "/v1/projects/([^/]*)/sessions/([^/]*)/revoke"),
)


def route(method, path, prefix=""):
    """Which operation a request line asks for ("other" if none), and the ids in its path."""
    for operation, wanted, shape in ROUTES:
        matched = re.match(re.escape(prefix) + shape + r"\Z", path)
        if matched and method == wanted:
            return operation, matched.groups()
    return "other", ()


REVOKE_REASONS = (
    "operator_request", "policy_violation", "identity_compromise", "resource_decommissioned")
PROBLEMS = {  # name: (status, title, detail, more fields), as published, but for the last one
    "invalid_target": (400, "Bad Request", "target does not match kind", {}),
    "unauthenticated": (401, "Unauthorized", "no valid bearer token", {}),
    "step_up_required": (401, "Unauthorized", "a fresh step-up is required", {}),
    "rebac_denied": (403, "Permission Denied", "request rejected by authorization policy", {
        "reason": "insufficient_relation", "relation_path": ["project:p#operator"],
        "correlation_id": "01HXYZABCDEFGHJKMNPQRSTVWX"}),
    "forbidden": (403, "Forbidden", "request rejected", {
        "reason": "out_of_scope", "correlation_id": "01HXYZABCDEFGHJKMNPQRSTVWX"}),
    "resource_not_found": (404, "Not Found", "the resource does not exist or is not visible", {}),
    "idempotent_replay": (409, "Conflict", "a request with this idempotency key is in flight", {}),
    "session_limit_exceeded": (429, "Too Many Requests", "concurrency cap reached", {}),
    "signing_unavailable": (503, "Service Unavailable", "retry shortly", {}),
    "access_session_not_provisioned": (501, "Not Implemented", "not provisioned in this build", {}),
    "internal": (500, "Internal Server Error", "internal error", {}),
    "session_not_active": (409, "Conflict", "the session is no longer active", {}),
}
CHALLENGES = {
    "unauthenticated": 'Bearer realm="plexsphere"',
    "step_up_required": 'Bearer error="insufficient_user_authentication", '
                        'acr_values="%s"' % STEP_UP_ACR,
}


def problem(name, instance=SESSIONS_PATH, headers=(), **changes):
    """The published example of an error, by its name; changes replace or add fields."""
    status, title, detail, more = PROBLEMS[name]
    body = {"type": "https://plexsphere.com/errors/" + name.replace("_", "-"), "title": title,
            "status": status, "detail": detail, "instance": instance}
    if name != "forbidden":
        body["code"] = name
    body.update(more)
    body.update(changes)
    if name in CHALLENGES:
        headers = (("WWW-Authenticate", CHALLENGES[name]),) + tuple(headers)
    return Answer(body["status"], body, tuple(headers))


def redirect(to, status=302):
    """An answer that points elsewhere."""
    return Answer(status, None, (("Location", to),))


PASS = object()  # in a script: answer this one as usual


def drop(handler, _plane):
    """Close without an answer, and without doing what was asked for."""
    handler.close_connection = True


def reset(handler, _plane):
    """Reset the connection, without doing what was asked for."""
    reset_close(handler.connection)


def process_then_drop(handler, plane):
    """Do what was asked for, then close without an answer."""
    plane.decide(handler.seen)


def hold(until):
    """Do and answer what was asked for, but only once an Event is set or that many seconds on."""
    def step(handler, plane):
        if isinstance(until, threading.Event):
            until.wait(60)
        else:
            plane.closing.wait(until)
        handler.answer_really()
    return step


def drip(handler, plane):
    """Do what was asked for, and send the answer at one byte per 0.1 s."""
    reply = handler.render(plane.decide(handler.seen))
    for position in range(len(reply)):
        handler.wfile.write(reply[position:position + 1])
        if plane.closing.wait(0.1):
            return


def continue_for_ever(handler, plane):
    """Send `100 Continue` over and over, until the client has had enough."""
    while not plane.closing.wait(0.001):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def stamp(seconds):
    """An RFC 3339 time, in UTC and whole seconds, from seconds since the epoch."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class MediatedSession:
    """A session as the control plane keeps it; its times are on the control plane's clock."""

    def __init__(self, plane, project_id, request):
        self._plane, self.project_id, self.resource_id = plane, project_id, request["resource_id"]
        self.target = request["target"]
        self.id = str(uuid.uuid4())
        self.token = "eyJhbGciOiJFZERTQSJ9.%s%s.c2ln" % (SESSION_TOKEN_MARK, self.id)
        self.issued = plane.now()
        self.expires = self.issued + request.get("requested_ttl_seconds", plane.ttl)
        self.issued_at, self.expires_at = stamp(self.issued), stamp(self.expires)
        self.revoked_at = self.revoke_reason = None
        self.reads = 0

    @property
    def status(self):
        """active, revoked or expired."""
        if self.revoked_at:
            return "revoked"
        return "active" if self._plane.now() < self.expires else "expired"

    @property
    def endpoint(self):
        """The listener endpoint as the Node reports it now."""
        return self._plane.node.endpoint(self.id) if self._plane.node else self._plane.endpoint

    def view(self, with_endpoint):
        """The Session object of the API."""
        view = {
            "id": self.id, "project_id": self.project_id, "domain_id": DOMAIN_ID,
            "resource_id": self.resource_id, "identity_id": IDENTITY_ID, "kind": "tcp",
            "status": self.status, "issued_at": self.issued_at, "expires_at": self.expires_at,
            "last_active_at": self.issued_at, "idle_timeout_seconds": 900, "target": self.target}
        if with_endpoint:
            view["listener_endpoint"] = self.endpoint
        if self.revoked_at:
            view.update(revoked_at=self.revoked_at, revoke_reason=self.revoke_reason)
        return view


class ControlPlane(Watched):
    """A control plane on loopback: IssueSession, GetSession and RevokeSession as published.

    tls: an ssl.SSLContext, for https
    node: a Node that opens a listener per session; without one every session has `endpoint`
    endpoint_on: where it is reported: on the IssuedSession ("issue"), on the session inside it
        ("session"), by GetSession only ("read", after so many reads without it), or "never"
    ttl: seconds of a session that asks for none; session_limit: active sessions it allows
    clock_offset: seconds its clock is wrong by; date: whether it sends a Date header
    prefix: a path in front of /v1; bearer: the token it wants

    `requests`, `sessions`, `issued` and `revoked` (ids, by the API only) are in order of time."""

    def __init__(self, *, tls=None, node=None, endpoint="127.0.0.1:9", endpoint_on="issue",
                 reads_before_endpoint=0, ttl=1800, clock_offset=0, date=True, session_limit=None,
                 prefix="", bearer=BEARER):
        super().__init__()
        self.tls, self.node, self.prefix, self.bearer = tls, node, prefix, bearer
        self.endpoint, self.endpoint_on = endpoint, endpoint_on
        self.reads_before_endpoint, self.session_limit = reads_before_endpoint, session_limit
        self.ttl, self.clock_offset, self.date = ttl, clock_offset, date
        self.requests, self.issued, self.revoked, self.closing = [], [], [], threading.Event()
        self._sessions, self._by_key = collections.OrderedDict(), {}
        self._scripts = collections.defaultdict(collections.deque)
        self._listener = Listener(lambda connection, _: PlaneHandler(connection, None, self))
        self.url = "%s://127.0.0.1:%d%s" % (
            "https" if tls else "http", self._listener.address[1], prefix)

    def describe(self):
        return "requests %s; sessions %s" % ([request.operation for request in self.requests],
                                             [(each.id, each.status) for each in self.sessions])

    @property
    def sessions(self):
        """Every session, in the order of issue."""
        with self.changed:
            return list(self._sessions.values())

    def now(self):
        """Seconds since the epoch, on this control plane's clock."""
        return time.time() + self.clock_offset

    def active(self):
        """The ids of the sessions that are active now."""
        return [session.id for session in self.sessions if session.status == "active"]

    def environment(self, **more):
        """What plexctl needs in its environment to come here."""
        return dict({"PLEXSPHERE_URL": self.url, "PLEXSPHERE_TOKEN": self.bearer}, **more)

    def script(self, operation, *answers):
        """What the next requests of an operation get: an Answer, PASS, or f(handler, plane)."""
        with self.changed:
            self._scripts[operation].extend(answers)

    def revoke(self, session_id, reason="operator_request"):
        """Revoke as an operator does elsewhere (not in `revoked`); the Node ends connections."""
        with self.changed:
            session = self._sessions[session_id]
            session.revoked_at, session.revoke_reason = stamp(self.now()), reason
            self._ended(session_id)

    def expire(self, session_id):
        """Let a session run out now; the Node ends its connections."""
        with self.changed:
            self._sessions[session_id].expires = self.now()
            self._ended(session_id)

    def close(self):
        self.closing.set()
        self._listener.close()

    def take_step(self, request):
        """Record a request, and return what the script has for it."""
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
            waiting = self._scripts[request.operation]
            return waiting.popleft() if waiting else PASS

    def decide(self, request):
        """Do what a request asks for, and return the Answer."""
        if request.headers.get("Authorization") != "Bearer " + self.bearer:
            return problem("unauthenticated", request.path)
        if request.operation == "other":
            return problem("resource_not_found", request.path)
        if not all(is_uuid(each) for each in request.ids):
            return problem("invalid_target", request.path, detail="malformed id")
        with self.changed:
            if request.operation == "issue":
                answer = self._issue(request)
            else:
                session = self._sessions.get(request.ids[1])
                if not session or session.project_id != request.ids[0]:
                    return problem("resource_not_found", request.path)
                act = self._get if request.operation == "get" else self._revoke
                answer = act(session, request)
            self.changed.notify_all()
            return answer

    def _issue(self, request):
        wrong = what_is_wrong(request)
        if wrong:
            return problem("invalid_target", request.path, detail=wrong)
        session = self._by_key.get(request.body.get("idempotency_key"))
        if session is None:
            if self.session_limit is not None and len(self.active()) >= self.session_limit:
                return problem("session_limit_exceeded", request.path)
            session = MediatedSession(self, request.ids[0], request.body)
            if self.node:
                self.node.open(session.id)
            self._sessions[session.id] = session
            self.issued.append(session.id)
            if "idempotency_key" in request.body:
                self._by_key[request.body["idempotency_key"]] = session
        body = {"session_id": session.id, "token": session.token, "expires_at": session.expires_at,
                "session": session.view(self.endpoint_on == "session")}
        if self.endpoint_on == "issue":
            body["listener_endpoint"] = session.endpoint
        return Answer(201, body, (("Location", "%s/%s" % (request.path, session.id)),))

    def _get(self, session, _request):
        session.reads += 1
        reported = self.endpoint_on != "read" or session.reads > self.reads_before_endpoint
        return Answer(200, session.view(reported and self.endpoint_on != "never"))

    def _revoke(self, session, request):
        if request.body not in [{"revoke_reason": reason} for reason in REVOKE_REASONS]:
            return problem("invalid_target", request.path, detail="malformed revoke request")
        if session.status != "active":
            return problem("session_not_active", request.path)
        self.revoked.append(session.id)
        self.revoke(session.id, request.body["revoke_reason"])
        return Answer(204)

    def _ended(self, session_id):
        if self.node:
            self.node.close(session_id)
        self.changed.notify_all()


def is_uuid(value):
    """Whether this is a UUID in its canonical form, in lower case."""
    shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"
    return isinstance(value, str) and bool(re.match(shape, value))


def is_whole(value, low, high):
    """Whether this is a JSON integer in that range."""
    return type(value) is int and low <= value <= high


def is_tcp_target(value):
    """Whether this is {"tcp": {"host": ..., "port": ...}}, with nothing else in it."""
    tcp = value.get("tcp") if isinstance(value, dict) and len(value) == 1 else None
    return (isinstance(tcp, dict) and set(tcp) == {"host", "port"} and tcp["host"] != ""
            and isinstance(tcp["host"], str) and is_whole(tcp["port"], 1, 65535))


ISSUE_FIELDS = {
    "resource_id": is_uuid,
    "kind": lambda value: value == "tcp",
    "target": is_tcp_target,
    "requested_ttl_seconds": lambda value: is_whole(value, 1, 10 ** 9),
    "idempotency_key": lambda value: isinstance(value, str) and len(value) <= 4096,
}


def what_is_wrong(request):
    """What the API document has against an IssueSession request; empty if nothing."""
    body = request.body
    if not isinstance(body, dict) or request.headers.get_content_type() != "application/json":
        return "not a JSON object"
    wrong = {name for name, value in body.items()
             if name not in ISSUE_FIELDS or not ISSUE_FIELDS[name](value)}
    return ", ".join(sorted(wrong | ({"resource_id", "kind", "target"} - set(body))))


class PlaneHandler(http.server.BaseHTTPRequestHandler):
    """One connection to the control plane (its `server`), which carries one request: `seen`."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def setup(self):
        """The handshake happens here, in the connection's own thread."""
        if self.server.tls:
            self.request.settimeout(self.timeout)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self):
        """A TLS socket is ours to close: the listener knows only the one beneath."""
        super().finish()
        self.request.close()

    def log_message(self, format, *args):  # pylint: disable=redefined-builtin
        """Say nothing."""

    def handle_request(self):
        """Read a request, and do what the script or the API says."""
        self.close_connection = True
        plane, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(body.decode("utf-8"))
        except ValueError:
            pass
        operation, ids = route(self.command, self.path, plane.prefix)
        self.seen = Request(
            operation, self.command, self.path, ids, self.headers, body, time.monotonic())
        step = plane.take_step(self.seen)
        if step is PASS:
            self.answer_really()
        elif isinstance(step, Answer):
            self.wfile.write(self.render(step))
        else:
            step(self, plane)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_request

    def answer_really(self):
        """Do what was asked for, and answer it."""
        self.wfile.write(self.render(self.server.decide(self.seen)))

    def render(self, answer):
        """The bytes of an answer."""
        raw = answer.raw
        if raw is None:
            raw = b"" if answer.body is None else json.dumps(answer.body).encode("ascii")
        headers = {"Connection": "close", "Server": "plexsphere-simulator"}
        if self.server.date:
            headers["Date"] = self.date_time_string(self.server.now())
        if raw:
            kind = "problem+json" if answer.status >= 400 else "json"
            headers["Content-Type"] = "application/" + kind
        if answer.status != 204:
            headers["Content-Length"] = str(len(raw))
        given = {name.lower() for name, _ in answer.headers}
        reason = self.responses.get(answer.status, ("Unnamed",))[0]
        lines = ["HTTP/1.1 %d %s" % (answer.status, reason)]
        lines += ["%s: %s" % item for item in headers.items() if item[0].lower() not in given]
        lines += ["%s: %s" % item for item in answer.headers]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw


class Simulation:
    """A target, a Node in front of it and a control plane, together: `target`, `node`, `plane`."""

    def __init__(self, serve=echo, one_at_a_time=True, half_close=True, **plane_options):
        self.target = Target(serve)
        self.node = Node(self.target.address, one_at_a_time, half_close)
        self.plane = ControlPlane(node=self.node, **plane_options)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        for part in (self.plane, self.node, self.target):
            part.close()


class Certificates(NamedTuple):
    """Paths of PEM files; the servers' hold both key and certificate, for load_cert_chain()."""

    ca: str
    server: str  # for localhost and 127.0.0.1
    wrong_host: str  # for wrong.example


def make_certificates(directory):
    """Make a CA and two server certificates with the openssl command (1.1 or 3)."""
    def path(name):
        return os.path.join(str(directory), name)

    def write(name, text):
        with open(path(name), "w") as stream:
            stream.write(text)

    def openssl(*arguments):
        subprocess.run(("openssl",) + arguments, cwd=str(directory), check=True, timeout=60,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    write("openssl.cnf", "[req]\ndistinguished_name=dn\nx509_extensions=ca\n[dn]\n[ca]\n"
          "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
          "subjectKeyIdentifier=hash\n")
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "ca.key")
    openssl("req", "-x509", "-new", "-sha256", "-config", "openssl.cnf", "-key", "ca.key",
            "-days", "30", "-subj", "/CN=plexctl test CA", "-out", "ca.pem")
    for serial, (name, names) in enumerate([("server", "DNS:localhost,IP:127.0.0.1"),
                                            ("wrong_host", "DNS:wrong.example")], 2):
        write(name + ".ext", "subjectAltName=%s\nbasicConstraints=CA:FALSE\n"
              "extendedKeyUsage=serverAuth\nsubjectKeyIdentifier=hash\n"
              "authorityKeyIdentifier=keyid\n" % names)
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", name + ".key")
        openssl("req", "-new", "-sha256", "-config", "openssl.cnf", "-key", name + ".key",
                "-subj", "/CN=plexctl test " + name.replace("_", " "), "-out", name + ".csr")
        openssl("x509", "-req", "-sha256", "-in", name + ".csr", "-CA", "ca.pem",
                "-CAkey", "ca.key", "-set_serial", str(serial), "-days", "30",
                "-extfile", name + ".ext", "-out", name + ".crt")
        with open(path(name + ".key")) as key, open(path(name + ".crt")) as certificate:
            write(name + ".pem", key.read() + certificate.read())
    return Certificates(path("ca.pem"), path("server.pem"), path("wrong_host.pem"))


# ---- simulator: plexctl as a process, and its clients -------------------------------------------

def clean_environment(more=None):
    """An environment with nothing of ours: PATH, a HOME that does not exist, and what is given."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent"}
    if "SYSTEMROOT" in os.environ:  # Windows: no sockets without it
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    environment.update(more or {})
    return environment


def plexctl_command(args, python):
    """The command line of plexctl.py in an isolated interpreter."""
    return [python, "-I", PLEXCTL] + [str(arg) for arg in args]


def run_plexctl(args, *, python=sys.executable, env=None, input=None, timeout=60, **popen):
    """Run plexctl.py to its end; the result has text (bytes with encoding=None, errors=None)."""
    options = dict(encoding="utf-8", errors="replace", stdout=subprocess.PIPE,
                   stderr=subprocess.PIPE, timeout=timeout, env=clean_environment(env))
    options.update({"stdin": subprocess.DEVNULL} if input is None else {"input": input})
    options.update(popen)
    result = subprocess.run(plexctl_command(args, python), **options)
    for stream, text in (("out", result.stdout), ("err", result.stderr)):
        SEEN.append((stream, text.decode("latin-1") if isinstance(text, bytes) else text or ""))
    return result


SEEN = []  # (stream, text) of every process, for the tests to look for secrets in


class Process(Watched, subprocess.Popen):
    """A process whose stdout and stderr, if pipes, are read all along: `out` and `err`, as text.

    Leaving its context kills it if it still runs."""

    def __init__(self, command, **popen):
        Watched.__init__(self)
        options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        options.update(popen)
        subprocess.Popen.__init__(self, command, **options)
        self._read = {"out": b"", "err": b""}
        self._readers = [threading.Thread(target=self._collect, args=(name, stream), daemon=True)
                         for name, stream in (("out", self.stdout), ("err", self.stderr)) if stream]
        for reader in self._readers:
            reader.start()

    def _collect(self, name, stream):
        for data in iter(lambda: os.read(stream.fileno(), 1 << 16), b""):
            with self.changed:
                self._read[name] += data
                self.changed.notify_all()

    @property
    def out(self):
        """What it has written to stdout."""
        return self._read["out"].decode("utf-8", "replace")

    @property
    def err(self):
        """What it has written to stderr."""
        return self._read["err"].decode("utf-8", "replace")

    def describe(self):
        return "exit status %s, stdout %r, stderr %r" % (self.returncode, self.out, self.err)

    def wait_for_output(self, text, seconds=20):
        """Wait until a text is on stdout or stderr; AssertionError if it ends without it."""
        self.wait_for(lambda: text in self.out or text in self.err or self._is_over(), seconds)
        if text not in self.out and text not in self.err:
            raise AssertionError("it ended without %r: %s" % (text, self.describe()))

    def ready(self, lines=1, seconds=20):
        """Wait for the readiness document, of so many lines, on stdout, and return it."""
        self.wait_for(lambda: self.out.count("\n") >= lines or self._is_over(), seconds)
        if self.out.count("\n") < lines:
            raise AssertionError("it ended before it was ready: %s" % self.describe())
        return self.out

    def _is_over(self):
        return self.poll() is not None and not any(reader.is_alive() for reader in self._readers)

    def finish(self, seconds=20):
        """Wait for its end; a CompletedProcess with text. AssertionError if it goes on."""
        try:
            self.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError("it runs after %s s: %s" % (seconds, self.describe())) from None
        for reader in self._readers:
            reader.join(seconds)
        return subprocess.CompletedProcess(self.args, self.returncode, self.out, self.err)

    def close(self):
        if self.poll() is None:
            self.kill()
        self.finish()
        SEEN.extend([("out", self.out), ("err", self.err)])
        for stream in (self.stdin, self.stdout, self.stderr):
            try:
                if stream:
                    stream.close()
            except OSError:
                pass


def start_plexctl(args, *, python=sys.executable, env=None, **popen):
    """Start plexctl.py and return the Process; stdin is empty unless given."""
    signals = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    ignored = [number for number in set(signals) if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:  # nohup and shell background jobs: a child would ignore them as well
        signal.signal(number, signal.SIG_DFL)
    try:
        return Process(plexctl_command(args, python), env=clean_environment(env), **popen)
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def dial(address, seconds=20):
    """Connect to host:port (brackets for IPv6); calls on the socket time out after that."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), seconds)


def exchange(address, data=b"", seconds=20):
    """Connect, send data and a half-close, meanwhile read to the end of input; what came back."""
    with dial(address, seconds) as connection:
        def send():
            try:
                connection.sendall(data)
            except OSError:
                return
            hang_up(connection, socket.SHUT_WR)
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        received = b"".join(chunks(connection))
        sender.join(seconds)
        return received


def parse_document(text, output):
    """plexctl's document in one of its formats, with the keys of the JSON (no `kind` in text)."""
    if output == "json":
        return json.loads(text)
    if output == "yaml":
        document, nested = {}, None
        for line in text.splitlines():
            key, value = line.strip().split(":", 1)
            if not value:
                nested = document[key] = {}
            else:
                (nested if line.startswith("  ") else document)[key] = json.loads(value)
        return document
    lines = [list(re.finditer(r"\S+", line)) for line in text.splitlines()]
    if len(lines) != 2 or len({tuple(word.start() for word in line) for line in lines}) != 1:
        raise AssertionError("not a header line and a row, aligned: %r" % text)
    header, row = lines
    document = {name.group().lower(): value.group() for name, value in zip(header, row)}
    host, port = document["target"].rsplit(":", 1)
    document["target"] = {"host": host, "port": int(port)}
    return document


# ---- demonstration ------------------------------------------------------------------------------

def check(condition, what):
    """End the demonstration if something is not as it should be."""
    if not condition:
        raise AssertionError(what)


def say(text=""):
    """Print a line of the demonstration at once."""
    print(text, flush=True)


def show_command(plane, args):
    """Print a command line as an operator would type it."""
    line = " ".join(shlex.quote(arg) for arg in ["plexctl"] + args)
    say("$ " + line.replace(plane.url, "${PLEXSPHERE_URL}").replace(sys.executable, "python3"))


def show_output(result):
    """Print what a command wrote."""
    for line in result.stdout.splitlines():
        say("  " + line)
    for line in result.stderr.splitlines():
        say("  [stderr] " + line)


def check_streams(plane, result, revealed=None):
    """No secret on any stream, but a token that was asked for, on stderr; and no traceback."""
    check(plane.bearer not in result.stdout + result.stderr, "the bearer token was shown")
    check(SESSION_TOKEN_MARK not in result.stdout, "a session token is on stdout")
    err = result.stderr
    if revealed:
        line = "PLEXCTL_SESSION_TOKEN=%s\n" % revealed
        check(line in err, "the token that was asked for is not on stderr")
        err = err.replace(line, "")
    check(SESSION_TOKEN_MARK not in err, "a session token is on stderr, and nobody asked for it")
    check("Traceback" not in err, "a traceback on stderr")


def check_document(document, session):
    """The printed document says what the control plane issued."""
    local_addr = document.pop("local_addr", "")
    check(re.match(r"127\.0\.0\.1:[1-9][0-9]*\Z", local_addr), "local address is %r" % local_addr)
    expected = {"session_id": session.id, "kind": "tcp", "listener_endpoint": session.endpoint,
                "target": {"host": HOST, "port": PORT}, "expires_at": session.expires_at}
    document.setdefault("kind", "tcp")
    check(document == expected, "printed %s, issued %s" % (document, expected))


def demonstrate_print(plane, common, scratch):
    """Every output format, with the endpoint reported in each of the three ways."""
    for output, endpoint_on, words in (
            ("text", "issue", "with the listener endpoint on the answer itself"),
            ("json", "session", "with the listener endpoint on the session inside the answer"),
            ("yaml", "read", "with the listener endpoint reported by the Node a little later")):
        say("\nPrint the coordinates as %s, %s:" % (output, words))
        plane.endpoint_on, plane.reads_before_endpoint = endpoint_on, 1
        args = common + ["--output", output]
        show_command(plane, args)
        result = run_plexctl(args, env=plane.environment(HOME=scratch))
        show_output(result)
        check(result.returncode == 0, "exit status %s" % result.returncode)
        check_streams(plane, result)
        check_document(parse_document(result.stdout, output), plane.sessions[-1])
    plane.endpoint_on = "issue"
    check(len(plane.active()) == 3, "print mode leaves its session active")


def demonstrate_reveal(plane, common, scratch):
    """--reveal-secrets and its audit record."""
    say("\nShow the session token too; the audit log has to have it on record first:")
    audit_log = os.path.join(scratch, "audit.log")
    args = common + ["--output", "json", "--reveal-secrets"]
    show_command(plane, args)
    result = run_plexctl(args, env=plane.environment(HOME=scratch, PLEXCTL_AUDIT_LOG=audit_log))
    show_output(result)
    check(result.returncode == 0, "exit status %s" % result.returncode)
    session = plane.sessions[-1]
    check_streams(plane, result, session.token)
    check_document(parse_document(result.stdout, "json"), session)
    with open(audit_log) as stream:
        written = stream.read()
    say("  [audit log] " + written.rstrip("\n"))
    check(SESSION_TOKEN_MARK not in written, "the token is in the audit log")
    check(written.find("\n") == len(written) - 1, "the audit log has not exactly one record")
    record = json.loads(written)
    check(record["event"] == "session_token_revealed", "the audit record is of another event")
    check(record["session_id"] == session.id, "the audit record is of another session")


def demonstrate_proxy(plane, common, scratch):
    """Bytes through --proxy, then Ctrl-C."""
    say("\nCarry 1 MiB to the echo target and back, with a half-close; then Ctrl-C:")
    args = common + ["--output", "json", "--proxy"]
    show_command(plane, args)
    with start_plexctl(args, env=plane.environment(HOME=scratch)) as process:
        document = json.loads(process.ready())
        data = pattern(1 << 20)
        check(exchange(document["local_addr"], data) == data, "other bytes came back")
        check(plane.active()[-1:] == [document["session_id"]], "the session is not active")
        process.send_signal(signal.SIGINT)
        result = process.finish()
    show_output(result)
    check(result.returncode == -signal.SIGINT, "exit status %s, not by SIGINT" % result.returncode)
    check_streams(plane, result)
    check_document(parse_document(result.stdout, "json"), plane.sessions[-1])
    check(plane.revoked == [plane.issued[-1]], "the session was not revoked once")
    say("Byte for byte the same; ended by SIGINT; the session is revoked.")


def demonstrate_command(plane, common, scratch):
    """A COMMAND that runs behind the proxy."""
    say("\nRun a command that finds the local port in its environment, and ends with status 7:")
    program = ('import os, socket, sys; host, port = map(os.environ.get, '
               '("PLEXCTL_LOCAL_HOST", "PLEXCTL_LOCAL_PORT")); '
               's = socket.create_connection((host, int(port))); '
               's.sendall(b"hello, target"); s.shutdown(socket.SHUT_WR); '
               'print(s.makefile().read()); sys.exit(7)')
    args = common + ["--", sys.executable, "-c", program]
    show_command(plane, args)
    result = run_plexctl(args, env=plane.environment(HOME=scratch))
    show_output(result)
    check(result.returncode == 7, "exit status %s, not the command's" % result.returncode)
    check(result.stdout == "hello, target\n", "the command printed %r" % result.stdout)
    check_streams(plane, result)
    check(plane.revoked == plane.issued[-2:], "the session was not revoked once")
    say("It had its answer; its exit status came through; the session is revoked.")


def demonstrate():
    """Show plexctl at work against the simulator; returns the exit status."""
    try:
        with Simulation() as simulation, tempfile.TemporaryDirectory() as scratch:
            plane = simulation.plane
            say("A control plane, a Node and an echo target are up on loopback.")
            say("PLEXSPHERE_TOKEN is in plexctl's environment.")
            common = ["tcp-forward", "--server", plane.url] + REQUIRED_FLAGS
            demonstrate_print(plane, common, scratch)
            demonstrate_reveal(plane, common, scratch)
            demonstrate_proxy(plane, common, scratch)
            demonstrate_command(plane, common, scratch)
    except (AssertionError, OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        say("\nNOT as it should be: %s" % error)
        return 1
    say("\nall as it should be")
    return 0


def serve_simulation():
    """Keep control plane, Node and echo target up until Ctrl-C; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Simulation() as simulation:
            for item in sorted(simulation.plane.environment().items(), reverse=True):
                say("export %s=%s" % item)
            command = [sys.executable, PLEXCTL, "tcp-forward"] + REQUIRED_FLAGS + ["--proxy"]
            say(" ".join(shlex.quote(part) for part in command))
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        return 0


def demo_main(argv):
    """`python3 test_plexctl.py [serve]`."""
    if argv not in ([], ["serve"]):
        print("usage: test_plexctl.py [serve]", file=sys.stderr)
        return 2
    return serve_simulation() if argv else demonstrate()


if __name__ == "__main__":
    raise SystemExit(demo_main(sys.argv[1:]))


# ---- tests: what all of them share ---------------------------------------------------------------

import pytest  # the demonstration must not need it

import plexctl

LINUX = sys.platform.startswith("linux")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


class Result(NamedTuple):
    """What one call of main left."""
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_secret_on_any_stream(request, monkeypatch):
    """Every test: no bearer token and no session token on a stream, but where a test says so.

    `@pytest.mark.reveals` is for tests of --reveal-secrets: there stderr may have the session
    token; stdout and the bearer token are checked all the same."""
    del SEEN[:]
    for name in list(os.environ):
        if name.startswith(("PLEXSPHERE_", "PLEXCTL_", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield
    reveals = request.node.get_closest_marker("reveals")
    for stream, text in SEEN:
        assert BEARER not in text, "the bearer token is on " + stream
        if not reveals or stream != "err":
            assert SESSION_TOKEN_MARK not in text, "a session token is on " + stream


@pytest.fixture
def cli(capsys):
    """Calls plexctl.main(["tcp-forward", ...]) in this process: cli(args, environ) -> Result."""
    def call(args, environ=None):
        status = plexctl.main(list(args), clean_environment(environ))
        out, err = capsys.readouterr()
        SEEN.extend([("out", out), ("err", err)])
        return Result(status, out, err)
    return call


@pytest.fixture
def simulation():
    """The default simulation: echo target, Node, control plane."""
    with Simulation() as running:
        yield running


def one_error_line(result, *words):
    """The result's stderr is one error line, and has these words."""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("plexctl: error: "), result.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def forward_args(plane, *more):
    """The command line with the published ids, for this control plane."""
    return ["tcp-forward", "--server", plane.url] + REQUIRED_FLAGS + [str(word) for word in more]
