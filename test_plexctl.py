"""Tests of plexctl, with the simulator that they run against and a demonstration that uses it too.

    python3 test_plexctl.py          show plexctl at work on the simulator, and check what it does
    python3 test_plexctl.py serve    keep the simulator running, to try plexctl by hand (serve --help)
    python3 -m pytest -n 8           the tests (pytest-xdist; without it, leave out -n 8)

The simulator is real sockets on loopback: a control plane that answers by the published API, a Node
with one listener per mediated session, and targets behind it. It needs only the standard library.

Sections, each of which begins with a line `# ---- NAME ---`: the simulator; the demonstration, which is what
the first two commands above run; the tests, first in the order of plexctl.py, then those of whole processes.
"""
import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import http.server
import json
import os
import re
import select
import shlex
import signal
import socket
import socketserver
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
TCP_FORWARD = ["tcp-forward"] + REQUIRED_FLAGS

BEARER = "psk_operator-bearer-secret-of-the-simulator"
SESSION_TOKEN_MARK = "c2Vzc2lvbi10b2tlbi1zZWNyZXQ"  # in every session token, so in any leak of one
STEP_UP_ACR = "urn:plexsphere:acr:hardware-key"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s
READS, WRITES = select.POLLIN, select.POLLOUT
SEEN = []  # (stream, text) of every process, for the tests to look for secrets in


# ---- simulator: waiting and listening -----------------------------------------------------------

def eventually(predicate, seconds=10, state=lambda: ""):
    """Return predicate() once it is true; AssertionError with the state if not in that time."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("not within %s s: %s" % (seconds, state()))
        time.sleep(0.005)


class Watched(contextlib.AbstractContextManager):
    """Something that is closed at the end, and whose state may be waited for: `changed` guards it."""

    def __init__(self):
        self.changed = threading.Condition()

    def wait_for(self, predicate, seconds=10):
        def unchanging():
            with self.changed:
                return predicate()
        return eventually(unchanging, seconds, self.describe)

    def describe(self):
        return str(vars(self))

    def __exit__(self, *details):
        self.close()


class Listener(Watched, socketserver.ThreadingTCPServer):
    """A loopback listener; handle(connection, listener) runs for each connection, in a thread."""

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 1024

    def __init__(self, handle):
        Watched.__init__(self)
        socketserver.ThreadingTCPServer.__init__(self, ("127.0.0.1", 0), None)
        self.handle, self.connections, self.closing = handle, set(), threading.Event()
        self.address = self.server_address
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def finish_request(self, connection, _address):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections.add(connection)
        if self.closing.is_set():
            hang_up(connection)
        with contextlib.suppress(OSError):
            self.handle(connection, self)

    def shutdown_request(self, connection):
        connection.close()
        self.connections.discard(connection)

    def close(self):
        """Accept nobody any more, and end what is open."""
        self.closing.set()
        hang_up(self.socket)  # wakes serve_forever, on Linux
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            hang_up(connection)


def listening_socket(port=0):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(1024)
    return sock


def hang_up(sock, how=socket.SHUT_RDWR):
    """shutdown(), which wakes the threads blocked on the socket; it may be gone already."""
    with contextlib.suppress(OSError):
        sock.shutdown(how)


# ---- simulator: targets -------------------------------------------------------------------------

class Target(Listener):
    """A TCP service behind the Node: serve(connection, target), then a half-close, then a drain.

    `accepted` counts connections; `ends` has "eof" or "reset" for each, as the peer ended it."""

    def __init__(self, serve):
        super().__init__(self._serve)
        self.serve, self.accepted, self.ends = serve, 0, []

    def _serve(self, connection, _listener):
        with self.changed:
            self.accepted += 1
        try:
            self.serve(connection, self)
            hang_up(connection, socket.SHUT_WR)
            for _ in chunks(connection):
                pass
            end = "eof"
        except ConnectionError:
            end = "reset"
        self.ends.append(end)

    def connection(self):
        """The one connection that it has, for a test that is the service itself (see silent)."""
        connection, = self.wait_for(lambda: list(self.connections))
        connection.settimeout(20)
        return connection


def chunks(connection):
    """What the peer sends, in pieces, until its end of input."""
    return iter(lambda: connection.recv(1 << 16), b"")


def pattern(size, seed=0):
    """So many bytes that look random and do not repeat; a shorter run is a prefix of a longer."""
    return hashlib.shake_128(b"%d" % seed).digest(size)


def echo(connection, _target):
    for data in chunks(connection):
        connection.sendall(data)


def echo_of(size):
    """A service that sends back whatever comes, and ends once that were so many bytes."""
    def serve(connection, _target):
        left = size
        while left > 0:
            data = connection.recv(min(left, 1 << 16))
            connection.sendall(data)
            left -= len(data) or left
    return serve


def source(size):
    """A service that sends pattern(size) to whoever connects."""
    data = pattern(size)
    return lambda connection, _target: connection.sendall(data)


def sink(connection, _target):
    """Read to the end of input, then answer with the SHA-256 of it all."""
    connection.sendall(hashlib.sha256(b"".join(chunks(connection))).digest())


def resetter(after_bytes, says=0):
    """A service that sends and reads so many bytes, then resets the connection; `ends` does not list it."""
    def serve(connection, _target):
        connection.sendall(bytes(says))
        connection.recv(after_bytes, socket.MSG_WAITALL)
        reset_close(connection)
    return serve


def reset_close(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    connection.close()


def silent(_connection, target):
    """Accept, and neither read nor write, until the target is closed."""
    target.closing.wait()


@contextlib.contextmanager
def dial_that_hangs():
    """A listener whose backlog is full: a dial to it neither succeeds nor fails, its SYNs are dropped."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener


# ---- simulator: carrying bytes ------------------------------------------------------------------

class Direction:
    """One direction of a connection: what is read from `source` goes to `sink` in order, `delay` seconds
    later. So do the end of input, as b"", and a reset, as None."""

    def __init__(self, source, sink, delay):
        self.source, self.sink, self.delay = source, sink, delay
        self.line, self.room = collections.deque(), 256 if delay else 1  # of (when it is due, bytes)
        self.ended = False

    def reads(self):
        return not self.ended and len(self.line) < self.room

    def read(self):
        try:
            self.take(self.source.recv(1 << 15))
        except BlockingIOError:
            pass
        except OSError:
            self.take(None)

    def take(self, data):
        """Put bytes, the end of input or a reset on the way."""
        self.ended = not data
        self.line.append((time.monotonic() + self.delay, data))

    def write(self):
        """Hand on what is due, as far as that goes: "open", "end" once the end of input is what is due, or
        "broken" where the sink takes nothing more. ConnectionResetError if what is due is a reset."""
        while self.line and self.line[0][0] <= time.monotonic():
            due, data = self.line.popleft()
            if data is None:
                raise ConnectionResetError
            if not data:
                return "end"
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.line.clear()
                return "broken"
            if sent < len(data):
                self.line.appendleft((due, data[sent:]))
                break
        return "open"


def carry(client, target, delay, half_close, over):
    """Carry bytes both ways between two sockets, and leave it to the caller to close them.

    Without a delay as two loops of blocking reads and writes do: a side is not looked at while what it has
    sent is not written. A delay is one of time, not of bandwidth. Returns when one side has ended its input
    and all that it sent has been handed on; with `half_close` when both have, each end being passed on by
    itself. Or when over(), within 0.1 s. Raises ConnectionResetError when a side has reset."""
    for each in (client, target):
        each.setblocking(False)
    up, down = Direction(client, target, delay), Direction(target, client, delay)
    open_ways = [(up, down), (down, up)]
    while open_ways and not over():
        seconds, wanted = 0.1, collections.defaultdict(int)
        for way, _ in open_ways:
            if way.line and way.line[0][0] <= time.monotonic():
                wanted[way.sink] |= WRITES
            elif way.line:
                seconds = max(0, min(seconds, way.line[0][0] - time.monotonic()))
            if way.reads():
                wanted[way.source] |= READS
        readable = wait_for_sockets(wanted, seconds)
        for way, opposite in list(open_ways):
            if way.source in readable and way.reads():
                way.read()
            state = way.write()
            if state == "open":
                continue
            if state == "broken" and not half_close:
                raise ConnectionResetError
            if not half_close:
                return
            if state == "broken":
                opposite.take(None)  # a reset that is the news of the other direction, and as long on its way
            else:
                hang_up(way.sink, socket.SHUT_WR)
            open_ways.remove((way, opposite))
            if way.line or not open_ways and opposite.line:
                raise ConnectionResetError


def wait_for_sockets(wanted, seconds):
    """Wait until one of {socket: READS, WRITES or both} is ready; those that can be read, or have failed.

    One that another thread has closed meanwhile is passed over."""
    poll, by_fd = select.poll(), {sock.fileno(): sock for sock in wanted if sock.fileno() >= 0}
    for fd, sock in by_fd.items():
        poll.register(fd, wanted[sock])
    ready = poll.poll(int(seconds * 1000) + (seconds > 0))
    return {by_fd[fd] for fd, events in ready if events & ~WRITES}


# ---- simulator: the Node ------------------------------------------------------------------------

# a connection that was in a listener's backlog while another one was being served; not `served`: the
# listener was closed first
Wait = collections.namedtuple("Wait", "session_id seconds served")


class Node(Watched):
    """The on-Node mediated listeners, one per session, all carrying connections to one address.

    By default as the real Node (plexsphere/plexd, February 2026): a listener serves one connection at a
    time, the next one waits in the kernel's backlog; it is accepted first, and the target dialled then,
    for as long as that takes; where that fails it is closed without a word; when either side's end or
    reset is read, or a write fails, both connections are closed, but neither is read while what that side
    sent before is not written, nor during the dial; at most ten sessions at once, a further one never gets
    a listener; listener and connections are closed, with a plain end, at expiry and at a revocation.

    kinder: several connections at once, half-closes are kept, a reset is passed on as a reset; each of
        the first two also by itself: one_at_a_time, half_close (then it does not end when the client is
        gone, but only once the target has ended too, or cannot be written to the client)
    delay: seconds that the way from plexctl takes, in each direction
    late: seconds until a session has its listener and its endpoint is reported; a list has one number for
        each session in turn, the last one for all further ones
    early: seconds that its clock is ahead of the control plane's: it closes so long before the expiry
    dial_seconds: when a dial that neither succeeds nor fails is given up
    max_sessions: how many have a listener at once

    What it saw: `connections` (accepted, by session), `most` (served at once, by session), `waits`."""

    def __init__(self, target_address, *, kinder=False, one_at_a_time=None, half_close=None, delay=0, late=0,
                 early=0.5, dial_seconds=float("inf"), max_sessions=10):
        super().__init__()
        self.target_address = target_address
        self.one_at_a_time = not kinder if one_at_a_time is None else one_at_a_time
        self.half_close = kinder if half_close is None else half_close
        self.resets = kinder
        self.delay, self.late, self.early = delay, late, early
        self.dial_seconds, self.max_sessions = dial_seconds, max_sessions
        self.connections, self.most, self.waits = collections.Counter(), collections.Counter(), []
        self.listeners = collections.OrderedDict()

    def open(self, session_id, seconds=float("inf"), reaches=True):
        """Listen for a session that ends in so many seconds, now or when it is late.

        Where it does not reach the target, every dial fails."""
        late = self.late
        if isinstance(late, (list, tuple)):
            late = late[min(len(self.listeners), len(late) - 1)]
        with self.changed:
            self.listeners[session_id] = SessionListener(
                self, session_id, seconds - self.early, late, reaches)

    def endpoint(self, session_id):
        """The session's endpoint as host:port, the last one if its listener is closed; None before."""
        return self.listeners[session_id].endpoint

    def busy(self, session_id):
        """How many connections the session's listener carries now."""
        return len(self.listeners[session_id].connections)

    def refuse(self, session_id):
        """Close the listener only: what is open goes on, and the session stays active."""
        self.listeners[session_id].refuse()

    def close(self, session_id=None):
        """Close one session's listener and connections, or all of them; the session may stay active."""
        with self.changed:
            for each in [session_id] if session_id else self.listeners:
                self.listeners[each].close()

    def restart(self):
        """End every connection, and listen on another port for each session that is not closed."""
        with self.changed:
            for session_id, old in list(self.listeners.items()):
                if old.is_open():
                    self.listeners[session_id] = SessionListener(
                        self, session_id, old.seconds_left(), 0, old.reaches)
                    old.close()


class SessionListener:
    """What a Node has for a session: a listener, a thread that serves it, and connections."""

    def __init__(self, node, session_id, seconds, late, reaches):
        self.node, self.session_id, self.reaches, self.connections = node, session_id, reaches, set()
        self.endpoint, self._socket, self._closing = None, None, threading.Event()
        self._ends = time.monotonic() + seconds
        if not late:
            self._open()
        threading.Thread(target=self._run, args=(late,), daemon=True).start()

    def _open(self):
        with self.node.changed:
            open_ones = sum(each.is_open() for each in self.node.listeners.values())
            if open_ones < self.node.max_sessions and not self._closing.is_set():
                self._socket = listening_socket()
                self._socket.setblocking(False)
                self.endpoint = "%s:%d" % self._socket.getsockname()

    def is_open(self):
        return self._socket is not None and not self._closing.is_set()

    def seconds_left(self):
        return self._ends - time.monotonic()

    def _over(self):
        return self._closing.is_set() or time.monotonic() >= self._ends

    def _run(self, late):
        if late and not self._closing.wait(min(late, 1e6)):
            self._open()
        if self._socket is None:
            return
        while not self._over():
            if wait_for_sockets({self._socket: READS}, min(0.1, max(0, self.seconds_left()))):
                self._accept()
        self.close()

    def _accept(self):
        """Serve the connection in the backlog, if only after the one that is being served."""
        node, since, client = self.node, time.monotonic(), None
        with node.changed:
            must_wait = node.one_at_a_time and bool(self.connections)
            while node.one_at_a_time and self.connections and not self._over():
                node.changed.wait(0.1)
            if not self._over():
                with contextlib.suppress(OSError):  # it, or the listener, has gone meanwhile
                    client = self._socket.accept()[0]
            if must_wait:
                node.waits.append(Wait(self.session_id, time.monotonic() - since, client is not None))
            if client:
                self.connections.add(client)
                node.connections[self.session_id] += 1
                node.most[self.session_id] = max(node.most[self.session_id], len(self.connections))
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        target, finish = socket.socket(), socket.socket.close
        try:
            for each in (client, target):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            time.sleep(self.node.delay)  # so long it took to come here
            if self._reaches(target):
                carry(client, target, self.node.delay, self.node.half_close, self._over)
        except ConnectionResetError:
            finish = reset_close if self.node.resets else finish
        finally:
            time.sleep(self.node.delay)  # and so long takes its end
            with self.node.changed:
                self.connections.discard(client)
                for each in (client, target):
                    finish(each)
                self.node.changed.notify_all()

    def _reaches(self, target):
        target.setblocking(False)
        began = time.monotonic()
        while self.reaches and time.monotonic() - began < self.node.dial_seconds and not self._over():
            error = target.connect_ex(self.node.target_address)
            if error not in (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK):
                return error in (0, errno.EISCONN)
            wait_for_sockets({target: WRITES}, 0.1)
        return False

    def refuse(self):
        with self.node.changed:
            if self._socket:
                hang_up(self._socket)
                self._socket.close()

    def close(self):
        self._closing.set()
        self.refuse()
        with self.node.changed:
            for connection in self.connections:
                hang_up(connection, socket.SHUT_RD)  # wakes its thread, and sends nothing yet


# ---- simulator: the control plane ---------------------------------------------------------------

class Answer(NamedTuple):
    """An HTTP answer: `body` as JSON, or `raw` as it is; headers replace the usual ones."""

    status: int
    body: Any = None
    headers: tuple = ()
    raw: Optional[bytes] = None


# a request as it was seen; the operation and the ids as route() has them; the body is parsed where it is
# JSON; `time` is time.monotonic()
Request = collections.namedtuple("Request", "operation method path ids headers body time")
ROUTES = {"issue": ("POST", ""), "get": ("GET", "/([^/]*)"), "revoke": ("POST", "/([^/]*)/revoke")}
UUID_SHAPE = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ISSUE_SHAPE = (  # of the body of IssueSession, with its keys sorted
    r'\{("idempotency_key": "[^"]{1,4096}", )?"kind": "tcp", ("requested_ttl_seconds": [1-9][0-9]*, )?'
    r'"resource_id": "%s", "target": \{"tcp": \{"host": "[^"]+", "port": [1-9][0-9]{0,4}\}\}\}' % UUID_SHAPE)
PASS = object()  # in a script: answer this one as usual


def route(method, path, prefix=""):
    """Which operation a request line asks for ("other" if none), and the project's and session's id in it."""
    for operation, (wanted, shape) in ROUTES.items():
        matched = re.match(re.escape(prefix) + "/v1/projects/([^/]*)/sessions" + shape + r"\Z", path)
        if matched and method == wanted:
            return operation, matched.groups()
    return "other", ()


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
    "session_not_active": (409, "Conflict", "the session is no longer active", {})}
CHALLENGES = {
    "unauthenticated": 'Bearer realm="plexsphere"',
    "step_up_required": 'Bearer error="insufficient_user_authentication", '
                        'acr_values="%s"' % STEP_UP_ACR}


def problem(name, instance=SESSIONS_PATH, headers=(), **changes):
    """The published example of an error, by its name; changes replace or add fields."""
    status, title, detail, more = PROBLEMS[name]
    body = {"type": "https://plexsphere.com/errors/" + name.replace("_", "-"), "title": title,
            "status": status, "detail": detail, "instance": instance}
    if name != "forbidden":
        body["code"] = name
    body.update(more, **changes)
    if name in CHALLENGES:
        headers = (("WWW-Authenticate", CHALLENGES[name]),) + tuple(headers)
    return Answer(body["status"], body, tuple(headers))


def redirect(to, status=302):
    return Answer(status, None, (("Location", to),))


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


def drip(handler, plane, at_once=0):
    """Do what was asked for, and send the answer at one byte per 0.1 s, but for the first ones."""
    reply = handler.render(plane.decide(handler.seen))
    handler.wfile.write(reply[:at_once])
    for position in range(at_once, len(reply)):
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
        if self.revoked_at:
            return "revoked"
        return "active" if self._plane.now() < self.expires else "expired"

    @property
    def endpoint(self):
        """The listener endpoint as the Node reports it now; None where it has not."""
        return self._plane.node.endpoint(self.id) if self._plane.node else self._plane.endpoint

    def view(self, with_endpoint):
        view = {
            "id": self.id, "project_id": self.project_id, "domain_id": DOMAIN_ID,
            "resource_id": self.resource_id, "identity_id": IDENTITY_ID, "kind": "tcp",
            "status": self.status, "issued_at": self.issued_at, "expires_at": self.expires_at,
            "last_active_at": self.issued_at, "idle_timeout_seconds": 900,
            "target": self.target}
        if with_endpoint and self.endpoint:
            view["listener_endpoint"] = self.endpoint
        if self.revoked_at:
            view.update(revoked_at=self.revoked_at, revoke_reason=self.revoke_reason)
        return view


class ControlPlane(Listener):
    """A control plane on loopback: IssueSession, GetSession and RevokeSession as published.

    tls: an ssl.SSLContext, for https
    node: a Node that opens a listener per session; without one every session has `endpoint`
    endpoint_on: where it is reported: on the IssuedSession ("issue"), on the session inside it
        ("session"), by GetSession only ("read", after so many reads without it), or "never"
    ttl: seconds of a session that asks for none; session_limit: active sessions it allows (429 beyond)
    clock_offset: seconds its clock is wrong by
    prefix: a path in front of /v1; bearer: the token it wants
    known: (project id, resource id, host, port), if there are no others: 404, an unreachable target
    log: called with each Request and its Answer

    `requests`, `sessions`, `issued` and `revoked` (ids, by the API only) are in order of time."""

    def __init__(self, *, tls=None, node=None, endpoint="127.0.0.1:9", endpoint_on="issue",
                 reads_before_endpoint=0, ttl=1800, clock_offset=0, session_limit=None, prefix="",
                 bearer=BEARER, known=None, log=lambda request, answer: None):
        super().__init__(self._serve)
        self.known, self.log = known, log
        self.tls, self.node, self.prefix, self.bearer = tls, node, prefix, bearer
        self.endpoint, self.endpoint_on = endpoint, endpoint_on
        self.reads_before_endpoint, self.session_limit = reads_before_endpoint, session_limit
        self.ttl, self.clock_offset = ttl, clock_offset
        self.requests, self.issued, self.revoked = [], [], []
        self._sessions, self._by_key = collections.OrderedDict(), {}
        self.scripts = collections.defaultdict(collections.deque)
        self.url = "%s://127.0.0.1:%d%s" % ("https" if tls else "http", self.address[1], prefix)

    def describe(self):
        return "requests %s; sessions %s" % ([request.operation for request in self.requests],
                                             [(each.id, each.status) for each in self.sessions])

    @property
    def sessions(self):
        """Every session, in the order of issue."""
        with self.changed:
            return list(self._sessions.values())

    def now(self):
        return time.time() + self.clock_offset

    def active(self):
        return [session.id for session in self.sessions if session.status == "active"]

    def environment(self, **more):
        """What plexctl needs in its environment to come here."""
        return dict({"PLEXSPHERE_URL": self.url, "PLEXSPHERE_TOKEN": self.bearer}, **more)

    def script(self, operation, *answers):
        """What the next requests of an operation get: an Answer, PASS, or f(handler, plane)."""
        with self.changed:
            self.scripts[operation].extend(answers)

    def revocations(self):
        """How often RevokeSession was asked for, by session id, whatever was answered."""
        with self.changed:
            return collections.Counter(each.ids[1] for each in self.requests if each.operation == "revoke")

    def revoke(self, session_id, reason="operator_request"):
        """Revoke as an operator does elsewhere (not in `revoked`); the Node ends connections."""
        with self.changed:
            session = self._sessions[session_id]
            session.revoked_at, session.revoke_reason = stamp(self.now()), reason
            if self.node:
                self.node.close(session_id)

    def expire(self, session_id):
        """Let a session run out now; the Node ends its connections."""
        with self.changed:
            self._sessions[session_id].expires = self.now()
            if self.node:
                self.node.close(session_id)

    def _serve(self, connection, _listener):
        connection.settimeout(60)
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True)
        with connection:  # a TLS socket is ours to close: the listener knows only the one beneath
            PlaneHandler(connection, None, self)

    def decide(self, request):
        if request.headers.get("Authorization") != "Bearer " + self.bearer:
            return problem("unauthenticated", request.path)
        if request.operation == "other":
            return problem("resource_not_found", request.path)
        if not all(is_uuid(each) for each in request.ids):
            return problem("invalid_target", request.path, detail="malformed id")
        if self.known and request.ids[0] != self.known[0]:
            return problem("resource_not_found", request.path)
        with self.changed:
            if request.operation == "issue":
                return self._issue(request)
            session = self._sessions.get(request.ids[1])
            if not session or session.project_id != request.ids[0]:
                return problem("resource_not_found", request.path)
            return self._get(session) if request.operation == "get" else self._revoke(session, request)

    def _issue(self, request):
        is_json = request.headers.get_content_type() == "application/json"
        body = json.dumps(request.body, sort_keys=True, default=str)  # bytes, if it was cut off
        if not is_json or not re.match(ISSUE_SHAPE + r"\Z", body):
            return problem("invalid_target", request.path)
        if self.known and request.body["resource_id"] != self.known[1]:
            return problem("resource_not_found", request.path)
        session = self._by_key.get(request.body.get("idempotency_key"))
        if session is None:
            if self.session_limit is not None and len(self.active()) >= self.session_limit:
                return problem("session_limit_exceeded", request.path)
            session = MediatedSession(self, request.ids[0], request.body)
            if self.node:
                tcp = session.target["tcp"]
                reaches = not self.known or (tcp["host"], tcp["port"]) == self.known[2:]
                self.node.open(session.id, session.expires - self.now(), reaches)
            self._sessions[session.id] = session
            self.issued.append(session.id)
            if "idempotency_key" in request.body:
                self._by_key[request.body["idempotency_key"]] = session
        body = {"session_id": session.id, "token": session.token, "expires_at": session.expires_at,
                "session": session.view(self.endpoint_on == "session")}
        if self.endpoint_on == "issue" and session.endpoint:
            body["listener_endpoint"] = session.endpoint
        return Answer(201, body, (("Location", "%s/%s" % (request.path, session.id)),))

    def _get(self, session):
        session.reads += 1
        reported = self.endpoint_on != "read" or session.reads > self.reads_before_endpoint
        return Answer(200, session.view(reported and self.endpoint_on != "never"))

    def _revoke(self, session, request):
        if request.body != {"revoke_reason": "operator_request"}:
            return problem("invalid_target", request.path, detail="malformed revoke request")
        if session.status != "active":
            return problem("session_not_active", request.path)
        self.revoked.append(session.id)
        self.revoke(session.id, request.body["revoke_reason"])
        return Answer(204)


def is_uuid(value):
    """Whether this is a UUID in its canonical form, in lower case."""
    return isinstance(value, str) and bool(re.match(UUID_SHAPE + r"\Z", value))


class PlaneHandler(http.server.BaseHTTPRequestHandler):
    """One connection to the control plane (its `server`), which carries one request: `seen`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        """Say nothing."""

    def handle_request(self):
        """Read a request, and do what the script or the API says."""
        self.close_connection = True
        plane, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with contextlib.suppress(ValueError):
            body = json.loads(body.decode("utf-8"))
        operation, ids = route(self.command, self.path, plane.prefix)
        self.seen = Request(
            operation, self.command, self.path, ids, self.headers, body, time.monotonic())
        with plane.changed:
            plane.requests.append(self.seen)
            steps = plane.scripts[operation]
            step = steps.popleft() if steps else PASS
        if step is PASS:
            self.answer_really()
        elif isinstance(step, Answer):
            self.wfile.write(self.render(step))
        else:
            step(self, plane)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_request

    def answer_really(self):
        self.wfile.write(self.render(self.server.decide(self.seen)))

    def render(self, answer):
        """The bytes of an answer, which is logged."""
        self.server.log(self.seen, answer)
        raw = answer.raw
        if raw is None:
            raw = b"" if answer.body is None else json.dumps(answer.body).encode("ascii")
        usual = {"Connection": "close", "Server": "plexsphere-simulator",
                 "Date": self.date_time_string(self.server.now())}
        if raw:
            usual["Content-Type"] = "application/" + ("problem+json" if answer.status >= 400 else "json")
        if answer.status != 204:
            usual["Content-Length"] = str(len(raw))
        for name, _ in answer.headers:
            usual.pop(name, None)
        lines = ["HTTP/1.1 %d %s" % (answer.status, self.responses.get(answer.status, ["Unnamed"])[0])]
        lines += ["%s: %s" % header for header in [*usual.items(), *answer.headers]]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw


class Simulation(contextlib.AbstractContextManager):
    """A target, a Node and a control plane, together: `target`, `node`, `plane`; with options of both."""

    def __init__(self, serve=echo, **options):
        self.target = Target(serve)
        of_node = {name: options.pop(name) for name in Node.__init__.__kwdefaults__ if name in options}
        self.node = Node(self.target.address, **of_node)
        self.plane = ControlPlane(node=self.node, **options)

    def __exit__(self, *details):
        for part in (self.plane, self.node, self.target):
            part.close()


# paths of PEM files; the servers' hold key and certificate, for localhost and 127.0.0.1 or wrong.example
Certificates = collections.namedtuple("Certificates", "ca server wrong_host")


def make_certificates(directory):
    """Make two servers' certificates with the openssl command (1.1 or 3), each signed by itself, and a
    bundle of both, which is the CA file."""
    files = Certificates(*[os.path.join(str(directory), name) for name in Certificates._fields])
    for path, names in (
            (files.server, "DNS:localhost,IP:127.0.0.1"), (files.wrong_host, "DNS:wrong.example")):
        config = ("[req]\ndistinguished_name=dn\nx509_extensions=extensions\n[dn]\n[extensions]\n"
                  "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,digitalSignature\n"
                  "subjectKeyIdentifier=hash\nsubjectAltName=%s\n" % names)
        subprocess.run(["openssl", "req", "-x509", "-new", "-sha256", "-config", "/dev/stdin", "-days", "30",
                        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                        "-subj", "/CN=plexctl test " + names, "-keyout", path, "-out", path],
                       input=config.encode(), check=True, timeout=60, stderr=subprocess.DEVNULL)
        with open(files.ca, "a") as bundle, open(path) as pem:
            bundle.write(pem.read())
    return files


# ---- simulator: plexctl as a process, and its clients -------------------------------------------

def clean_environment(more=None):
    """An environment with nothing of ours: PATH, a HOME that does not exist, and what is given."""
    return dict({"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent"}, **(more or {}))


def plexctl_command(args):
    return [sys.executable, "-I", PLEXCTL] + [str(arg) for arg in args]


class Process(Watched, subprocess.Popen):
    """A process whose stdout and stderr, if pipes, are read all along: `out` and `err`, as text.

    Leaving its context kills it if it still runs."""

    def __init__(self, command, **popen):
        Watched.__init__(self)
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
        # a child would inherit what nohup or a shell's background job ignores, but inherits no handler
        for number in set(signal.Signals) - {signal.SIGPIPE, signal.SIGXFSZ}:  # Popen sees to these two
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        subprocess.Popen.__init__(self, command, **options)
        self._read = {"out": b"", "err": b""}
        self._readers = [threading.Thread(target=self._collect, args=(name, stream), daemon=True)
                         for name, stream in (("out", self.stdout), ("err", self.stderr)) if stream]
        for reader in self._readers:
            reader.start()

    def _collect(self, name, stream):
        for data in iter(lambda: os.read(stream.fileno(), 1 << 16), b""):
            self._read[name] += data

    out = property(lambda self: self._read["out"].decode("utf-8", "replace"))
    err = property(lambda self: self._read["err"].decode("utf-8", "replace"))

    def describe(self):
        return "exit status %s, stdout %r, stderr %r" % (self.returncode, self.out, self.err)

    def wait_for_output(self, text, seconds=20):
        """Wait until a text is on stdout or stderr; AssertionError if it ends without it."""
        self._wait_unless_over(lambda: text in self.out or text in self.err, repr(text), seconds)

    def ready(self, lines=1, seconds=20):
        """Wait for the readiness document, of so many lines, on stdout, and return it."""
        self._wait_unless_over(lambda: self.out.count("\n") >= lines, "being ready", seconds)
        return self.out

    def _wait_unless_over(self, predicate, what, seconds):
        def is_over():
            return self.poll() is not None and not any(reader.is_alive() for reader in self._readers)
        self.wait_for(lambda: predicate() or is_over(), seconds)
        if not predicate():
            raise AssertionError("it ended without %s: %s" % (what, self.describe()))

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
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            with contextlib.suppress(OSError):
                stream.close()


def dial(address, seconds=20):
    """Connect to host:port (brackets for IPv6); calls on the socket time out after that."""
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), seconds)


@contextlib.contextmanager
def while_sending(connection, data, and_end=False):
    """It is sent by a thread meanwhile, and perhaps a half-close behind it."""
    def send():
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if and_end:
                connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    yield
    sender.join(20)
    assert not sender.is_alive()


def exchange(address, data=b""):
    """Connect, send data and a half-close, meanwhile read to the end of input; what came back."""
    with dial(address) as connection, while_sending(connection, data, and_end=True):
        return b"".join(chunks(connection))


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

say = functools.partial(print, flush=True)
FLAGS_TO_PASTE = "--project-id $PROJECT --resource-id $RESOURCE --host %s --port %d" % (HOST, PORT)
IDS_TO_PASTE = "export PROJECT=%s RESOURCE=%s" % (PROJECT_ID, RESOURCE_ID)


def run_shown(plane, *args, status=0, meanwhile=lambda process: None, **environ):
    """Show a command line as an operator would type it who has exported PROJECT and RESOURCE, and what it
    writes; return its stdout. No secret may be there, but a session token that was asked for, on stderr."""
    args = TCP_FORWARD + list(args)
    line = " ".join(shlex.quote(arg) for arg in ["plexctl"] + args)
    say("$ " + line.replace(" ".join(REQUIRED_FLAGS), FLAGS_TO_PASTE).replace(sys.executable, "python3"))
    with Process(plexctl_command(args), env=clean_environment(plane.environment(**environ))) as process:
        meanwhile(process)
        result = process.finish(60)
    for line in result.stdout.splitlines():
        say("  " + line)
    for line in result.stderr.splitlines():
        say("  [stderr] " + line)
    assert result.returncode == status, "exit status %s, not %s" % (result.returncode, status)
    unasked, session = result.stdout + result.stderr, plane.sessions[-1]
    assert plane.revocations()[session.id] == ("--proxy" in args or "--" in args), "it is revoked, or is not"
    if "--" not in args:
        assert session.id in result.stdout and session.endpoint in result.stdout, "it printed another session"
    if "--reveal-secrets" in args:
        token = "PLEXCTL_SESSION_TOKEN=%s\n" % session.token
        assert token in result.stderr, "the token that was asked for is not on stderr"
        unasked = result.stdout + result.stderr.replace(token, "")
    for secret in (plane.bearer, SESSION_TOKEN_MARK, "Traceback"):
        assert secret not in unasked, "it printed %r" % secret
    return result.stdout


def carry_and_interrupt(process):
    """Through a proxy 1 MiB to the echo target and back, then Ctrl-C."""
    data = pattern(1 << 20)
    came_back = exchange(parse_document(process.ready(2), "text")["local_addr"], data)
    assert came_back == data, "other bytes came back"
    process.send_signal(signal.SIGINT)


def demonstrate_on(plane, scratch):
    say("\nPrint the coordinates; the Node reports the listener endpoint a little later:")
    plane.endpoint_on, plane.reads_before_endpoint = "read", 1
    run_shown(plane)

    say("\nPrint them as JSON, and show the session token; the audit log has to have it on record first:")
    audit_log = os.path.join(scratch, "audit.log")
    run_shown(plane, "--output", "json", "--reveal-secrets", PLEXCTL_AUDIT_LOG=audit_log)
    with open(audit_log) as stream:
        record = stream.read()
    say("  [audit log] " + record.rstrip("\n"))
    assert plane.issued[-1] in record and SESSION_TOKEN_MARK not in record, "a wrong record"

    say("\nCarry 1 MiB to the echo target and back, with a half-close; then Ctrl-C:")
    run_shown(plane, "--proxy", status=-signal.SIGINT, meanwhile=carry_and_interrupt)
    say("Byte for byte the same; ended by SIGINT; the session is revoked.")

    say("\nRun a command that is told the local address, and ends with status 7:")
    program = ('import socket, sys; s = socket.create_connection(sys.argv[1:]); '
               's.sendall(b"hello, target"); s.shutdown(socket.SHUT_WR); '
               'print(s.makefile().read()); sys.exit(7)')
    written = run_shown(plane, "--", sys.executable, "-c", program, "{host}", "{port}", status=7)
    assert written == "hello, target\n", "the command printed %r" % written
    say("It had its answer; its exit status came through; the session is revoked.")


def demonstrate():
    """Show plexctl at work against the simulator; returns the exit status."""
    try:
        with Simulation() as simulation, tempfile.TemporaryDirectory() as scratch:
            say("A control plane, a Node and an echo target are up on loopback; PLEXSPHERE_URL and")
            say("PLEXSPHERE_TOKEN are in plexctl's environment. What it is to reach:")
            say("$ " + IDS_TO_PASTE)
            demonstrate_on(simulation.plane, scratch)
    except (AssertionError, OSError, ValueError, LookupError) as error:
        say("\nNOT as it should be: %s" % error)
        return 1
    say("\nall as it should be")
    return 0


def serve_simulation(target=None, **node_options):
    """Keep control plane, Node and target up until Ctrl-C; returns the exit status."""
    def log_request(request, answer):
        name = {"issue": "IssueSession", "get": "GetSession", "revoke": "RevokeSession"}.get(
            request.operation, "%s %s" % (request.method, request.path))
        body = answer.body or {}
        say("%s  %s: %d %s" % (time.strftime("%H:%M:%S"), name, answer.status,
                               body.get("detail") or body.get("session_id") or " ".join(request.ids[1:])))

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        with Simulation(known=(PROJECT_ID, RESOURCE_ID, HOST, PORT), log=log_request,
                        **node_options) as simulation:
            simulation.node.target_address = target or simulation.target.address
            say("The simulator is running: a control plane, a Node and a target. Press Ctrl-C to stop it.")
            say("Paste this into another terminal (bash, zsh or fish), in this directory:\n")
            for name, value in sorted(simulation.plane.environment().items(), reverse=True):
                say("export %s=%s" % (name, value))
            say(IDS_TO_PASTE)
            say("python3 plexctl.py tcp-forward %s --proxy\n" % FLAGS_TO_PASTE)
            say("Then connect to LOCAL_ADDR: %s:%d is %s." % (HOST, PORT, (
                "%s:%d" % target if target else "an echo service, which sends back what it is sent")))
            say("Another Project or Resource is not found (404); another host or port is not reachable.")
            say("The Node holds ten sessions; those of print mode stay for 30 minutes, or until a restart.")
            say("Requests to the control plane:\n")
            threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")
        return 0


def reachable_address(text):
    """HOST:PORT as an address that accepts connections."""
    try:
        with dial(text, 5) as sock:
            return sock.getpeername()
    except (OSError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            "cannot connect to %s; expected HOST:PORT of a running target" % text) from None


def seconds_of(text):
    if not re.match(r"[0-9]+([.][0-9]+)?\Z", text):
        raise argparse.ArgumentTypeError("expected a number of seconds, such as 0.02; got %r" % text)
    return float(text)


def demo_main(argv):
    if not argv:
        return demonstrate()
    parser = argparse.ArgumentParser(description="Without arguments, show plexctl at work. With serve, keep "
                                                 "the simulator running, to try plexctl by hand.")
    parser.add_argument("serve", choices=["serve"], help="keep the simulator running until Ctrl-C")
    parser.add_argument("--target", type=reachable_address, metavar="HOST:PORT",
                        help="what %s:%d is (default: an echo service)" % (HOST, PORT))
    parser.add_argument("--late", type=seconds_of, default=0, metavar="SECONDS",
                        help="how long the Node takes to report a session's listener (default 0; a real one: "
                             "up to 60)")
    parser.add_argument("--delay", type=seconds_of, default=0, metavar="SECONDS",
                        help="latency to the Node, each way (default 0)")
    parser.add_argument("--kinder", action="store_true",
                        help="a Node that serves several connections at once and keeps half-closes")
    options = vars(parser.parse_args(argv))
    del options["serve"]
    return serve_simulation(**options)


if __name__ == "__main__":
    raise SystemExit(demo_main(sys.argv[1:]))


# ---- tests: what all of them share ---------------------------------------------------------------

import ast
import base64
import concurrent.futures
import copy
import ctypes
import fcntl
import filecmp
import gc
import getpass
import glob
import gzip
import logging
import pickle
import pty
import pwd
import resource
import shutil
import ssl
import stat
import termios
import traceback
import types
import urllib.error

import pytest  # the demonstration must not need it

import plexctl

LINUX = sys.platform.startswith("linux")
ROOT = os.geteuid() == 0
GIVES_AWAY = pytest.mark.skipif(not ROOT, reason="needs root to give files away")
BECOMES_OTHERS = pytest.mark.skipif(not ROOT or not os.path.exists("/usr/bin/python3"),
                                    reason="needs root and the system's Python")
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
NO_TOKEN = {"PLEXSPHERE_TOKEN": ""}  # as if it were not there
Result = collections.namedtuple("Result", "status out err")  # what one call of main left
FORWARDED = []  # the control plane of every process that forwards, for the tests to look for sessions


@pytest.fixture(autouse=True)
def no_secret_is_on_a_stream_and_no_session_is_left(request, monkeypatch):
    """Every test: no bearer token and no session token on a stream, but, with `@pytest.mark.reveals`, a
    session token on stderr. A process that forwarded has revoked each session that was issued just once."""
    del SEEN[:], FORWARDED[:]
    for name in list(os.environ):
        if name.startswith(("PLEXSPHERE_", "PLEXCTL_", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield
    reveals = request.node.get_closest_marker("reveals")
    for stream, text in SEEN:
        assert BEARER not in text, "the bearer token is on " + stream
        if not reveals or stream != "err":
            assert SESSION_TOKEN_MARK not in text, "a session token is on " + stream
    for plane in FORWARDED:
        assert plane.active() == [] and plane.revocations() == collections.Counter(plane.issued), \
            plane.describe()


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
    with Simulation() as running:
        yield running


def one_error_line(result, *words):
    """The result's stderr is one printable error line, and has these words."""
    assert re.match(r"plexctl: error: [ -~]+\n\Z", result.err), result.err
    for word in words:
        assert word in result.err
    return result.err[:-1]


def failed(result, status, *words, alone=True):
    """The run printed nothing, and ended with this status and one error line, which has these words.

    It is the last line on stderr, and unless `alone` is false the only one."""
    assert (result.status, result.out) == (status, ""), result
    if not alone:
        assert result.err.count("plexctl: error: ") == 1, result.err
        result = result._replace(err=result.err.splitlines(True)[-1])
    return one_error_line(result, *words)


def succeeded(result):
    """The run ended with 0 and said nothing on stderr; the document that it printed as text."""
    assert (result.status, result.err) == (0, ""), result
    return parse_document(result.out, "text")


@contextlib.contextmanager
def lasts(low, high):
    began = time.monotonic()
    yield
    assert low <= time.monotonic() - began < high


def forward_args(plane, *more):
    """The command line with the published ids, for this control plane."""
    return ["tcp-forward", "--server", plane.url] + REQUIRED_FLAGS + [str(word) for word in more]


def forward_to(cli, plane, *more, **environ):
    return cli(forward_args(plane, *more), plane.environment(**environ))


def run_words(words, env=None, encoding="utf-8", **popen):
    """Run a command line to its end, in an environment of exactly `env`; its Result."""
    stdin = {} if "input" in popen else {"stdin": subprocess.DEVNULL}
    done = subprocess.run([str(word) for word in words], env=env, **{
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **stdin, **popen})
    out, err = [(data or b"").decode(encoding, "replace") for data in (done.stdout, done.stderr)]
    SEEN.extend([("out", out), ("err", err)])
    return Result(done.returncode, out, err)


def invocation(at, flags, within=(), python=sys.executable, program=(PLEXCTL,), env=(), **popen):
    """tcp-forward with these flags, at a control plane or that of a simulation, as a process: its words, and
    options of Popen; `program` is what the interpreter runs, `within` the command that runs it."""
    plane = getattr(at, "plane", at)
    if {"--proxy", "--stdio", "--"}.intersection(flags) and "--keep-session" not in flags:
        FORWARDED.append(plane)
    return ([*within, python, "-I", *program, *forward_args(plane, *flags)],
            dict(env=clean_environment(plane.environment(**dict(env))), **popen))


def run(at, *flags, **how):
    words, popen = invocation(at, flags, **how)
    return run_words(words, **popen)


def start(at, *flags, **how):
    words, popen = invocation(at, flags, **how)
    return Process(words, **popen)


def redirected(redirections):
    """What a command runs within, for a shell's redirections, such as `>&-`."""
    return ["sh", "-c", 'exec "$@" ' + redirections, "sh"]


def prepared(statements):
    """plexctl.py as the program of an interpreter that has executed these statements before."""
    return ["-B", "-S", "-c", "import sys; sys.path.insert(0, %r)\n%s\nimport plexctl\nplexctl.run()" % (
        HERE, statements)]


# ---- tests: the simulator's Node -----------------------------------------------------------------

@contextlib.contextmanager
def node_to(serve, **options):
    """A Node with a Target behind it, and a session that is open, "first": (node, target, its endpoint)."""
    with Target(serve) as target, Node(target.address, **options) as node:
        node.open("first")
        yield node, target, node.endpoint("first")


def can_be_dialled(endpoint):
    try:
        dial(endpoint).close()
        return True
    except ConnectionError:
        return False


def fill(client):
    """Send until nothing is taken for a second."""
    client.settimeout(1)
    with pytest.raises(socket.timeout):
        while True:
            client.sendall(bytes(1 << 20))


def issued_by(plane):
    """The id of a session that was asked for without plexctl's command line."""
    return str(create_client(plane).issue(session_request()).session_id)


def test_the_second_connection_waits_until_the_node_has_served_the_first():
    with node_to(echo) as (node, target, endpoint), dial(endpoint) as first, dial(endpoint) as second:
        assert talk(first)
        second.sendall(b"2")
        let_pass(0.5)
        assert (node.busy("first"), target.accepted) == (1, 1)
        first.close()
        assert second.recv(1) == b"2"
        assert node.connections == {"first": 2} and node.most == {"first": 1}
        node.wait_for(lambda: [(wait.session_id, wait.served) for wait in node.waits] == [("first", True)])


@pytest.mark.parametrize("delay", [0, 0.02])
def test_either_end_of_input_ends_both_directions_at_the_node(delay):
    with node_to(sink, delay=delay) as (_, _, endpoint):
        assert exchange(endpoint, b"question") == b""  # nobody waits for the answer
    with node_to(source(1 << 20), delay=delay) as (_, target, endpoint), dial(endpoint) as client:
        assert b"".join(chunks(client)) == pattern(1 << 20)
        target.wait_for(lambda: target.ends == ["eof"])  # though the client has not ended anything
    with node_to(source(1 << 26)) as (node, _, endpoint), dial(endpoint) as client:
        fill(client)
        client.close()
        node.wait_for(lambda: not node.busy("first"))


@pytest.mark.parametrize("leave", [socket.socket.close, reset_close], ids=["ends", "resets"])
@pytest.mark.parametrize("where", ["a write", "a dial"])
def test_the_node_is_deaf_to_a_client_that_leaves_during(where, leave):
    with node_to(silent) as (node, _, endpoint), dial_that_hangs() as hanging:
        if where == "a dial":
            node.target_address = hanging.getsockname()
        with dial(endpoint) as client:
            if where == "a write":
                fill(client)
            node.wait_for(lambda: node.busy("first"))
            leave(client)
            let_pass(0.5)
            assert node.busy("first")


@pytest.mark.parametrize("how, options", [
    ("expiry", dict(ttl=0.5, early=0)), ("its own clock", dict(ttl=30, early=29.5)), ("revocation", {})],
    ids=str)
def test_the_node_closes_listener_and_connection_with_a_plain_end(how, options):
    with Simulation(**options) as simulation:
        plane, session_id = simulation.plane, issued_by(simulation.plane)
        endpoint = simulation.node.endpoint(session_id)
        with dial(endpoint) as client:
            assert talk(client)
            if how == "revocation":
                plane.revoke(session_id)
            assert client.recv(1) == b""  # looks complete
        simulation.node.wait_for(lambda: not can_be_dialled(endpoint))
        assert (session_id in plane.active()) == (how == "its own clock")


def test_a_delay_is_one_of_time_and_not_of_bandwidth():
    with node_to(echo, kinder=True, delay=0.1) as (_, _, endpoint):
        for size, seconds in ((1, 2), (8 << 20, 5)):
            with lasts(0.3, seconds):  # there, back, and an end that waits for neither
                assert exchange(endpoint, pattern(size)) == pattern(size)


# ---- tests: tables and helpers ------------------------------------------------------------------

def by_id(names, table):
    """A parametrize() of the rows that a dictionary has by their ids."""
    return pytest.mark.parametrize(names, list(table.values()), ids=[shown(each) for each in table])


make_fifo = functools.partial(os.mkfifo, mode=0o600)
REFUSED = "refused"
ARABIC_FIVE = "\u0665"
BAD_UUIDS = [
    "", "x", PROJECT_ID.replace("-", ""), "{%s}" % PROJECT_ID, "urn:uuid:" + PROJECT_ID, PROJECT_ID + "\n",
    " " + PROJECT_ID, PROJECT_ID[:-1], PROJECT_ID + "0", "0190a8b8a0c0-7a0a-8a0a-a0a0-a0a0a0c0",
    "0190-a8b8-a0c0-7a0a-8a0aa0a0a0a0a0c0", PROJECT_ID.replace("9", "\u0669"),
    PROJECT_ID.replace("-", "\u2010"), PROJECT_ID.replace("b", "g")]
BAD_NUMBERS = ["", " 5", "5 ", "5\n", "1_000", ARABIC_FIVE, "\uff15", "+5", "-1", "0x50", "1e3", "five",
               "9" * 19, "9" * 5000]
BAD_ADDRESSES = [  # for everything that has to be an address or a name
    "127.1", "0x7f.1", "2130706433", "0x7f000001", "0", "0177.0.0.1", "1.2.3.256", "1.2.3", "1.2.3.4.5",
    "01.2.3.4", "a..b", ".a", "-a", "a-", "a b", "a\tb", "a\x00b", "a/b", "a@b", "a%31", "a\\b",
    "[127.0.0.1]", "[::1", "::1]", "[::1%lo]", "[12345::1]", "[]", "[name]", "b\xfccher.example",
    "\u0661.2.3.4", "a" * 64, "a." * 127 + "aa"]
BAD_SERVERS = ["", "plane.example", "//plane.example", "https:plane.example", "https:/plane.example",
               "ftp://plane.example", "file:///etc/passwd", "data:,x", " https://plane.example"] + [
    "https://" + rest for rest in [
        "", "user@plane.example", "user:pass@plane.example", "@plane.example", "plane.example?query",
        "plane.example/?q", "plane.example#part", "plane.example/#", "plane.example\\@other.example",
        "plane.example/\\x", "plane.example ", "plane .example", "plane.example/a b", "plane.example\n",
        "plane.example/\r\nHost: other", "plane.example/\x00", "plane.example/\x7f", "plane.example/\u2028",
        "pl\xe4ne.example", "plane.example:", "plane.example:0", "plane.example:65536", "plane.example:1_0",
        "plane.example:" + ARABIC_FIVE, "plane.example:443:443", "::1", "[::1", "[::1]x"]]
BAD_HTTP_SERVERS = [  # good with --allow-http
    "http://plane.example", "HTTP://plane.example", "http://10.0.0.1", "http://127.0.0.1.evil.example",
    "http://localhost.evil.example", "http://notlocalhost", "http://128.0.0.1", "http://[::2]",
    "http://0.0.0.0", "http://plane.localhost"]


def shown(value):
    """The id of a parameter: short and ASCII, whatever is in it."""
    return ascii(value)[:48]


def rows(good, bad):
    """Rows of (text, expected): what each good text becomes, and that the bad ones are refused."""
    return list(good.items()) + [(text, REFUSED) for text in bad]


def outcome(parse, *arguments):
    """What a parser returns; REFUSED if it raises ValueError."""
    try:
        return parse(*arguments)
    except ValueError:
        return REFUSED


def write_private(path, content, mode=0o600):
    """A file with these bytes (or this text, or this document) and this mode; its path as a string."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    with open(str(path), "wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode("utf-8"))
    os.chmod(str(path), mode)
    return str(path)


def write_config(directory, document, mode=0o600):
    """A config file below this home directory; the environment that leads to it."""
    folder = os.path.join(str(directory), ".config", "plexctl")
    os.makedirs(folder)
    write_private(os.path.join(folder, "config.json"), document, mode)
    return {"HOME": str(directory)}


def config_of(plane):
    """A config document whose default profile is this control plane and its token."""
    return {"default": "prod", "profiles": {"prod": {"server": plane.url, "token": BEARER}}}


def flags_with(flag, *values):
    """The required flags with one of them given like this instead (or, without values, left out)."""
    pairs = zip(REQUIRED_FLAGS[::2], REQUIRED_FLAGS[1::2])
    kept = [word for pair in pairs if pair[0] != flag for word in pair]
    return kept + [word for value in values for word in (flag, value)]


# ---- tests: values ------------------------------------------------------------------------------

NUMBERS_OF_SESSIONS = ({"1": 1, "4": 4}, BAD_NUMBERS + ["1.5", "0", "33"])
FLAG_VALUES = {  # by flag: what each good value becomes, and the bad ones
    "--project-id": ({PROJECT_ID: PROJECT_ID, PROJECT_ID.upper(): PROJECT_ID}, BAD_UUIDS),
    "--resource-id": ({RESOURCE_ID.upper(): RESOURCE_ID}, BAD_UUIDS),
    "--host": ({text: text for text in ("10.0.0.5", "db.internal", "::1", "localhost", "b\xfccher.example")},
               ["", " ", "\t\n", "\xa0", "\u2028", "a b", " a", "a\n", "a\x1b[2J", "a\x1b]0;x\x07", "a\x00",
                "a\u202eb", "a\xa0b", "\udcff", "a" * 254, "a:1", "http://a", "a/b"]),
    "--port": ({"1": 1, "65535": 65535, "0022": 22}, BAD_NUMBERS + ["0", "65536", "117925", "5.5"]),
    "--ttl-seconds": ({"0": 0, "700": 700}, BAD_NUMBERS + ["1.5"]),
    "--wait-seconds": ({"0": 0, "90": 90, "0.5": 0.5, "2.25": 2.25},
                       BAD_NUMBERS + ["nan", "inf", "-0", "1.", ".5", "1,5", "5s"]),
    "--max-sessions": NUMBERS_OF_SESSIONS, "--min-sessions": NUMBERS_OF_SESSIONS,
    "--local-addr": ({
        "127.0.0.1:0": "127.0.0.1:0", "127.0.0.1:65535": "127.0.0.1:65535", "0.0.0.0:5432": "0.0.0.0:5432",
        "[::1]:0": "[::1]:0", "localhost:5432": "127.0.0.1:5432", "unix:/run/db.sock": "unix:/run/db.sock"},
        ["", "127.0.0.1", "5432", ":0", "*:0", "::1:0", "[::1]", "name.example:0", "127.0.0.1:65536",
         "127.0.0.1:-1", "127.1:0", "unix:", "unix:relative", "unix:/a\nb", "unix:/" + "a" * 200]),
    "--output": ({each: each for each in ("text", "json", "yaml")}, ["", "xml", "JSON", "json ", "\x1b[2J"]),
    "--server": ({}, BAD_SERVERS + BAD_HTTP_SERVERS),
    "--profile": ({}, [""]), "--token-file": ({}, [""]), "--ca-file": ({}, [""])}


@pytest.mark.parametrize("flag, text, expected", [
    (flag, text, expected) for flag, (good, _) in FLAG_VALUES.items() for text, expected in good.items()])
def test_a_flag_takes_a_good_value_as_what_it_means(flag, text, expected):
    _, options = plexctl.parse_arguments(["tcp-forward", "--proxy"] + flags_with(flag, text))
    found = getattr(options, flag[2:].replace("-", "_"))
    assert (str(found) if flag == "--local-addr" else found) == expected


@pytest.mark.parametrize("text, expected", rows({
    "10.0.0.5:5432": ("10.0.0.5", 5432), "255.255.255.255:1": ("255.255.255.255", 1),
    "[2001:db8::1]:65535": ("2001:db8::1", 65535), "[::ffff:10.0.0.1]:22": ("::ffff:10.0.0.1", 22),
    "node-1.plex.example:22": ("node-1.plex.example", 22), "node.example.:22": ("node.example.", 22),
    "node_1:80": ("node_1", 80), "localhost:1": ("localhost", 1), "3com.example:1": ("3com.example", 1)},
    ["", ":", "name", "name:", ":80", "10.0.0.5", "::1:80", "name:80:80", "name:80\n", "name:000022"]
    + ["name:" + port for port in BAD_NUMBERS + ["0", "65536", "117925"]]
    + [host + ":80" for host in BAD_ADDRESSES]), ids=shown)
def test_an_endpoint_is_a_strict_host_and_a_port(text, expected):
    endpoint = outcome(plexctl.parse_endpoint, text)
    assert endpoint == expected and (expected == REFUSED or str(endpoint) == text)


@pytest.mark.parametrize("text, expected", rows({
    "https://plane.example": "https://plane.example:443",
    "HTTPS://plane.example/": "https://plane.example:443",
    "https://plane.example:8443/some/prefix/": "https://plane.example:8443/some/prefix",
    "https://10.0.0.1": "https://10.0.0.1:443", "https://[2001:db8::1]:1": "https://[2001:db8::1]:1",
    "http://127.0.0.1:1": "http://127.0.0.1:1", "http://127.255.0.9": "http://127.255.0.9:80",
    "http://localhost": "http://localhost:80", "http://[::1]:1": "http://[::1]:1"},
    BAD_SERVERS + BAD_HTTP_SERVERS + ["https://" + host for host in BAD_ADDRESSES if host != "a/b"]),
    ids=shown)
def test_a_server_is_an_absolute_https_url_or_loopback(text, expected):
    assert str(outcome(plexctl.parse_server, text, False)) == expected
    with_allow_http = outcome(plexctl.parse_server, text, True)
    assert (with_allow_http == REFUSED) == (expected == REFUSED and text not in BAD_HTTP_SERVERS)


@pytest.mark.parametrize("text, expected", rows({
    "1970-01-01T00:00:00Z": 0, "1970-01-01t00:00:01z": 1, "1970-01-01T00:00:00.25Z": 0.25,
    "1970-01-01T00:00:01.123456789Z": pytest.approx(1.123456789), "1970-01-01T02:00:00+02:00": 0,
    "1969-12-31T18:29:30.5-05:30": -29.5, "1970-01-01T00:00:00-00:00": 0,
    "2000-02-29T00:00:00Z": 951782400, "2016-12-31T23:59:60Z": 1483228799,
    "2099-05-02T10:30:00Z": 4081401000}, [
    "", "1970-01-01", "1970-01-01T00:00:00", "1970-01-01 00:00:00Z", "1970-01-01T00:00Z", "19700101T000000Z",
    "1970-01-01T00:00:00+0000", "1970-01-01T00:00:00+00", "1970-01-01T00:00:00,5Z", "1970-01-01T00:00:00.Z",
    "1970-01-01T00:00:00Z\n", " 1970-01-01T00:00:00Z", "1970-02-30T00:00:00Z", "2100-02-29T00:00:00Z",
    "1970-13-01T00:00:00Z", "1970-00-01T00:00:00Z", "1970-01-01T24:00:00Z", "1970-01-01T00:60:00Z",
    "1970-01-01T00:00:61Z", "1970-01-01T00:00:00+24:00", "1970-01-01T00:00:00+00:60", "0000-01-01T00:00:00Z",
    "12026-01-01T00:00:00Z", "-970-01-01T00:00:00Z", "1970-01-01T00:00:0%sZ" % ARABIC_FIVE, "0", "1e9"]),
    ids=shown)
def test_a_time_is_rfc_3339(text, expected):
    assert outcome(plexctl.parse_time, text) == expected


@pytest.mark.parametrize("raw, expected", rows({
    b'{"a": [1, 2.5, null, true, "\\u00e9"]}': {"a": [1, 2.5, None, True, "\xe9"]},
    '"\xe9\u2028"'.encode("utf-8"): "\xe9\u2028", b' "\\ud83d\\ude00" ': "\U0001f600"}, [
    b"", b" ", b"{", b"{} {}", b"{'a': 1}", b"[1,]", b"NaN", b'{"a": NaN}', b"Infinity", b"[-Infinity]",
    b"nan", b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]', b'{"a": 1, "\\u0061": 2}', b'"\\ud800"',
    b'{"\\udfff": 1}', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}", "{}".encode("utf-16"), "{}".encode("utf-16-le"),
    "{}".encode("utf-32"), b'"\xff"', b'"\xc0\x80"', b'"\n"', b'"\x00"', b"[" * 100000,
    b"[" * 100000 + b"]" * 100000, b'{"a":' * 100000 + b"1" + b"}" * 100000, b"7" * 1000000]), ids=shown)
def test_json_is_strict_and_judged_at_once(raw, expected):
    with lasts(0, 5):
        assert outcome(plexctl.parse_json, raw) == expected


@pytest.mark.parametrize("host, known", [(host, known) for known, hosts in {
    # whether it is loopback; may be dialled; may be where the control plane is on loopback too
    (True, False, True): ["127.0.0.1", "127.255.255.254", "::1", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1"],
    (True, True, True): ["localhost", "LOCALHOST."],  # a name is judged once it is looked up
    (False, True, True): ["128.0.0.1", "::2", "100.64.0.12", "2001:db8::1", "node.example", "notlocalhost",
                          "localhost.evil.example", "127.0.0.1.evil.example"],
    (False, False, True): ["0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0", "224.0.0.1", "239.255.255.255",
                           "::ffff:224.0.0.1", "ff02::1"],
    (False, False, False): ["169.254.169.254", "169.254.0.1", "fe80::1", "FEBF::1", "fe80::1%eth0",
                            "::ffff:169.254.169.254"]}.items() for host in hosts], ids=shown)
def test_loopback_unspecified_multicast_and_link_local_addresses_are_known(host, known):
    assert (plexctl.is_loopback(host), plexctl.is_dialable(host), plexctl.is_dialable(host, True)) == known


def test_a_secret_does_not_show_itself():
    secret = plexctl.Secret(BEARER)
    assert secret.reveal() == BEARER
    shapes = [repr(secret), str(secret), "%s %r" % (secret, secret), "{} {!r}".format(secret, secret),
              format(secret), ascii(secret), repr([secret]), repr({"t": secret}), repr(vars(type(secret)))]
    assert not [each for each in shapes if BEARER in each or "psk_" in each]
    assert not hasattr(secret, "__dict__")
    for carry_off in [
            copy.copy, copy.deepcopy, json.dumps, iter, len, bytes, "{:>9}".format, lambda each: "" + each,
            lambda secret: copy.deepcopy([secret]), lambda secret: "".join([secret])] + [
            functools.partial(pickle.dumps, protocol=each) for each in range(pickle.HIGHEST_PROTOCOL + 1)]:
        with pytest.raises(TypeError) as raised:
            carry_off(secret)
        assert BEARER not in str(raised.value)


@pytest.mark.parametrize("show, value, expected", [
    (plexctl.show_bytes, count, expected) for count, expected in (
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"),
        (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB"), (5000 << 40, "5000.0 TiB"))] + [
    (plexctl.show_seconds, seconds, expected) for seconds, expected in (
        (-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m00s"), (125, "2m05s"), (3599, "59m59s"),
        (3600, "1h00m"), (3725, "1h02m"), (360000, "100h00m"))])
def test_a_byte_count_and_a_duration_are_shown_for_people(show, value, expected):
    assert show(value) == expected


@pytest.mark.parametrize("error, expected", [
    (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
    (urllib.error.URLError(ConnectionResetError(104, "Reset by peer")), "Reset by peer"),
    (OSError(5, "bad\x1b[1m"), "bad\\x1b[1m"), (socket.timeout("timed out"), "timed out"),
    (ValueError("Invalid header value b'Bearer %s'" % BEARER), "ValueError"),
    (OSError("Bearer " + BEARER), "OSError"), (RecursionError(BEARER), "RecursionError"),
    (http.client.RemoteDisconnected(BEARER), "the server closed the connection"),
    (http.client.IncompleteRead(BEARER.encode()), "the answer was cut off"),
    (http.client.LineTooLong(BEARER), "a header is too long"),
    (http.client.HTTPException(BEARER), "the answer is not HTTP/1.1, or has too many headers"),
    (http.client.BadStatusLine(BEARER), "the answer is not HTTP"),
    (FileNotFoundError(2, "No such file or directory", "/" + BEARER), "No such file or directory")],
    ids=shown)
def test_an_error_is_shown_without_what_it_was_given(error, expected):
    assert plexctl.show_error(error) == expected


# ---- tests: credentials, in order ---------------------------------------------------------------

PROFILES = {"default": "main", "profiles": {
    "main": {"server": "https://main.example", "token": "psk_main"},
    "side": {"server": "https://side.example", "token": "psk_side"},
    "address": {"server": "https://address.example"}, "same": {"server": "https://main.example"},
    "token": {"token": "psk_token"}, "empty": {}}}
URL, TOKEN = {"PLEXSPHERE_URL": "https://url.example"}, {"PLEXSPHERE_TOKEN": "psk_environment"}
BOTH = dict(URL, **TOKEN)
GOOD_ENTRY = {"server": "https://localhost:1", "token": "psk_1"}


@pytest.mark.parametrize("server, profile, environ, expected", [
    ("https://flag.example", "side", BOTH, "flag.example"), ("", "side", BOTH, "side.example"),
    ("https://flag.example", "", BOTH, "flag.example"), ("", "address", BOTH, "address.example"),
    ("https://flag.example", "", {"PLEXSPHERE_URL": "no URL", "PLEXSPHERE_TOKEN": "x y"}, "flag.example"),
    ("", "token", BOTH, "url.example"), ("", "empty", BOTH, "url.example"), ("", "", BOTH, "url.example"),
    ("", "", TOKEN, "main.example"), ("", "empty", TOKEN, "main.example"), ("", "", {}, "main.example"),
    ("", "", dict(TOKEN, PLEXSPHERE_URL=""), "main.example"),
    ("", "side", BOTH, "side.example psk_side"), ("", "address", BOTH, "address.example psk_environment"),
    ("", "empty", BOTH, "url.example psk_environment"), ("", "", BOTH, "url.example psk_environment"),
    ("https://other.example", "", TOKEN, "other.example psk_environment"),
    ("", "", {}, "main.example psk_main"), ("", "", {"PLEXSPHERE_TOKEN": ""}, "main.example psk_main"),
    ("https://main.example:443/x", "", {}, "main.example psk_main"),
    ("", "same", {}, "main.example psk_main"), ("", "address", {}, 3), ("", "nobody", BOTH, 3)] + [
    (server, profile, environ, 3) for server, profile, environ in (  # for which the profile's token is not
        ("https://other.example", "side", {}), ("https://side.example:444", "side", {}),
        ("https://main.example", "side", {}), ("http://localhost", "side", {}),
        ("https://side.example.evil.example", "side", {}), ("https://other.example", "", {}), ("", "", URL),
        ("", "token", URL), ("https://other.example", "token", {}), ("", "token", {}))], ids=shown)
def test_the_first_server_and_token_win_and_a_profile_s_token_goes_to_no_other_server(
        tmp_path, server, profile, environ, expected):
    """A token file comes before every other token: where none is expected, there is one."""
    environ, token_file = dict(environ, **write_config(tmp_path, PROFILES)), ""
    if expected != 3 and " " not in expected:
        token_file, expected = write_private(tmp_path / "token", "psk_file"), expected + " psk_file"
    try:
        found = plexctl.resolve_credentials(server, profile, token_file, False, environ)
        assert "%s %s" % (found[0].host, found[1].reveal()) == expected
    except plexctl.PlexctlError as error:
        assert error.exit_code == expected


def test_a_default_profile_is_enough_wherever_the_environment_says_that_it_is(cli, lone_plane, tmp_path):
    home = write_config(tmp_path, config_of(lone_plane))
    wrong = write_config(tmp_path / "other", "not JSON")
    for environ in (home, dict(home, XDG_CONFIG_HOME="relative"),
                    dict(wrong, XDG_CONFIG_HOME=str(tmp_path / ".config"))):
        assert cli(TCP_FORWARD, environ).status == 0
    assert len(lone_plane.issued) == 3


@pytest.mark.parametrize("environ, args, status, word", [
    ({}, [], 2, "server"), (TOKEN, [], 2, "server"),
    ({"PLEXSPHERE_URL": "https://localhost:1"}, [], 3, "credentials"),
    ({}, ["--profile", "prod"], 3, "--profile"), (BOTH, ["--profile", "prod"], 3, "--profile"),
    ({"PLEXSPHERE_URL": "plane.example"}, [], 2, "PLEXSPHERE_URL"),
    ({}, ["--server", "http://plane.example", "--allow-http"], 3, "credentials"),
    ({}, ["--server", "http://localhost:1"], 3, "credentials"),
    ({"PLEXSPHERE_URL": "http://127.0.0.1.evil.example", "PLEXSPHERE_TOKEN": "x"}, [], 2, "PLEXSPHERE_URL"),
    ({"PLEXSPHERE_URL": "https://user:%s@plane.example" % BEARER}, [], 2, "PLEXSPHERE_URL")], ids=shown)
def test_a_server_that_is_missing_exits_2_and_credentials_3(cli, environ, args, status, word):
    failed(cli(TCP_FORWARD + args, environ), status, word)


@pytest.mark.parametrize("document", [
    "", "{}", "[]", "null", "not JSON", b"\xff", b"\xef\xbb\xbf{}", '{"profiles": {}, "profiles": {}}',
    "[" * 60000, {"profiles": []}, {"profiles": None}, {"default": "prod"},
    {"profiles": {"prod": "https://plane.example"}}, {"profiles": {"prod": GOOD_ENTRY, "bad": None}},
    {"profiles": {"prod": dict(GOOD_ENTRY, port=1)}}, {"profiles": {"prod": dict(GOOD_ENTRY, token=5)}},
    {"profiles": {"prod": dict(GOOD_ENTRY, server=None)}}, {"profiles": {"prod": GOOD_ENTRY}, "more": 1},
    {"profiles": {"prod": GOOD_ENTRY}, "default": 5}, {"profiles": {"prod": GOOD_ENTRY}, "default": None},
    {"profiles": {"prod": GOOD_ENTRY}, "default": ["prod"]}], ids=shown)
@pytest.mark.parametrize("args", [[], ["--profile", "prod"]], ids=["default", "named"])
def test_a_config_file_of_another_shape_exits_3_and_shows_the_right_one(cli, tmp_path, document, args):
    failed(cli(TCP_FORWARD + args, write_config(tmp_path, document)), 3, "config.json",
           '{"default": "prod", "profiles": {"prod": {"server": ', '"token": "psk_..."')


def test_without_a_server_no_token_is_read(make_pipe):
    reader, _ = make_pipe()  # whoever reads it waits
    result = subprocess.run([sys.executable, PLEXCTL] + TCP_FORWARD + ["--token-file", "-"],
                            stdin=reader, stderr=subprocess.PIPE, env={}, timeout=20)
    assert result.returncode == 2 and b"no server: " in result.stderr


@pytest.mark.parametrize("default, changes, args, status, words", [
    ("", {}, [], 2, ["no server: "]),
    ("gone", {}, [], 3, ["config.json", "available: old, prod"]),
    ("prod", {}, ["--profile", "pro"], 3, ["--profile: no profile 'pro' in ", "available: old, prod"]),
    ("prod", {"token": "psk 1\r\n"}, [], 3, ["config.json"]), ("prod", {"token": ""}, [], 3, ["config.json"]),
    ("prod", {"token": "psk_\xe9"}, [], 3, ["config.json"]),
    ("prod", {"server": "plane.example"}, [], 2, ["profile"]),
    ("prod", {"server": "http://plane.example"}, [], 2, ["profile"]),
    ("prod", {"server": "https://localhost:0"}, [], 2, ["profile"]),
    ("", {}, ["--profile", "prod", "--server", "https://b.example"], 3,
     ["own server, and --server names another one"])], ids=shown)
def test_a_profile_of_no_use_is_told_with_the_reason(cli, tmp_path, default, changes, args, status, words):
    document = {"profiles": {"prod": dict(GOOD_ENTRY, **changes), "old": {}}}
    if default:
        document["default"] = default
    assert "psk" not in failed(cli(TCP_FORWARD + args, write_config(tmp_path, document)), status, *words)


def test_a_config_directory_that_cannot_be_searched_is_not_taken_for_none(cli, tmp_path):
    (tmp_path / "plexctl").symlink_to("plexctl")
    failed(cli(TCP_FORWARD, {"XDG_CONFIG_HOME": str(tmp_path)}), 3, "config.json", "cannot be read")


@pytest.mark.parametrize("mode, owner", [(mode, 0) for mode in (0o644, 0o640, 0o620, 0o604, 0o660, 0o601)] + [
    pytest.param(0o600, 65534, marks=GIVES_AWAY)])
def test_a_config_or_token_file_that_others_may_use_exits_3(cli, lone_plane, tmp_path, mode, owner):
    environ = write_config(tmp_path, config_of(lone_plane), mode)
    path = write_private(tmp_path / "token", BEARER, mode)
    os.symlink(path, path + ".link")
    if owner:
        os.chown(path, owner, 0)
        os.chown(str(tmp_path / ".config" / "plexctl" / "config.json"), owner, 0)
    fault = "owned by uid 65534" if owner else "permissions %04o are too open; run chmod 600 /" % mode
    failed(cli(TCP_FORWARD, environ), 3, "config.json", fault)
    for each in (path, path + ".link"):
        failed(forward_to(cli, lone_plane, "--token-file", each), 3, "--token-file " + each,
               fault.replace(" /", " " + each))
    assert lone_plane.requests == []


@pytest.mark.parametrize("mode, name", [
    (0o600, "token"), (0o400, os.fsdecode(b"j\xfcrgen token") if LINUX else "J\xfcrgen")], ids=shown)
@pytest.mark.parametrize("raw", [
    BEARER.encode(), b"psk_1\n", b"psk_1\r\n", b"!~", b"a", b"a" * 8192, b"a" * 8192 + b"\r\n"], ids=shown)
def test_a_token_file_of_any_name_is_read_without_its_line_end(cli, lone_plane, tmp_path, mode, name, raw):
    lone_plane.bearer = raw.decode().rstrip("\r\n")  # that it wants
    path, link = os.path.join(str(tmp_path), name), str(tmp_path / "link")
    link_to(write_private(path, raw, mode))(link)
    for each in (path, link):
        assert cli(forward_args(lone_plane, "--token-file", each)).status == 0


@pytest.mark.parametrize("where", ["--token-file", "PLEXSPHERE_TOKEN"])
@pytest.mark.parametrize("fault, raws", [  # CR and LF would be header injection
    ("is empty", [b"\n", b"\r\n"]), ('starts with "Bearer "', [b"Bearer psk_1", b"bearer psk_1"]),
    ("contains a space", [b"psk 1", b" psk_1", b"psk_1 \n", b"psk_1\t"]),
    ("contains a line break", [b"psk_1\n\n", b"\npsk_1", b"psk_1\r", b"psk\r\nX-Header: 1"]),
    ("byte-order mark", [b"\xef\xbb\xbfpsk_1", "psk_1".encode("utf-16")]),
    ("not printable ASCII", [b"psk_\xff", b"psk\x001", b"psk_1\x7f", b"psk_1\x1c\n", b"psk_1\xe2\x80\xa8\n",
                             b"psk_1\xc2\xa0", b"\xa0psk_1"]),
    ("longer than 8192", [b"a" * 8193, b"a" * 8193 + b"\n"])], ids=shown)
def test_a_token_with_anything_else_in_it_exits_3(cli, lone_plane, tmp_path, where, fault, raws):
    for raw in raws:
        args, environ = [], {"PLEXSPHERE_TOKEN": raw.decode("utf-8", "surrogateescape")}
        if where == "--token-file":
            args, environ = [where, write_private(tmp_path / "token", raw)], {"PLEXSPHERE_TOKEN": BEARER}
        result = cli(forward_args(lone_plane, *args), environ)
        assert "psk" not in failed(result, 3, where, ": the token ", fault)
    assert lone_plane.requests == []


def make_unix_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    os.chmod(path, 0o600)


def link_to(target):
    return lambda path: os.symlink(target, path)


@pytest.mark.parametrize("make, word", [
    (make_fifo, "is empty"), (make_unix_socket, ""), (os.mkdir, ""), (link_to("/dev/zero"), ""),
    pytest.param(link_to("/proc/self/mem"), "cannot be read: ",
                 marks=pytest.mark.skipif(not LINUX, reason="opens and cannot be read")),
    (link_to("/nonexistent"), "cannot be read"), (lambda path: None, "cannot be read"),
    (functools.partial(write_private, content="a" * 65536), "longer than 8192"),  # it has been read
    (functools.partial(write_private, content="a" * 65537), "larger than 65536")],
    ids=["a FIFO without a writer", "a socket", "a directory", "a device", "memory", "a dangling link",
         "nothing", "64 KiB", "more than that"])
def test_a_token_file_that_is_no_file_or_too_large_exits_3_at_once(lone_plane, tmp_path, make, word):
    path = str(tmp_path / "token")
    make(path)
    failed(run(lone_plane, "--token-file", path), 3, "--token-file " + path, word)
    assert lone_plane.requests == []


def test_a_token_file_cannot_be_swapped_between_the_check_and_the_use(tmp_path):
    good, bad = write_private(tmp_path / "good", b"good"), write_private(tmp_path / "bad", b"bad", 0o644)
    path, over, seen = str(tmp_path / "token"), threading.Event(), set()
    os.symlink(good, path)

    def swap():
        while not over.is_set():
            for each in (bad, good):
                os.symlink(each, path + ".new")
                os.rename(path + ".new", path)

    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as at_end:
        at_end.callback(over.set)
        pool.submit(swap)
        before = LINUX and descriptors()
        for _ in range(1500):
            with contextlib.suppress(plexctl.CredentialsError):
                seen.add(plexctl.read_own_file(path, "--token-file"))
    assert b"bad" not in seen and (LINUX and descriptors()) == before


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("make", [socket.socketpair, lambda: [open(fd, mode, 0) for fd, mode in zip(
    os.pipe(), ["rb", "wb"])]], ids=["socket", "pipe"])
def test_a_token_comes_from_standard_input_by_any_name_and_however_slow(lone_plane, make, blocks, name):
    its, ours = make()
    os.set_blocking(its.fileno(), blocks)
    with its, ours, start(lone_plane, "--token-file", name, env=NO_TOKEN, stdin=its) as process:
        for piece in (BEARER[:9], BEARER[9:] + "\r\n"):
            os.write(ours.fileno(), piece.encode())
            time.sleep(0.5)
        ours.close()
        assert process.finish().returncode == 0 and process.err == ""


@pytest.mark.parametrize("given, more, status, fault", [
    ("<&-", [], 3, "standard input is closed"), ("</dev/null", [], 3, "is empty"),
    ("<T", ["--stdio"], 2, "--stdio"), ("<T", ["--stdio", "--token-file", "/dev/stdin"], 2, "--stdio"),
    ("<T", ["--stdio", "--token-file", "T"], 2, "--stdio")], ids=shown)
def test_an_input_without_a_token_or_for_stdio_is_an_error(lone_plane, tmp_path, given, more, status, fault):
    path = write_private(tmp_path / "token", BEARER)
    args = [word.replace("T", path) for word in ["--token-file", "-"] + more]
    result = run(lone_plane, *args, within=redirected(given.replace("T", path)), env=NO_TOKEN)
    failed(result, status, "--token-file", fault)
    assert lone_plane.requests == []


@pytest.mark.parametrize("mode, status", [(0o600, 0), (0o644, 3)])
def test_a_file_that_is_descriptor_0_is_judged_and_read_from_its_start(lone_plane, tmp_path, mode, status):
    path = write_private(tmp_path / "token", BEARER, mode)
    with open(path) as stdin:
        stdin.seek(0, os.SEEK_END)
        result = run(lone_plane, "--token-file", path, env=NO_TOKEN, stdin=stdin)
    assert result.status == status and len(lone_plane.issued) == (not status)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_token_comes_from_a_process_substitution_however_slow(lone_plane):
    script = 'exec "$@" --token-file <(sleep 0.3; printf "%s\\n" "$OF_THE_TEST")'
    succeeded(run(lone_plane, within=["bash", "-c", script, "bash"], env=dict(NO_TOKEN, OF_THE_TEST=BEARER)))
    assert len(lone_plane.issued) == 1


@pytest.mark.parametrize("name, told", [
    ("/run/secrets/plexctl/no-such-token", " /run/secrets/plexctl/no-such-token"),
    ("no-such-file", " 'no-such-file'"), (BEARER, "")], ids=["path", "name", "token"])
def test_a_message_names_the_token_file_unless_it_may_be_the_token_itself(cli, lone_plane, name, told):
    result = forward_to(cli, lone_plane, "--token-file", name)
    failed(result, 3, "--token-file%s: cannot be read: No such" % told)


# ---- tests: command line ------------------------------------------------------------------------

@pytest.mark.parametrize("expected, lines", [
    (dict(max_sessions=4, min_sessions=1, wait_seconds=90, ttl_seconds=0, mode="print", output="text",
          local_addr=plexctl.LocalAddress("127.0.0.1", 0)), ["tcp-forward"]),
    (dict(project_id=PROJECT_ID, host=HOST, port=PORT), [" ".join(REQUIRED_FLAGS) + " tcp-forward"]),
    (dict(server="https://b", profile="b", token_file="c", ca_file="d"), [
        "--server https://b --profile b --token-file c --ca-file d tcp-forward",
        "--server a --token-file a tcp-forward --server https://b --profile b --token-file c --ca-file d"]),
    (dict(output="json"), [
        "--output json tcp-forward", "tcp-forward --output json", "--output=yaml tcp-forward --output json",
        "tcp-forward --output yaml --output=json"]),
    (dict(yes=True, allow_http=False), ["--yes --allow-http tcp-forward --yes=true --allow-http=false"]),
    (dict(reveal_secrets=True), [
        "tcp-forward --reveal-secrets", "--reveal-secrets tcp-forward", "tcp-forward --reveal-secrets=true",
        "--reveal-secrets=false tcp-forward --reveal-secrets"]),
    (dict(reveal_secrets=False), [
        "tcp-forward", "--reveal-secrets tcp-forward --reveal-secrets=false",
        "--reveal-secrets=true tcp-forward --reveal-secrets=false", "--reveal-secrets=false tcp-forward",
        "tcp-forward --reveal-secrets --reveal-secrets=false"]),
    (dict(verbose=True, quiet=False), ["-v tcp-forward", "tcp-forward -v", "-vv tcp-forward -vvv",
                                       "--verbose tcp-forward -v"]),
    (dict(verbose=False, quiet=True), ["tcp-forward -q", "--quiet tcp-forward"]),
    (dict(verbose=True, quiet=True), ["tcp-forward -vq"]),
    (dict(verbose=False, quiet=False), ["tcp-forward", "-q tcp-forward --quiet=false"]),
    (dict(mode="--proxy", max_sessions=1, min_sessions=1), ["tcp-forward --proxy --max-sessions 1"]),
    (dict(max_sessions=32, min_sessions=32), ["tcp-forward --proxy --max-sessions 32 --min-sessions 32"]),
    (dict(mode="-- COMMAND", renew=True, allow_other_users=True, command=["psql", "-p{port}"]),
     ["--allow-other-users tcp-forward --renew --min-sessions 4 -- psql -p{port}"]),
    (dict(mode="--stdio", keep_session=True, wait_seconds=0),
     ["tcp-forward --stdio --keep-session --wait-seconds 0"]),
    (dict(mode="print"), [
        "tcp-forward --proxy=false", "tcp-forward --stdio=false", "--proxy tcp-forward --proxy=false",
        "tcp-forward --renew=false --keep-session=false --allow-other-users=false"])], ids=shown)
def test_a_flag_may_stand_before_the_command_and_one_after_it_wins(expected, lines):
    for line in lines:
        words = line.split()
        if "--host" not in words:
            words[words.index("tcp-forward") + 1:0] = REQUIRED_FLAGS
        prints, options = plexctl.parse_arguments(words)
        assert prints == "" and {name: getattr(options, name) for name in expected} == expected, line


@pytest.mark.parametrize("args", [
    ["-h"], ["--help"], ["tcp-forward", "-h"], ["tcp-forward", "--port", "0", "--help"],
    ["--server", "x", "-h", "--nonsense"]], ids=shown)
def test_help_goes_to_stdout_and_exits_0(cli, args):
    result = cli(args)
    assert (result.status, result.err) == (0, "")
    for words in REQUIRED_FLAGS[::2] + ["--proxy", "--quiet", "\ntarget:\n", "\nforwarding:\n",
                                        "\nglobal options:\n", "\nexit codes: "]:
        assert words in result.out
    assert all(len(line) < 80 for line in result.out.splitlines())
    assert result.out.partition("\nexamples")[2].count("plexctl tcp-forward $TARGET") == 4


def test_however_it_is_started_it_tells_its_version(tmp_path):
    (tmp_path / "link").symlink_to(PLEXCTL)
    (tmp_path / "app").mkdir()
    shutil.copy(PLEXCTL, str(tmp_path / "app"))
    zipapp = [sys.executable, "-m", "zipapp", str(tmp_path / "app"), "-o", str(tmp_path / "app.pyz")]
    assert run_words(zipapp + ["-m", "plexctl:run"]).status == 0
    shutil.copy(PLEXCTL, str(tmp_path / "app" / "__main__.py"))
    assert run_words(zipapp[:-1] + [str(tmp_path / "main.pyz")]).status == 0
    for words in ([PLEXCTL], ["link"], ["-m", "plexctl"], ["-"], ["app.pyz"], ["main.pyz"]):
        for isolated, command in (([], []), (["-I"], ["tcp-forward"]))[:1 + ("-m" not in words)]:
            with open(PLEXCTL, "rb") as program:
                result = run_words([sys.executable, "-B"] + isolated + words + command + ["--version"],
                                   clean_environment(), stdin=program,
                                   cwd=str(tmp_path / "app" if "-m" in words else tmp_path))
            assert result == Result(0, "plexctl %s\n" % plexctl.__version__, ""), result


USAGE_ERRORS = [([], "command"), (["-v"], "command"), (["tcp"], "command"),
                (["tcp-forwards"] + REQUIRED_FLAGS, "command 'tcp-forwards'; did you mean tcp-forward?"),
                (["tcp-foward", "--nonsense"], "command 'tcp-foward'; did you mean tcp-forward?"),
                ([""], "command"), (["--", "true"], "no command; usage: plexctl tcp-forward --project-id")]
USAGE_ERRORS += [(["tcp-forward"] + flags_with(flag), flag) for flag in REQUIRED_FLAGS[::2]]
USAGE_ERRORS += [(["tcp-forward"] + ["--proxy"] * ("sessions" in flag) + flags_with(flag, text), flag)
                 for flag, (_, bad) in FLAG_VALUES.items() for text in bad]
USAGE_ERRORS += [(TCP_FORWARD + [flag + "=--"], flag)  # argparse up to 3.12 drops --
                 for flag in re.findall("(--[a-z-]+) [A-Z]", plexctl.create_parser().format_help())]
USAGE_ERRORS += [(TCP_FORWARD + line.split(), re.split("[ =]", line)[0]) for line in (
    "--proxy --stdio", "--proxy -- true", "--stdio -- true", "--max-sessions 2", "--max-sessions 4",
    "--min-sessions 2", "--min-sessions 1", "--renew", "--keep-session", "--allow-other-users",
    "--max-sessions 4 --stdio", "--renew --stdio", "--min-sessions 1 --stdio", "--allow-other-users --stdio",
    "--min-sessions 5 --proxy", "--min-sessions 3 --max-sessions 2 --proxy", "--local-addr [::1]:0 --stdio",
    "--local-addr unix:/x --stdio", "--", "--reveal=true", "--out json", "--token psk_x", "--serv=x",
    "--reveal-secrets=maybe", "--reveal-secrets=", "--reveal-secrets=TRUE", "--proxy=1", "--yes=no",
    "--quiet=maybe", "--verbose=2", "-x", "--port", "--server", "--output --yes")]
USAGE_ERRORS += [(TCP_FORWARD + words, flag) for words, flag in (
    (["--proxy", "--"], "a command is required after --"), (["--", ""], "a command is required after --"),
    (["--local-addr", "unix:/x"], "--local-addr unix: needs --proxy or -- COMMAND"),
    (["--local-addr", "unix:/x", "--", "psql", "-p{port}"], "--local-addr unix: has no {port}"),
    (["--profile", "--yes"], "--profile: needs a value; is a variable empty?"),
    (["--host=-v"], "--host: needs a value; is a variable empty?"),
    (["--token-file", ""], "--token-file: needs a value; is a variable empty?"),
    (["-=--yes"], "-"), (["-vx"], "-v..."), (["-q="], "-q..."),
    (["-v=true"], "-v...; short flags take no value"), (["tcp-forward"], "argument"),
    (["--x y"], "several words"),
    ([" ".join(REQUIRED_FLAGS)], "several words in one argument (--project-id ...)"),
    (["psql", "-h", "x"], "unexpected argument 'psql'; put -- before the command to run"),
    (["--host", "10.0.0.5:5432"], "--host: must be a host name or address alone"),
    (["--host", "http://10.0.0.5"], "--host: must be a host name or address, not a URL"))]
USAGE_ERRORS += [(words + TCP_FORWARD, flag) for words, flag in (
    (["--token", "psk_x"], "--token"), (["--output", "x"], "--output"), (["--server", ""], "--server"),
    (["--port", "0"], "--port"), (["--token-file", "/nonexistent", "--port", "0"], "--port"),
    (["--profile", "x", "--port", "0"], "--port"), (["--yes=no"], "--yes"), (["\x1b[31m"], "command"),
    (["--ca-file", "/nonexistent", "--reveal-secrets", "--port", "0"], "--port"),
    (["--\x1b[31m\x07"], "--"), (["--\udcff"], "--"), (["-\u202e"], "-"))]


@pytest.mark.parametrize("args, flag", USAGE_ERRORS, ids=lambda value: shown(
    value if isinstance(value, str) else [word for word in value if word not in REQUIRED_FLAGS]))
def test_a_usage_error_is_one_line_that_names_the_flag(cli, lone_plane, tmp_path, args, flag):
    """And comes before anything is opened, such as a config file that is good for an exit status of 3."""
    audit_log = tmp_path / "audit.log"
    more = {"PLEXSPHERE_TOKEN": BEARER}
    if "--server" not in args:
        more["PLEXSPHERE_URL"] = lone_plane.url
    more.update(write_config(tmp_path, "not JSON", 0o644), PLEXCTL_AUDIT_LOG=str(audit_log))
    assert "psk_x" not in failed(cli(args, more), 2, flag, "plexctl --help")
    assert lone_plane.requests == [] and not audit_log.exists()


@pytest.mark.parametrize("flag, meant", [
    ("--ttl", "--ttl-seconds"), ("--ttl=5", "--ttl-seconds"), ("--token", "--token-file"),
    ("--max", "--max-sessions"), ("--reveal", "--reveal-secrets"), ("--ou", "--output"),
    ("--prot", "--port"), ("--ports", "--port"), ("--pott", "--port"), ("--por", "--port"),
    ("--yess", "--yes"), ("--resourceid", "--resource-id"), ("--project_id", "--project-id"),
    ("--wait-second", "--wait-seconds"), ("--hlep", "--help"), ("--versoin", "--version"),
    ("--verbos", "--verbose"), ("--allow", "--allow-other-users or --allow-http"),
    ("--session-count", ""), ("--foo", ""), ("--x", ""), ("--=x", ""), ("-t", ""), ("-tfoo", "")], ids=shown)
@pytest.mark.parametrize("before", [True, False], ids=["before the command", "behind it"])
def test_an_unknown_flag_that_is_almost_a_known_one_names_that_one(cli, flag, meant, before):
    name = flag.split("=")[0] if flag[:2] == "--" else flag[:2]
    line = failed(cli([flag] + TCP_FORWARD if before else TCP_FORWARD + [flag]), 2, "unknown flag " + name)
    assert "; did you mean %s?" % meant in line if meant else "mean" not in line


@pytest.mark.parametrize("line, after, status", [
    ("--token S", False, 2), ("--token S", True, 2), ("--token=S", False, 2), ("--token=S", True, 2),
    ("-tS", True, 2), ("-t S", False, 2), ("S", False, 2), ("S", True, 2), ("--reveal-secrets=S", True, 2),
    ("--yes S", True, 2), ("--yes=S", False, 2), ("--server https://user:S@127.0.0.1", True, 2),
    ("--server https://S@127.0.0.1", False, 2), ("--server https://127.0.0.1/?token=S", True, 2),
    ("--server=https://127.0.0.1/#S", True, 2), ("--server S", True, 2), ("--output S", True, 2),
    ("--port S", True, 2), ("--project-id=S", True, 2), ("--local-addr S", True, 2),
    ("--max-sessions S", True, 2), ("--host S\n", True, 2), ("--token-file S", True, 3),
    ("--profile S", True, 3)])
def test_a_secret_in_the_wrong_place_is_not_shown(cli, lone_plane, line, after, status):
    words = line.replace("S", BEARER).split(" ")
    result = cli(TCP_FORWARD + words if after else words + TCP_FORWARD, {"PLEXSPHERE_URL": lone_plane.url})
    assert BEARER[:12] not in failed(result, status) and lone_plane.requests == []


@pytest.mark.parametrize("flags", [["--proxy"], ["--stdio"], ["--", "true"]], ids=shown)
def test_windows_has_print_mode_alone(monkeypatch, flags):
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        _, options = plexctl.parse_arguments(TCP_FORWARD)
        with pytest.raises(plexctl.UsageError, match=flags[0] + " .*WSL"):
            plexctl.parse_arguments(TCP_FORWARD + flags)
    assert options.mode == "print"


# ---- tests: output ------------------------------------------------------------------------------

@pytest.mark.parametrize("host, shown_target", [
    ("10.0.0.5", "10.0.0.5:5432"), ("2001:db8::5", "[2001:db8::5]:5432"), ("db.internal", "db.internal:5432"),
    ("b\xfccher.example", "b\\xfccher.example:5432")], ids=shown)
@pytest.mark.parametrize("form", ["text", "json", "yaml"])
def test_the_document_has_exactly_the_published_form(cli, lone_plane, host, shown_target, form):
    args = ["tcp-forward", "--local-addr", "127.0.0.1:15432", "--output", form] + flags_with("--host", host)
    result = cli(args, lone_plane.environment())
    assert (result.status, result.err) == (0, "")
    session = lone_plane.sessions[0]
    assert lone_plane.requests[0].body["target"]["tcp"]["host"] == host
    as_json = json.dumps({
        "session_id": session.id, "kind": "tcp", "local_addr": "127.0.0.1:15432",
        "listener_endpoint": session.endpoint, "target": {"host": host, "port": PORT},
        "expires_at": session.expires_at}) + "\n"
    as_yaml = ('session_id: "%s"\nkind: "tcp"\nlocal_addr: "127.0.0.1:15432"\nlistener_endpoint: "%s"\n'
               'target:\n  host: %s\n  port: %d\nexpires_at: "%s"\n'
               % (session.id, session.endpoint, json.dumps(host), PORT, session.expires_at))
    as_text = "LOCAL_ADDR       LISTENER_ENDPOINT  %s  %s  EXPIRES_AT\n127.0.0.1:15432  %s  %s  %s  %s\n" % (
        "TARGET".ljust(len(shown_target)), "SESSION_ID".ljust(36), session.endpoint.ljust(17), shown_target,
        session.id, session.expires_at)
    assert result.out == {"json": as_json, "yaml": as_yaml, "text": as_text}[form]


@pytest.mark.parametrize("local_addr", ["127.0.0.1:0", "[::1]:0"])
def test_port_0_is_resolved_to_a_port_that_is_free(cli, lone_plane, local_addr):
    document = succeeded(forward_to(cli, lone_plane, "--local-addr", local_addr))
    printed, port = document["local_addr"].rsplit(":", 1)
    assert printed == local_addr[:-2] and 0 < int(port) < 65536
    with socket.socket(socket.AF_INET6 if "[" in local_addr else socket.AF_INET) as sock:
        sock.bind((printed.strip("[]"), int(port)))


def test_print_mode_dials_nothing_and_revokes_nothing(cli, simulation):
    assert forward_to(cli, simulation.plane).status == 0
    assert [each.operation for each in simulation.plane.requests] == ["issue"]
    assert simulation.plane.active() == simulation.plane.issued and simulation.plane.revoked == []
    assert not simulation.node.connections and simulation.target.accepted == 0


def test_an_address_that_is_not_ours_costs_no_session(cli, lone_plane):
    failed(forward_to(cli, lone_plane, "--local-addr", "192.0.2.1:0"), 1, "--local-addr", "192.0.2.1")
    assert lone_plane.requests == []


@pytest.mark.parametrize("locale", [
    {"LANG": "C", "LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    {"PYTHONIOENCODING": "utf-16"}], ids=shown)
def test_every_stream_is_ascii_whatever_the_locale(lone_plane, locale):
    environ = clean_environment(lone_plane.environment(**locale))
    words = [sys.executable, PLEXCTL, "tcp-forward"] + REQUIRED_FLAGS
    succeeded(run_words(words, environ))
    lone_plane.script("issue", problem("internal", detail="na\xefve \u202e\x1b[2J"))
    failed(run_words(words, environ), 1, "\\xefve ")
    result = run_words(words + ["--host", "b\udcc3\udcbccher.example", "--output", "json"], environ)
    assert result.status in (0, 2) and re.match(r"[ -~]+\n\Z", result.out + result.err)


# ---- tests: revealing the session token ---------------------------------------------------------

def read_records(path):
    """The records of an audit log, which has whole lines and no token."""
    with open(str(path), encoding="ascii") as stream:
        text = stream.read()
    assert text.endswith("\n") and SESSION_TOKEN_MARK not in text and BEARER not in text
    return [json.loads(line) for line in text.splitlines()]


def reveal_to(cli, plane, log, *more, **environ):
    return forward_to(cli, plane, "--reveal-secrets", *more, PLEXCTL_AUDIT_LOG=str(log), **environ)


@pytest.mark.reveals
@pytest.mark.parametrize("form", ["text", "json", "yaml"])
def test_a_revealed_token_is_on_record_and_on_stderr_alone(cli, lone_plane, tmp_path, form):
    result = reveal_to(cli, lone_plane, tmp_path / "audit.log", "--output", form, SUDO_USER="alice")
    session = lone_plane.sessions[0]
    lines = [line for line in result.err.splitlines() if "syslog" not in line]
    assert result.status == 0 and lines[1:] == ["PLEXCTL_SESSION_TOKEN=" + session.token]
    assert lines[0].startswith("plexctl: warning: ") and session.token not in result.out
    assert parse_document(result.out, form)["session_id"] == session.id
    assert lone_plane.active() == [session.id]
    record, = read_records(tmp_path / "audit.log")
    assert abs(plexctl.parse_time(record["time"]) - time.time()) < 60 and record["time"].endswith("Z")
    assert record == {
        "time": record["time"], "event": "session_token_revealed", "server": lone_plane.url,
        "project_id": PROJECT_ID, "resource_id": RESOURCE_ID, "session_id": session.id,
        "target": "%s:%d" % (HOST, PORT), "expires_at": session.expires_at, "sudo_user": "alice",
        "pid": os.getpid(), "hostname": socket.gethostname(), "uid": os.getuid(),
        "user": pwd.getpwuid(os.getuid()).pw_name}


@pytest.mark.reveals
@pytest.mark.parametrize("older", ['{"event": "older"}\n', "{", '{"event": "session_tok'])
def test_a_record_is_appended_as_a_line_and_no_newline_forges_one(cli, lone_plane, tmp_path, older):
    log = write_private(tmp_path / "audit.log", older)  # perhaps one that a full disk cut short
    users = ['x"}\n{"event": "forged"}\n\u2028\x85', "\udcff"]
    for user in users:
        assert reveal_to(cli, lone_plane, log, SUDO_USER=user).status == 0
    with open(log, encoding="ascii") as stream:
        first, *lines = stream.read().splitlines()
    records = [json.loads(line) for line in lines]
    assert first == older.rstrip("\n") and [each["session_id"] for each in records] == lone_plane.issued
    assert [each["sudo_user"] for each in records] == users


@pytest.mark.reveals
@pytest.mark.parametrize("umask", [0, 0o022, 0o277])
@pytest.mark.parametrize("environ, expected", [
    ({"PLEXCTL_AUDIT_LOG": "T/a", "XDG_STATE_HOME": "T/x", "HOME": "T/h"}, "a"),
    ({"XDG_STATE_HOME": "T/x", "HOME": "T/h"}, "x/plexctl/audit.log"),
    ({"HOME": "T/h/i"}, "h/i/.local/state/plexctl/audit.log"),
    ({"XDG_STATE_HOME": "relative", "HOME": "T/h", "PLEXCTL_AUDIT_LOG": ""},
     "h/.local/state/plexctl/audit.log")], ids=shown)
def test_the_audit_log_is_where_the_environment_says_and_private_with_every_directory_made_for_it(
        cli, lone_plane, tmp_path, environ, expected, umask):
    environ = {name: value.replace("T", str(tmp_path)) for name, value in environ.items()}
    before = os.umask(umask)
    try:
        assert forward_to(cli, lone_plane, "--reveal-secrets", **environ).status == 0
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
             for path in tmp_path.rglob("*")}
    assert modes.pop(expected) == 0o600 and len(read_records(tmp_path / expected)) == 1
    assert len(modes) == expected.count("/") and set(modes.values()) <= {0o700}


@pytest.mark.parametrize("name, value", [
    ("PLEXCTL_AUDIT_LOG", "/nonexistent/audit.log"), ("PLEXCTL_AUDIT_LOG", "/etc/passwd/audit.log"),
    ("PLEXCTL_AUDIT_LOG", "\x00"), ("PLEXCTL_AUDIT_LOG", "/dev/full"), ("PLEXCTL_AUDIT_LOG", "/dev/null"),
    ("XDG_STATE_HOME", "/dev/null"), ("HOME", "/dev/null"), ("HOME", "no/absolute/path")], ids=shown)
def test_an_audit_log_where_none_can_be_costs_no_session(cli, lone_plane, name, value):
    result = forward_to(cli, lone_plane, "--reveal-secrets", **{name: value})
    failed(result, 1, "audit log", "PLEXCTL_AUDIT_LOG names a")
    assert lone_plane.requests == []


def make_file(mode, owner=-1):
    """What makes an empty file of this mode, and perhaps gives it away."""
    return lambda path: os.chown(write_private(path, "", mode), owner, -1)


@pytest.mark.parametrize("make, word", [
    (make_file(0o620), "0620"), (make_file(0o602), "0602"), (make_file(0o666), "0666"),
    pytest.param(make_file(0o600, 65534), "65534", marks=GIVES_AWAY), (link_to("elsewhere"), "opened"),
    (link_to("/dev/null"), "opened"), (os.mkdir, ""), (make_fifo, ""), (make_unix_socket, "")],
    ids=["0620", "0602", "0666", "another's", "dangling link", "link", "directory", "FIFO", "socket"])
def test_an_audit_log_that_others_may_write_costs_no_session(cli, lone_plane, tmp_path, make, word):
    path = str(tmp_path / "audit.log")
    make(path)
    failed(reveal_to(cli, lone_plane, path), 1, "audit log " + path, word)
    assert lone_plane.requests == [] and os.listdir(str(tmp_path)) == ["audit.log"]


@pytest.fixture
def syslog(tmp_path, monkeypatch):
    monkeypatch.setattr(plexctl, "SYSLOG_SOCKETS", (str(tmp_path / "none"), str(tmp_path / "log")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "log"))
        yield server


@pytest.mark.reveals
def test_syslog_gets_the_record_too_and_the_root_logger_none(cli, lone_plane, tmp_path, syslog, monkeypatch):
    seen, listener = [], logging.Handler()
    listener.emit = seen.append
    monkeypatch.setattr(logging.getLogger(), "handlers", [listener])
    assert "syslog" not in reveal_to(cli, lone_plane, tmp_path / "audit.log").err and seen == []
    syslog.settimeout(10)
    found = re.match(rb"<86>[A-Z][a-z]{2} [ 123]\d \d\d:\d\d:\d\d plexctl\[%d\]: (\{.*\})$" % os.getpid(),
                     syslog.recv(10000))
    assert [json.loads(found.group(1).decode())] == read_records(tmp_path / "audit.log")


@pytest.mark.reveals
@pytest.mark.skipif(not LINUX, reason="how much a unix socket takes")
@pytest.mark.parametrize("case", ["full", "closed", "no socket"])
def test_a_syslog_that_takes_nothing_is_a_warning_in_time(cli, lone_plane, tmp_path, syslog, case):
    path = syslog.getsockname()
    if case == "full":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, pytest.raises(BlockingIOError):
            other.setblocking(False)
            while True:
                other.sendto(b"x", path)
    else:
        syslog.close()
    if case == "no socket":
        os.unlink(path)
        write_private(path, "")
    with lasts(0, 10):
        result = reveal_to(cli, lone_plane, tmp_path / "audit.log")
    assert result.status == 0 and len(read_records(tmp_path / "audit.log")) == 1
    assert "plexctl: warning: syslog did not take the audit record, the file has it: " in result.err


@pytest.mark.parametrize("statement, limit", [(each, 0) for each in (
    "", "logging.disable(logging.CRITICAL)", "audit.setLevel(logging.CRITICAL)", "audit.disabled = True",
    "audit.addHandler(logging.FileHandler('/dev/null')); audit.handlers[0].emit = lambda record: "
    "open('/none')")] + [  # "": the file is removed; the last one: another handler fails
    ("logging.raiseExceptions = %r" % raises, size) for size in (150, 101) * LINUX for raises in (0, 1)])
def test_a_record_that_is_lost_or_cut_short_reveals_nothing(lone_plane, tmp_path, statement, limit):
    def step(handler, _plane):
        if not statement:
            os.unlink(log)
        handler.answer_really()
    log = write_private(tmp_path / "audit.log", "x" * 100 + "\n")
    lone_plane.script("issue", step)
    result = run(lone_plane, "--reveal-secrets", env={"PLEXCTL_AUDIT_LOG": log},
                 program=prepared("import logging; audit = logging.getLogger('plexctl.audit'); " + statement),
                 preexec_fn=lambda: limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    failed(result, 1, "audit log " + log)
    assert not statement or os.path.getsize(log) == (limit or 101)
    revoked_once(lone_plane)


@pytest.mark.reveals
def test_a_filter_of_the_logger_keeps_no_record_out_of_the_file(
        cli, lone_plane, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("plexctl.audit"), "filters", [lambda record: False])
    assert reveal_to(cli, lone_plane, tmp_path / "audit.log").status == 0
    assert len(read_records(tmp_path / "audit.log")) == 1


@FULL
@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "2>&- >&-"])
def test_a_stderr_that_takes_no_token_comes_after_the_record_and_revokes(lone_plane, tmp_path, redirections):
    result = run(lone_plane, "--reveal-secrets", within=redirected(redirections),
                 env={"PLEXCTL_AUDIT_LOG": str(tmp_path / "audit.log")})
    assert (result.status, result.out) == (1, "")
    revoked_once(lone_plane)
    assert [each["session_id"] for each in read_records(tmp_path / "audit.log")] == lone_plane.issued


# ---- tests: one file alone ----------------------------------------------------------------------

@pytest.fixture
def lone_copy():
    """plexctl.py alone in a directory that every user may read and nobody write."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(PLEXCTL, os.path.join(folder, "plexctl.py"))
        os.chmod(os.path.join(folder, "plexctl.py"), 0o444)
        os.chmod(folder, 0o555)
        yield os.path.realpath(folder)
        os.chmod(folder, 0o755)


def becoming(uid, folder, threads=None):
    """How to run the copy in a folder as another user, perhaps with no more than so many threads."""
    def become():
        os.setgroups([])
        os.setgid(uid)
        if threads is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
        os.setuid(uid)
    return dict(preexec_fn=become, python="/usr/bin/python3", program=[folder + "/plexctl.py"], cwd="/")


def test_the_file_alone_works_without_a_home(lone_plane, lone_copy):
    words = [sys.executable, "-I", "-S", "plexctl.py"] + forward_args(lone_plane)
    succeeded(run_words(words, {"PLEXSPHERE_TOKEN": BEARER}, cwd=lone_copy))
    assert os.listdir(lone_copy) == ["plexctl.py"]


@pytest.mark.once
@pytest.mark.reveals
@BECOMES_OTHERS
@pytest.mark.parametrize("uid, user", [(65534, "nobody"), (54321, "54321")])
def test_another_user_may_use_it(lone_plane, lone_copy, uid, user):
    def reveal(log):
        return run(lone_plane, "--reveal-secrets", env={"PLEXCTL_AUDIT_LOG": log}, **becoming(uid, lone_copy))
    succeeded(run(lone_plane, **becoming(uid, lone_copy)))
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, uid, uid)
        assert reveal(folder + "/audit.log").status == 0
        record, = read_records(folder + "/audit.log")
    assert record["uid"] == uid and (record["user"] == user or uid == 65534)
    failed(reveal(lone_copy + "/audit.log"), 1, "audit log")
    assert len(lone_plane.issued) == 2


@pytest.mark.skipif(not ROOT or not shutil.which("unshare"), reason="needs root and unshare")
def test_it_works_without_proc(lone_plane):
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if run_words(hide + ["true"]).status:
        pytest.skip("no mount namespaces here")
    succeeded(run(lone_plane, within=hide))


def test_importing_it_does_nothing_but_define_and_takes_the_standard_library_alone():
    with open(PLEXCTL, encoding="utf-8") as stream:
        tree = ast.parse(stream.read())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom)}
    assert {"argparse", "urllib.request", "json", "socketserver", "logging"} <= names
    program = ("import sys; sys.path.insert(0, %r); import plexctl, importlib, logging, threading\n"
               "print(threading.active_count(), logging.root.handlers)\n"
               "for name in %r: importlib.import_module(name)" % (HERE, sorted(names)))
    result = run_words([sys.executable, "-I", "-B", "-S", "-c", program], clean_environment())
    assert result == Result(0, "1 []\n", "")


ON_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == %r: %s
sys.meta_path.insert(0, Finder())"""
MISSING = "raise ModuleNotFoundError('No module named ' + name, name=name)"


@pytest.mark.parametrize("statements, words", [
    (ON_IMPORT % (module, MISSING), ["this Python lacks the module %s (" % module, "install"]) for module in (
        "_ssl", "ssl", "urllib.request", "json", "email", "hashlib", "logging")] + [
    # as where re/__init__.py cannot be read: the folder is a package all the same, and an empty one
    ("import types; sys.modules['re'] = types.ModuleType('re')",
     ["cannot load Python's standard library: AttributeError"])], ids=shown)
def test_a_library_that_lacks_a_module_or_is_damaged_is_an_error_in_one_line(statements, words):
    failed(run_words([sys.executable, "-I", *prepared(statements), "--help"], clean_environment()), 1, *words)


def test_a_digest_that_is_missing_does_not_put_a_traceback_on_stderr(lone_plane):
    succeeded(run(lone_plane, program=prepared("sys.modules.update(_hashlib=None, _md5=None)")))


@pytest.mark.parametrize("script, cwd", [
    ("T/x/plexctl.py", "/"), ("plexctl.py", "T/x"), ("T/x/link.py", "/")],
    ids=["by its path", "from its directory", "through a link"])
def test_a_module_beside_the_file_is_not_loaded(lone_plane, tmp_path, script, cwd):
    """As in /tmp, where another user may put one."""
    script, cwd = script.replace("T", str(tmp_path)), cwd.replace("T", str(tmp_path))
    folder = tmp_path / "x"
    folder.mkdir()
    shutil.copyfile(PLEXCTL, str(folder / "plexctl.py"))
    (folder / "link.py").symlink_to("plexctl.py")
    modules = re.findall(r"(?m)^ +import (\w+)", open(PLEXCTL).read())
    assert len(modules) > 20
    for name in modules + ["typing", "encodings", "_socket", "_ssl", "heapq", "gettext"]:
        (folder / (name + ".py")).write_text("open(%r, 'w').close()\nraise SystemExit(99)\n"
                                             % str(tmp_path / ("loaded_" + name)))
    environ = clean_environment(lone_plane.environment())
    for more, status in (["--", "true"], 0), (["--prot", "5"], 2), (["--help"], 0):
        result = run_words([sys.executable, script] + forward_args(lone_plane, *more), environ, cwd=cwd)
        assert result.status == status and "Traceback" not in result.err, result.err
    assert os.listdir(str(tmp_path)) == ["x"]
    revoked_once(lone_plane)


@pytest.mark.skipif(not LINUX, reason="a library that is found by PYTHONHOME")
def test_a_library_that_is_moved_away_does_not_disturb_a_running_proxy(simulation, tmp_path):
    """Once it is ready nothing is imported any more: Python may be upgraded meanwhile."""
    os.symlink(os.path.join(sys.base_prefix, "lib"), str(tmp_path / "lib"))
    environ = clean_environment(simulation.plane.environment(
        PYTHONHOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1"))
    words = [os.path.realpath(sys.executable), PLEXCTL]
    with Process(words + forward_args(simulation.plane, "--proxy", "--renew", "-v"), env=environ) as process:
        address = proxy_address(process)
        os.rename(str(tmp_path / "lib"), str(tmp_path / "moved"))
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(dial(address)) for _ in range(4)]
            assert all(talk(client) for client in clients)
        assert visit(address, pattern(8 << 20))
        simulation.plane.expire(simulation.plane.issued[0])  # and a question that finds it out
        assert visit(address)
        process.send_signal(signal.SIGTERM)
        result = ends_by(process, signal.SIGTERM, 10)
    assert "import" not in result.stderr and "module" not in result.stderr, result.stderr
    assert simulation.plane.active() == []


# ---- tests: control plane ------------------------------------------------------------------------

OTHER_ID = "0190a8b8-ffff-7fff-8fff-ffffffffffff"
MAY_EXIST = "a session may exist"
AT_ONCE = (("Retry-After", "0"),)  # no pause before the next attempt, so that the tests are quick
PASSING = {
    "502": Answer(502, headers=AT_ONCE), "503": problem("signing_unavailable", headers=AT_ONCE),
    "504": Answer(504, raw=b"<html>", headers=AT_ONCE), "409": problem("idempotent_replay", headers=AT_ONCE),
    "429": Answer(429, headers=AT_ONCE)}  # the rate limit of a gateway
NASTY = "a\x1b[2J\x1b]0;owned\x07\r\nplexctl: error: forged\n\u202egnp\x9b\x00\u2028z"


@pytest.fixture
def lone_plane():
    """A control plane without a Node: print mode and the client dial nothing."""
    with ControlPlane() as plane:
        yield plane


@pytest.fixture
def short_limits(monkeypatch):
    """The limits of an exchange, as constants and as default values, are 0.5 s instead of 30 s."""
    for method in (plexctl.ControlPlane.get, plexctl.ControlPlane.revoke, plexctl.ControlPlane._send):
        monkeypatch.setattr(method, "__defaults__", (0.5,))
    monkeypatch.setattr(plexctl, "EXCHANGE_SECONDS", 0.5)
    monkeypatch.setattr(plexctl, "CONNECT_SECONDS", 0.5)


@pytest.fixture
def short_pauses(monkeypatch):
    """GetSession and RevokeSession are asked again at once."""
    monkeypatch.setattr(plexctl, "POLL_MIN_SECONDS", 0.02)


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls"))


def tls_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def tls_plane(tls_files):
    with ControlPlane(tls=tls_context(tls_files.server)) as plane:
        yield plane


def create_client(plane, token=BEARER, **options):
    """plexctl's own client of a control plane, as those who vendor it use it."""
    return plexctl.ControlPlane(
        plexctl.parse_server(plane.url, False), plexctl.Secret(token), environ={}, **options)


def session_request(ttl_seconds=0):
    return plexctl.SessionRequest(PROJECT_ID, RESOURCE_ID, HOST, PORT, ttl_seconds)


def asked(plane, operation):
    with plane.changed:
        return sum(request.operation == operation for request in plane.requests)


def ask(client, operation, session_id=OTHER_ID):
    arguments = (session_request(),) if operation == "issue" else (PROJECT_ID, session_id)
    return getattr(client, operation)(*arguments)


def issue_fails(cli, plane, steps, status, *words, may_exist=False):
    """The one error line of a run whose attempts to issue a session get these steps, and no others.

    A session that was issued is revoked once, unless it is said that one may exist."""
    plane.script("issue", *steps)
    line = failed(forward_to(cli, plane), status, *words)
    assert (MAY_EXIST in line) == may_exist
    assert asked(plane, "issue") == len(steps)
    if plane.issued and not may_exist:
        revoked_once(plane)
    return line


def altered(change, **more):
    """A step that does what was asked for, and answers with a changed body (or status, headers, raw)."""
    def step(handler, plane):
        answer = plane.decide(handler.seen)
        change(answer.body)
        handler.wfile.write(handler.render(answer._replace(**more)))
    return step


def with_field(path, value):
    """A step that answers with another value at a path in the body."""
    def change(body):
        for name in path[:-1]:
            body = body[name]
        body[path[-1]] = value
    return altered(change)


def cut_off(handler, plane):
    """Do what was asked for, and answer it but for the last bytes."""
    handler.wfile.write(handler.render(plane.decide(handler.seen))[:-9])


def sending(raw):
    """A step that sends these bytes and hangs up."""
    return lambda handler, _plane: handler.wfile.write(raw)


def never_answer(handler, _plane):
    handler.connection.recv(1)


def assert_nothing_remains(plane):
    """Neither a thread of an exchange nor its connection is left after a moment."""
    def remaining():
        return list(plane.connections) + [
            thread for thread in threading.enumerate()
            if getattr(getattr(thread, "_target", None), "__module__", "") == "plexctl"]
    eventually(lambda: not remaining(), 4, remaining)


# What is asked for

@pytest.mark.parametrize("given, sent", [
    ([], {}), (["--ttl-seconds", "0"], {}), (["--ttl-seconds", "1"], {"requested_ttl_seconds": 1})],
    ids=shown)
def test_the_issue_request_is_exactly_the_published_one_and_verbose_tells_of_it(cli, lone_plane, given, sent):
    upper = [word.upper() if is_uuid(word) else word for word in REQUIRED_FLAGS]
    result = cli(["tcp-forward", "-v"] + upper + given, lone_plane.environment())
    assert result.status == 0 and "POST %s: 201" % SESSIONS_PATH in result.err
    assert "Bearer" not in result.err and "idempotency_key" not in result.err
    request, = lone_plane.requests
    assert (request.method, request.path) == ("POST", SESSIONS_PATH)
    assert is_uuid(request.body.pop("idempotency_key"))
    assert request.body == dict(sent, resource_id=RESOURCE_ID, kind="tcp",
                                target={"tcp": {"host": HOST, "port": PORT}})
    for name, value in (("Authorization", "Bearer " + BEARER), ("Content-Type", "application/json"),
                        ("User-Agent", "plexctl/" + plexctl.__version__),
                        ("Host", lone_plane.url.split("//")[1])):
        assert request.headers.get_all(name) == [value]
    assert request.headers["Cookie"] is None and request.headers["Expect"] is None


@pytest.mark.parametrize("prefix, slash, change, headers", [
    ("/access/plex", "", str, ()), ("/access/plex", "/", str, ()),
    ("", "", str, (("Location", "/v1/elsewhere"),)), ("", "", str.upper, ())],
    ids=["prefix", "prefix/", "Location", "upper case"])
def test_every_path_has_the_prefix_and_our_ids_as_they_were_written(cli, prefix, slash, change, headers):
    step = altered(lambda body: body.update(session_id=change(body["session_id"])), headers=headers)
    with ControlPlane(prefix=prefix, endpoint_on="never") as plane:
        plane.script("issue", step)
        args = ["tcp-forward", "--server", plane.url + slash, "--wait-seconds", "0.1"] + REQUIRED_FLAGS
        assert cli(args, plane.environment()).status == 1
        session = prefix + SESSIONS_PATH + "/" + change(plane.issued[0])
        paths = [each.path for each in plane.requests]
        assert paths == [prefix + SESSIONS_PATH, session, session + "/revoke"]


# The listener endpoint

@pytest.mark.parametrize("endpoint_on, late, reads", [
    ("issue", 0, 0), ("session", 0, 0), ("read", 0, 1), ("read", 3, 4)])
def test_the_endpoint_is_found_wherever_reported(cli, lone_plane, short_pauses, endpoint_on, late, reads):
    lone_plane.endpoint_on, lone_plane.reads_before_endpoint = endpoint_on, late
    lone_plane.endpoint = "100.64.0.12:40213"
    if endpoint_on == "issue":  # it comes before that of the session in it
        lone_plane.script("issue", with_field(("session", "listener_endpoint"), "100.64.0.99:1"))
    result = forward_to(cli, lone_plane, "--output", "json")
    assert result.status == 0
    assert json.loads(result.out)["listener_endpoint"] == "100.64.0.12:40213"
    assert asked(lone_plane, "get") == reads
    assert ("waiting for the Node" in result.err) == (reads > 0)
    assert lone_plane.revoked == []


@pytest.mark.parametrize("seconds, answers, words", [
    ("0", [], "no listener endpoint"), ("0.4", [], "no listener endpoint"),
    ("2", [PASS] + [hold(60)] * 2, "no listener endpoint"), ("2", [hold(60)] * 3, "GetSession: no complete")],
    ids=["at once", "in 0.4 s", "the last GetSession is cut short", "no GetSession was answered"])
def test_no_endpoint_in_time_fails_and_revokes(cli, lone_plane, short_pauses, seconds, answers, words):
    lone_plane.endpoint_on = "never"
    lone_plane.script("get", *answers)
    with lasts(float(seconds), float(seconds) + 4):
        result = forward_to(cli, lone_plane, "--wait-seconds", seconds)
    failed(result, 1, words, alone=seconds == "0")
    reads = asked(lone_plane, "get")
    assert reads == 0 if seconds == "0" else reads > 1 or answers
    revoked_once(lone_plane)


def test_passing_failures_of_reading_are_tried_again(cli, lone_plane, short_pauses):
    lone_plane.endpoint_on = "read"
    lone_plane.script("get", Answer(502), problem("signing_unavailable"), Answer(504), drop, reset,
                      sending(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"), PASS)
    result = forward_to(cli, lone_plane)
    assert result.status == 0 and asked(lone_plane, "get") == 7
    assert result.err.count("\n") == 1 and "waiting" in result.err


@by_id("row", {
    "revoked": (with_field(("status",), "revoked"), 1, "the session was revoked"),
    "expired": (with_field(("status",), "expired"), 1, "the session expired"),
    "401": (problem("unauthenticated"), 3, "GetSession: 401"),
    "step-up": (problem("step_up_required"), 3, "GetSession: 401", STEP_UP_ACR),
    "403": (problem("forbidden"), 4, "GetSession: 403"),
    "rebac": (problem("rebac_denied"), 77, "GetSession: 403", "project:p#operator"),
    "404": (problem("resource_not_found"), 1, "GetSession: 404"),
    "429": (problem("session_limit_exceeded"), 1, "GetSession: 429"),
    "500": (problem("internal"), 1, "GetSession: 500"),
    "redirect": (redirect("/v1/projects"), 1, "GetSession: 302"),
    "truncated": (Answer(200, raw=b"{"), 1, "GetSession", "JSON"),
    "a list": (Answer(200, []), 1, "GetSession", "id"),
    "other session": (with_field(("id",), OTHER_ID), 1, "GetSession", "id"),
    "odd status": (with_field(("status",), "sleeping"), 1, "GetSession", "status"),
    "odd endpoint": (with_field(("listener_endpoint",), "1.2.3.4:65536"), 1, "GetSession", "endpoint")})
def test_a_failure_of_reading_that_does_not_pass_ends_it_and_revokes(cli, lone_plane, row):
    answer, status, *words = row
    lone_plane.endpoint_on = "read"
    lone_plane.script("get", answer)
    failed(forward_to(cli, lone_plane), status, *words, alone=False)
    assert asked(lone_plane, "get") == 1
    revoked_once(lone_plane)


# Retries

@pytest.mark.parametrize("name", sorted(PASSING))
def test_a_passing_failure_is_tried_again_with_the_same_key_three_times_in_all(cli, lone_plane, name):
    may_exist = name in ("409", "502", "504")  # the answer may have been lost; 429 and 503 did nothing
    line = issue_fails(cli, lone_plane, [PASSING[name]] * 3, 1, name, "(after 3 attempts)",
                       may_exist=may_exist)
    assert ("too many requests" in line) == (name == "429") and "--max-sessions" not in line
    lone_plane.script("issue", *[PASSING[name]] * 2)
    assert succeeded(forward_to(cli, lone_plane)) and len(lone_plane.issued) == 1
    bodies = [json.dumps(request.body, sort_keys=True) for request in lone_plane.requests]
    assert len(bodies) == 6 and len(set(bodies[:3])) == len(set(bodies[3:])) == 1


@pytest.mark.parametrize("lose", [process_then_drop, cut_off], ids=["dropped", "cut off"])
def test_a_lost_answer_is_asked_for_again_after_growing_pauses(cli, lone_plane, lose):
    lone_plane.script("issue", lose, reset)
    assert succeeded(forward_to(cli, lone_plane)) and len(lone_plane.issued) == 1
    first, second, third = lone_plane.requests
    assert first.body["idempotency_key"] == second.body["idempotency_key"] == third.body["idempotency_key"]
    assert second.time - first.time > 0.35 and third.time - second.time > 0.75
    assert third.time - first.time < 4


def test_a_refused_connection_is_tried_again_and_leaves_no_doubt_about_a_session(cli):
    url = "http://127.0.0.1:%d" % quiet_port()
    result = cli(["tcp-forward", "-v", "--server", url] + REQUIRED_FLAGS, {"PLEXSPHERE_TOKEN": BEARER})
    assert result.err.count("trying again") == 2
    assert failed(result, 1, alone=False) == (
        "plexctl: error: IssueSession: cannot connect to %s: Connection refused (after 3 attempts)" % url)


@pytest.mark.parametrize("status", [
    103, 200, 202, 204, 206, 300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 408, 409, 410, 418,
    425, 429, 500, 501, 505, 507, 599])
def test_any_other_status_is_final(cli, lone_plane, status):
    answer = Answer(status, headers=AT_ONCE * (status != 429) + (("Location", "/elsewhere"),))
    issue_fails(cli, lone_plane, [answer], {401: 3, 403: 4}.get(status, 1), "IssueSession: %d" % status,
                may_exist=status < 300 or status >= 500 and status != 501)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_every_published_problem_is_told_in_one_line(cli, lone_plane, name):
    answer = problem(name, headers=AT_ONCE * (name != "session_limit_exceeded"))
    expected = {"rebac_denied": 77, "forbidden": 4, "unauthenticated": 3, "step_up_required": 3}.get(name, 1)
    words = [answer.body.get(field, "") for field in ("code", "correlation_id", "reason")]
    steps = [answer] * (3 if name in ("idempotent_replay", "signing_unavailable") else 1)
    line = issue_fails(cli, lone_plane, steps, expected, str(answer.status), answer.body["detail"], *words,
                       *answer.body.get("relation_path", []),
                       may_exist=name in ("idempotent_replay", "internal"))
    assert (STEP_UP_ACR in line) == ("re-authenticate" in line) == (name == "step_up_required")


def step_up(*challenges):
    headers = tuple(("WWW-Authenticate", each) for each in challenges)
    return Answer(401, problem("step_up_required").body, headers)


FROM = "; the token is from PLEXSPHERE_TOKEN"
AGAIN = "; re-authenticate with acr_values %s and try again"
NEVER = "; a redirect is never followed"
@by_id("answer, status, end", {
    "304": (Answer(304), 1, "IssueSession: 304 Not Modified" + NEVER),
    "bare": (Answer(499), 1, "error: IssueSession: 499"),
    "detail": (Answer(499, {"detail": "why"}), 1, "IssueSession: 499: why"),
    "all": (Answer(499, {"title": "What", "detail": "why", "code": "word"}), 1, "499 What: why (word)"),
    "acr": (step_up('Bearer acr_values="urn:a urn:b", max_age=5'), 3, AGAIN % "urn:a urn:b"),
    "plain acr": (step_up("Bearer error=x, acr_values=urn:a"), 3, AGAIN % "urn:a"),
    "second acr": (step_up("Basic", 'Bearer acr_values="urn:b"'), 3, AGAIN % "urn:b"),
    "no acr": (step_up(), 3, "; re-authenticate and try again"),
    "odd acr": (step_up("acr_values"), 3, "; re-authenticate and try again"),
    "429": (problem("session_limit_exceeded"), 1,
            "; sessions count until they expire or are revoked, also those of print mode; "
            "--max-sessions limits those of --proxy"),
    "html": (Answer(403, raw=b"<html>"), 4, ": 403 Forbidden" + FROM),
    "list": (Answer(403, ["rebac_denied"]), 4, ": 403 Forbidden" + FROM),
    "types": (Answer(403, {"code": 77, "title": {}, "relation_path": [5]}), 4, ": 403 Forbidden" + FROM),
    "only a code": (Answer(403, {"code": "rebac_denied"}), 77, ": 403 Forbidden (rebac_denied)" + FROM),
    "not utf-8": (Answer(401, raw=b"\xff\xfe"), 3, ": 401 Unauthorized" + FROM),
    "400": (Answer(400, {"code": "rebac_denied"}), 1, ": 400 Bad Request (rebac_denied)"),
    "too large": (Answer(403, raw=b" " * (2 << 20)), 4, ": 403 Forbidden" + FROM),
    "truncated": (sending(b"HTTP/1.1 403 No\r\nContent-Length: 500\r\n\r\n{"), 4, ": 403 Forbidden" + FROM),
    "chunked": (sending(b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"), 3,
                ": 401 Unauthorized" + FROM),
    **{"to " + to: (redirect(to), 1, "IssueSession: 302 Found" + NEVER + told) for to, told in (
        ("/v1/projects", ": /v1/projects"), ("file:///etc/passwd", ": file:///etc/passwd"),
        ("data:,x", ": data:,x"), ("//127.0.0.1:9", ": //127.0.0.1:9"),
        ("https://a.example/\x1b[2J", ": https://a.example/\\x1b[2J"), ("\x7f", ": \\x7f"), ("", ""))}})
def test_an_error_is_told_in_full_with_what_to_do_whatever_its_body(cli, lone_plane, answer, status, end):
    assert issue_fails(cli, lone_plane, [answer], status).endswith(end)


@pytest.mark.parametrize("text, seconds", [
    ("0", 0), ("2", 2), ("5", 5), ("6", 5), ("120", 5), ("99999999999999999999", 5),
    ("Wed, 21 Oct 2099 07:28:00 GMT", 5), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)] + [
    (text, None) for text in (None, "", "soon", "-1", "1.5", "1e3", ARABIC_FIVE, "Wed, 99 Oct", "5 5")])
def test_retry_after_counts_up_to_5_s_unless_it_is_malformed(text, seconds):
    assert plexctl.parse_retry_after(text) == seconds


def test_retry_after_is_honoured(lone_plane):
    lone_plane.script("issue", problem("signing_unavailable", headers=(("Retry-After", "1"),)))
    with lasts(0.95, 3):
        create_client(lone_plane).issue(session_request())


@pytest.mark.parametrize("steps, status, may_exist", [
    ([PASSING["502"], problem("rebac_denied")], 77, True),
    ([process_then_drop, problem("forbidden")], 4, True),
    ([sending(b"HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\n{"), problem("forbidden")], 4, True),
    ([cut_off, problem("forbidden")], 4, False), ([PASSING["502"], with_field(("token",), 5)], 1, False),
    ([altered(lambda body: body.pop("session") and body.update(session_id=5))], 1, True)],
    ids=["502, refused", "drop, refused", "truncated, refused", "cut off, refused", "502, bad token",
         "no session id"])
def test_a_session_may_exist_is_said_exactly_where_none_is_revoked(cli, lone_plane, steps, status, may_exist):
    issue_fails(cli, lone_plane, steps, status, may_exist=may_exist)


@pytest.mark.parametrize("words", ["POST", "trying again"], ids=["after an attempt", "before a pause"])
def test_cancelling_ends_the_attempts(lone_plane, words):
    lone_plane.script("issue", problem("signing_unavailable", headers=(("Retry-After", "5"),)))
    client = create_client(lone_plane, say=lambda line: words in line and client.cancel.set())
    with lasts(0, 3), pytest.raises(plexctl.ApiError) as raised:
        client.issue(session_request())
    assert raised.value.status == 503 and client.cancel.is_set() and len(lone_plane.requests) == 1


def test_a_silent_server_is_mentioned_while_it_is_awaited(cli, lone_plane, monkeypatch):
    told, is_told = [], threading.Event()
    monkeypatch.setattr(plexctl, "SILENT_SECONDS", 0.2)
    client = create_client(lone_plane, notice=lambda line: told.append(line) or is_told.set())
    lone_plane.script("issue", hold(is_told))
    client.issue(session_request())
    assert told == ["still waiting for %s to answer IssueSession" % lone_plane.url]
    for _ in range(2):  # a proxy asks once a minute
        lone_plane.script("get", never_answer)
        with pytest.raises(plexctl.TransportError):
            client.get(PROJECT_ID, OTHER_ID, 0.5)
    assert len(told) == 2
    lone_plane.script("issue", hold(0.5))
    result = forward_to(cli, lone_plane)
    assert result.status == 0 and "plexctl: still waiting for http://" in result.err


@pytest.mark.parametrize("operation", ["issue", "get", "revoke"])
@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
def test_no_redirect_is_followed(lone_plane, operation, status):
    with ControlPlane() as other:
        lone_plane.script(operation, redirect(other.url + SESSIONS_PATH, status))
        with pytest.raises(plexctl.ApiError, match="redirect is never followed") as raised:
            ask(create_client(lone_plane), operation)
        assert other.requests == []
    assert (raised.value.exit_code, raised.value.status, len(lone_plane.requests)) == (1, status, 1)


# Deadlines

def drip_body(handler, plane):
    """The head at once, the body at one byte per 0.1 s."""
    drip(handler, plane, handler.render(plane.decide(handler.seen)).index(b"\r\n\r\n") + 4)


@pytest.mark.parametrize("operation, step", [
    ("get", drip), ("get", drip_body), ("get", continue_for_ever), ("get", never_answer), ("issue", drip),
    ("issue", continue_for_ever), ("revoke", drip), ("revoke", continue_for_ever)])
def test_an_exchange_ends_in_time_and_nothing_remains_of_it(lone_plane, short_limits, operation, step):
    client, session_id = create_client(lone_plane), issued_by(lone_plane)
    lone_plane.script(operation, step)
    if operation == "issue":
        client.cancel.set()  # one attempt
    # a newer http.client gives up on "100 Continue for ever" by itself
    with lasts(0.4 * (step is not continue_for_ever), 4), \
            pytest.raises(plexctl.TransportError, match="no complete answer from http://127") as raised:
        ask(client, operation, session_id)
    assert raised.value.passing and raised.value.exit_code == 1
    assert (MAY_EXIST in str(raised.value)) == (operation == "issue")
    assert_nothing_remains(lone_plane)


def test_an_error_whose_body_does_not_end_in_time_counts_by_its_status(lone_plane):
    lone_plane.script("get", drip_body)
    with lasts(0.4, 10), pytest.raises(plexctl.ApiError) as raised:
        create_client(lone_plane).get(PROJECT_ID, OTHER_ID, 0.5)
    assert raised.value.status == 404


@pytest.mark.parametrize("what, drips, connect_seconds, seconds", [
    ("silent handshake", b"", 0.5, 5), ("dripping handshake", b"\x16\x03\x03\x40", 10, 0.5),
    ("late handshake", b"", 10, 0.5), ("look-up of the name", b"", 10, 0.5)])
def test_what_hangs_before_a_request_is_given_up_on_and_nothing_is_sent_later(
        tls_files, monkeypatch, what, drips, connect_seconds, seconds):
    def getaddrinfo(*arguments, **options):
        is_told.wait(10 * what.startswith("look-up"))
        return real(*arguments, **options)

    def handshake(sock, **options):
        sock.sendall(drips)
        while not is_told.wait(0.1):
            sock.sendall(drips and b"\x00")
        return tls_context(tls_files.server).wrap_socket(sock, **options)

    is_told, real = threading.Event(), socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(plexctl, "CONNECT_SECONDS", connect_seconds)
    wanted = "GetSession: cannot connect to https://127[0-9.:]*: timed out"
    wanted += " after" * (connect_seconds > seconds)
    with ControlPlane(tls=types.SimpleNamespace(wrap_socket=handshake)) as plane:
        client = create_client(plane, ca_file=tls_files.ca)
        with lasts(0.4, 4), pytest.raises(plexctl.TransportError, match=wanted):
            client.get(PROJECT_ID, OTHER_ID, seconds)
        is_told.set()
        assert_nothing_remains(plane)
        assert plane.requests == []


@pytest.mark.parametrize("operation, issued, revoked", [("get", 1, 0), ("issue", 2, 0), ("revoke", 1, 1)])
def test_a_question_alone_is_given_up_on_when_the_run_ends(lone_plane, operation, issued, revoked):
    def step(handler, plane):
        client.cancel.set()
        plane.closing.wait(2 if operation == "get" else 0.5)
        handler.answer_really()
    client, session_id = create_client(lone_plane), issued_by(lone_plane)
    lone_plane.script(operation, step)
    if operation == "get":
        with lasts(0, 1), pytest.raises(plexctl.Cancelled) as raised:  # 0.1 s, where nothing else is done
            ask(client, operation, session_id)
        assert not raised.value.passing and not raised.value.may_exist
    else:
        ask(client, operation, session_id)
    assert (len(lone_plane.issued), len(lone_plane.revoked)) == (issued, revoked)
    assert_nothing_remains(lone_plane)


@contextlib.contextmanager
def no_more_threads(fails=lambda: True):
    """plexctl can start no thread meanwhile, or not where it `fails`; the simulator can."""
    def start(thread):
        if any(frame.f_globals.get("__name__") == "plexctl" for frame, _ in traceback.walk_stack(None)) \
                and fails():
            raise RuntimeError("can't start new thread")
        really_start(thread)

    really_start = threading.Thread.start
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(threading.Thread, "start", start)
        yield


# Bodies

NOT_HTTP = {
    "over 1 MiB": b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (1 << 20) + b"{}",
    "length of 10**18": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{}" % 10 ** 18,
    "truncated": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
    "chunked and truncated": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "odd chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "large chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n" + b" " * (1 << 21),
    "nothing": b"", "half a status line": b"HTTP/1.1 2", "no http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "http 3": b"HTTP/3.0 200 OK\r\n\r\n{}", "odd status": b"HTTP/1.1 2000 OK\r\n\r\n{}",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17),
    "endless status": b"HTTP/1.1 200 " + b"x" * (1 << 17),
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n{}"}


@pytest.mark.parametrize("name", sorted(NOT_HTTP))
def test_an_answer_that_is_not_complete_http_is_a_transport_failure(lone_plane, name):
    lone_plane.script("get", sending(NOT_HTTP[name]))
    wanted = "^GetSession: no complete answer from http:[ -~]+: [ -~]+$"
    with lasts(0, 4), pytest.raises(plexctl.TransportError, match=wanted) as raised:
        create_client(lone_plane).get(PROJECT_ID, OTHER_ID, 5)
    assert raised.value.exit_code == 1 and raised.value.passing
    assert_nothing_remains(lone_plane)


def test_a_chunk_of_size_minus_1_is_no_way_around_the_limit(lone_plane):
    """http.client up to 3.13 reads on for ever: 2.2 GiB in 4 s."""
    def step(handler, plane):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        while not plane.closing.is_set():
            taken.append(handler.wfile.write(b" " * (1 << 20)))

    taken = []
    lone_plane.script("get", step)
    with lasts(0, 8), pytest.raises(plexctl.TransportError, match="no complete answer"):
        create_client(lone_plane).get(PROJECT_ID, OTHER_ID, 10)
    assert sum(taken) < 32 << 20


@pytest.mark.parametrize("raw, words", [
    (raw, ["the answer is not the API's JSON (", "Type", "check --server"])
    for raw in (b"", b"<html>", b'{"a":"\xe9"}', b"[" * 200000, b'{"a"')] + [
    (raw, ["session_id"]) for raw in (b"[]", b'"x"', b"5", b"null", b"true", b"{}", b'{"session": {}}')],
    ids=shown)
def test_an_answer_that_is_no_issued_session_is_a_failure_that_is_not_repeated(cli, lone_plane, raw, words):
    issue_fails(cli, lone_plane, [Answer(201, raw=raw)], 1, "IssueSession", *words, may_exist=True)


@pytest.mark.parametrize("status, change, more", [
    (200, bytes, ()), (202, bytes, ()),
    (201, lambda raw: b"\xef\xbb\xbf" + raw, ()), (201, lambda raw: raw.decode().encode("utf-16"), ()),
    (201, gzip.compress, (("Content-Encoding", "gzip"),)), (201, lambda raw: gzip.compress(raw)[:-9], ()),
    (201, lambda raw: raw[:-1], ()), (201, lambda raw: raw.replace(b'"session_id"', b'"id"'), ()),
    (200, lambda raw: json.dumps(json.loads(raw.decode())["session"]).encode(), ())],
    ids=["200", "202", "BOM", "UTF-16", "gzip", "torn gzip", "torn", "no session_id", "200 with a Session"])
def test_a_session_that_a_success_names_is_revoked_however_it_is_told(cli, lone_plane, status, change, more):
    def step(handler, plane):
        raw = change(json.dumps(plane.decide(handler.seen).body).encode())
        handler.wfile.write(handler.render(Answer(status, raw=raw, headers=more)))
    issue_fails(cli, lone_plane, [step], 1, "IssueSession", *[value for _, value in more])


def test_sessions_may_share_a_token(lone_plane):
    client = create_client(lone_plane)
    lone_plane.script("issue", *[with_field(("token",), "0123456789abcdef-token")] * 2)
    tokens = [client.issue(session_request()).token.reveal() for _ in range(2)]
    assert tokens == ["0123456789abcdef-token"] * 2


BAD_FIELDS = [(path, value) for path, values in (  # what the parsers themselves refuse is in "values"
    (("session_id",), [None, 5, True, [], {}, "", "x", OTHER_ID + "\n", OTHER_ID + "/../.."]),
    (("token",), [None, 5, [], "", "a b", "a\nb", "a\r", "\x7f", "\xe9", "x" * 70000]),
    (("expires_at",), [None, 5, [], "", "2099-02-30T10:30:00Z", "4081314600"]),
    (("session",), [None, 5, "x", []]),
    (("session", "id"), [None, 5, "x", OTHER_ID]),
    (("session", "kind"), [None, 5, [], "", "ssh", "TCP"]),
    (("session", "status"), [None, True, {}, "", "pending", "Active"]),
    (("session", "issued_at"), [5, [], "", "2099-02-30T10:30:00Z", "4081314600"]),
    (("listener_endpoint",), [5, True, [], {}, "", "100.64.0.12:0", "127.1:80", "a\x1b[2J:80"]),
    (("session", "listener_endpoint"), [5, True, [], {}, "", "100.64.0.12", "127.1:80"])) for value in values]


@pytest.mark.parametrize("path, value, words", [
    (path, value, ["IssueSession", path[-1]]) for path, value in BAD_FIELDS] + [
    (("listener_endpoint",), endpoint, ["listener_endpoint"]) for endpoint in (
        "169.254.169.254:80", "[fe80::1]:80", "[::ffff:169.254.169.254]:80")] + [
    (path, value, ["the session was over when it arrived"]) for path, value in (
        (("session", "status"), "revoked"), (("session", "status"), "expired"),
        (("expires_at",), "2001-01-01T00:00:00Z"))], ids=shown)
def test_a_session_with_a_bad_field_or_that_is_over_is_revoked_once(cli, lone_plane, path, value, words):
    issue_fails(cli, lone_plane, [with_field(path, value)], 1, *words)


def test_fields_that_nobody_knows_and_odd_but_valid_values_are_taken(cli, lone_plane):
    def change(body):
        body.update(new_field=[1], session_id=body["session_id"].upper(), listener_endpoint=None,
                    expires_at="2099-05-02t10:30:60.123456789-23:59")
        body["session"].update(listener_endpoint="[2001:DB8::1]:65535", new_field=None)
    lone_plane.script("issue", altered(change))
    result = forward_to(cli, lone_plane, "--output", "json")
    assert result.status == 0, result.err
    document = json.loads(result.out)
    assert document["session_id"] == lone_plane.issued[0].upper()
    assert document["listener_endpoint"].lower() == "[2001:db8::1]:65535"


@pytest.mark.parametrize("where", ["body", "session"])
@pytest.mark.parametrize("endpoint", [
    "PSK-0123456789abcdef.example:80", "x.PSK-0123456789abcdef:80", "PSK-0123456789abcdef:80",
    "node.0123456789abcdef-token:80"])
def test_an_endpoint_that_repeats_a_token_is_refused(cli, endpoint, where):
    def change(body):
        body["token"] = "0123456789abcdef-token"
        body.get(where, body)["listener_endpoint"] = endpoint

    with ControlPlane(bearer="psk-0123456789abcdef") as plane:
        line = issue_fails(cli, plane, [altered(change)], 1, "listener_endpoint", "contains a token")
        assert "0123456789" not in line


def test_a_token_of_a_few_characters_is_not_looked_for_in_everything(cli):
    with ControlPlane(bearer="127") as plane:
        assert forward_to(cli, plane).status == 0


# What the server says must not drive the terminal

@pytest.mark.parametrize("nasty", [NASTY, "x" * 10240, "\u202e" * 10240], ids=["control", "long", "bidi"])
@pytest.mark.parametrize("field", ["title", "detail", "code", "reason", "relation_path", "correlation_id"])
def test_what_the_server_says_is_one_printable_line(cli, lone_plane, field, nasty):
    value = [nasty, nasty] if field == "relation_path" else nasty
    line = issue_fails(cli, lone_plane, [problem("forbidden", **{field: value})], 4, "403",
                       nasty[:1] if nasty.isprintable() else "\\")
    assert len(line) <= 4000


def test_nor_do_a_challenge_a_revoke_reason_or_a_failing_revoke_drive_it(cli, lone_plane):
    nasty = NASTY.replace("\r\n", "").replace("\n", "").replace("\u202e", "\xae").replace("\u2028", "\x85")
    issue_fails(cli, lone_plane, [step_up('Bearer acr_values="%s"' % nasty)], 3, "acr_values")
    lone_plane.endpoint_on = "read"
    lone_plane.script("get", altered(lambda body: body.update(status="revoked", revoke_reason=NASTY)))
    lone_plane.script("revoke", problem("forbidden", detail=NASTY))
    result = forward_to(cli, lone_plane)
    assert result.status == 1 and re.match(r"(plexctl: [ -~]+\n){3}\Z", result.err)


def with_a_session_token(handler, plane):
    """A step that refuses, and repeats the token of the session."""
    handler.wfile.write(handler.render(problem("forbidden", detail="token " + plane.sessions[0].token)))


@pytest.mark.parametrize("operation, answer", [
    ("issue", problem("internal", detail="cannot use Authorization: Bearer " + BEARER)),
    ("issue", problem("internal", title=BEARER, code="x" * 290 + BEARER)),
    ("issue", redirect("https://elsewhere.example.com/?token=" + BEARER)),
    ("issue", step_up('Bearer acr_values="%s"' % BEARER)), ("revoke", with_a_session_token)],
    ids=["detail", "cut short", "Location", "acr_values", "a session token"])
def test_a_server_that_repeats_a_token_does_not_have_it_shown(cli, lone_plane, operation, answer):
    lone_plane.endpoint_on = "never"
    lone_plane.script(operation, answer)
    result = forward_to(cli, lone_plane, "-v", "--wait-seconds", "0")
    assert result.status in (1, 3) and "(secret)" in result.err and BEARER[:8] not in result.err


# TLS

@pytest.fixture
def localhost(monkeypatch):
    """The name leads to loopback, also where the host does not know it."""
    def getaddrinfo(host, *more, **named):
        return real("127.0.0.1" if host in ("localhost", b"localhost") else host, *more, **named)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("how", ["--ca-file", "SSL_CERT_FILE"])
def test_a_certificate_of_the_given_ca_is_trusted(cli, tls_plane, tls_files, localhost, monkeypatch, how):
    args = ["--ca-file", tls_files.ca] * (how == "--ca-file")
    if not args:
        monkeypatch.setenv("SSL_CERT_FILE", tls_files.ca)
    assert succeeded(forward_to(cli, tls_plane, *args)) and len(tls_plane.requests) == 1
    by_name = tls_plane.url.replace("127.0.0.1", "localhost")
    assert forward_to(cli, tls_plane, "--server", by_name, *args).status == 0


def test_a_request_that_is_given_up_does_not_go_on_in_the_clear(tls_plane, tls_files):
    """SSLSocket.shutdown() turns TLS off first, and what another thread sends just then is plain text."""
    context = plexctl.create_tls_context(tls_files.ca)
    exchange = plexctl.Exchange("GetSession", "127.0.0.1", context)
    connection = plexctl.PlaneConnection(tls_plane.url.split("/")[2], exchange, timeout=10)
    connection.connect()
    exchange.give_up("given up")
    assert connection.sock.version() is not None
    with pytest.raises(OSError):
        connection.sock.sendall(b"Authorization")
    connection.close()


@pytest.mark.parametrize("case", ["unknown ca", "other ca file", "ca file replaces", "wrong host", "no TLS"])
def test_an_untrusted_server_gets_nothing_and_one_try(cli, tls_files, tmp_path, monkeypatch, case):
    begun, ca_file = [], make_certificates(tmp_path).ca if "ca file" in case else tls_files.ca
    if case == "ca file replaces":
        monkeypatch.setenv("SSL_CERT_FILE", tls_files.ca)
    context = tls_context(tls_files.wrong_host if case == "wrong host" else tls_files.server)

    def handshake(sock, **options):
        begun.append(sock)
        return sock if case == "no TLS" else context.wrap_socket(sock, **options)
    with ControlPlane(tls=types.SimpleNamespace(wrap_socket=handshake)) as plane:
        line = failed(forward_to(cli, plane, *["--ca-file", ca_file] * (case != "unknown ca")), 1,
                      "TLS" if case == "no TLS" else "certificate")
        assert MAY_EXIST not in line and plane.requests == []
        if sys.version_info >= (3, 7):  # 3.6 does not say what it dislikes
            assert ("--ca-file" in line) == (case not in ("wrong host", "no TLS"))
        assert len(begun) == 1, "it was tried %d times" % len(begun)


@pytest.mark.parametrize("make", [
    lambda path: None, os.mkdir, *[functools.partial(write_private, content=content) for content in (
        "", "-----BEGIN CERTIFICATE-----\nx\n", "-----BEGIN EC KEY-----\neA==\n-----END EC KEY-----\n")]],
    ids=["missing", "directory", "empty", "garbage", "a key alone"])
def test_a_ca_file_that_cannot_be_used_is_a_usage_error(cli, tls_plane, tmp_path, make):
    path = str(tmp_path / "ca.pem")
    make(path)
    for each in (path, path + "\0"):
        failed(forward_to(cli, tls_plane, "--ca-file", each), 2, "--ca-file")
    assert tls_plane.requests == []


@pytest.mark.parametrize("mode, owner, status", [
    (0o644, 0, 0), (0o400, 0, 0), (0o664, 0, 3), (0o646, 0, 3), (0o622, 0, 3),
    pytest.param(0o600, 65534, 3, marks=GIVES_AWAY)])
def test_a_ca_file_that_others_may_write_exits_3(cli, tls_plane, tls_files, tmp_path, mode, owner, status):
    with open(tls_files.ca) as stream:
        pem = stream.read() + "# F\u0151tan\xfas\xedtv\xe1ny\n"  # as in the bundle of Mozilla
    path = write_private(tmp_path / "ca.pem", pem, mode)
    if owner:
        os.chown(path, owner, -1)
    result = forward_to(cli, tls_plane, "--ca-file", path)
    assert (result.status, len(tls_plane.requests)) == (status, int(not status))
    if status:
        one_error_line(result, "--ca-file " + path, "uid 65534" if owner else "permissions %04o" % mode)


def test_tls_1_2_is_the_least():
    """Where a server offers less, newer versions of OpenSSL refuse by themselves."""
    context = plexctl.create_tls_context()
    if hasattr(ssl, "TLSVersion"):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    else:
        assert context.options & ssl.OP_NO_TLSv1_1 and context.options & ssl.OP_NO_TLSv1


# HTTPS_PROXY

@pytest.fixture
def tunnels():
    """An HTTP proxy: `url`; `heads` of its requests; `to`, where CONNECT leads."""
    def serve(connection, listener):
        head = b""
        while not head.endswith(b"\r\n\r\n") and not head.endswith(b"end"):
            head += connection.recv(1) or b"end"
        proxy.heads.append(head.decode("latin-1"))
        connection.sendall(proxy.answer)
        if head.startswith(b"CONNECT ") and b" 200 " in proxy.answer:
            with dial(proxy.to or head.split()[1].decode()) as upstream:
                carry(connection, upstream, 0, True, listener.closing.is_set)
    listener = Listener(serve)
    proxy = types.SimpleNamespace(heads=[], to=None, answer=b"HTTP/1.1 200 OK\r\n\r\n",
                                  url="http://127.0.0.1:%d" % listener.address[1])
    yield proxy
    listener.close()


@pytest.mark.parametrize("name, before", [
    ("HTTPS_PROXY", "http://"), ("https_proxy", "http://"), ("HTTPS_PROXY", ""),
    ("HTTPS_PROXY", "me:hunter%402@"), ("HTTPS_PROXY", "http://me:hunter%402@")])
def test_an_https_proxy_gets_its_own_credentials_alone(cli, tls_plane, tls_files, tunnels, name, before):
    environ = {name: before + tunnels.url.split("//")[1], "NO_PROXY": "example.com, .internal"}
    result = forward_to(cli, tls_plane, "-v", "--ca-file", tls_files.ca, **environ)
    assert result.status == 0 and "hunter" not in result.err
    head, = tunnels.heads
    assert head.startswith("CONNECT %s HTTP/1." % tls_plane.url.split("//")[1])
    basic = "Basic " + base64.b64encode(b"me:hunter@2").decode()
    assert re.findall(r"(?im)^.*authorization.*: (.*)\r$", head) == [basic] * ("@" in before)
    assert BEARER not in head
    request, = tls_plane.requests
    assert request.headers["Proxy-Authorization"] is None
    assert request.headers.get_all("Authorization") == ["Bearer " + BEARER]


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*", "a.example,127.0.0.1", "a.example, 127.0.0.1:{port}"])
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy_exempts_a_server(cli, tls_plane, tls_files, tunnels, name, exempt):
    environ = {"HTTPS_PROXY": tunnels.url, name: exempt.format(port=tls_plane.url.rsplit(":", 1)[1])}
    result = forward_to(cli, tls_plane, "--ca-file", tls_files.ca, **environ)
    assert (result.status, len(tls_plane.requests), tunnels.heads) == (0, 1, [])


def test_a_plain_http_server_never_goes_through_a_proxy(cli, lone_plane, tunnels, monkeypatch):
    environ = {name: tunnels.url for name in (
        "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = forward_to(cli, lone_plane, **environ)
    assert (result.status, len(lone_plane.requests), tunnels.heads) == (0, 1, [])


@pytest.mark.parametrize("kind", [
    "https://me:hunter2@{}", "socks5://me:hunter2@{}", "socks5h://me:hunter2@{}", "ftp://me:hunter2@{}",
    "http:me:hunter2@{}", "http://", "http://me:hunter2 @{}", "http://me:hunter2\n@{}",
    "http://CORP\\me:p@ss#hunter2:rd/%@{}",
    "http://me:hunter2@127.0.0.1:99999", "http://me:hunter2@127.0.0.1:abc", "http://me:hunter2@"])
def test_a_proxy_of_another_kind_is_a_usage_error_that_shows_no_password(cli, tls_plane, tunnels, kind):
    url = kind.format(tunnels.url.split("//")[1])
    line = failed(forward_to(cli, tls_plane, HTTPS_PROXY=url), 2, "HTTPS_PROXY",
                  "percent-encode" if kind[:7] == "http://" else "not supported")
    assert "hunter2" not in line and tls_plane.requests == tunnels.heads == []


@pytest.mark.parametrize("down, word", [(False, "the proxy refused: 407"), (True, "refused")])
def test_a_proxy_that_does_not_serve_is_named_and_a_bad_log_in_tried_once(
        cli, tls_plane, tls_files, tunnels, down, word):
    """Three bad ones lock an account."""
    tunnels.answer = b"HTTP/1.1 407 \x1b[2JProxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    proxy = "me:hunter2@" + ("127.0.0.1:%d" % quiet_port() if down else tunnels.url.split("//")[1])
    result = forward_to(cli, tls_plane, "--ca-file", tls_files.ca, HTTPS_PROXY=proxy)
    line = failed(result, 1, "cannot connect to %s through HTTPS_PROXY: " % tls_plane.url, word)
    assert "hunter2" not in line and len(tunnels.heads) == (not down) and tls_plane.requests == []


@pytest.mark.parametrize("endpoint", ["127.0.0.1:22", "localhost:22", "0.0.0.0:22", "[ff02::1]:22"])
def test_a_server_elsewhere_may_not_name_an_endpoint_on_this_machine(
        cli, tls_files, tunnels, localhost, endpoint):
    with ControlPlane(tls=tls_context(tls_files.wrong_host), endpoint=endpoint) as plane:
        tunnels.to = plane.url.split("//")[1]
        result = forward_to(cli, plane, "--server", "https://wrong.example", "--ca-file", tls_files.ca,
                            HTTPS_PROXY=tunnels.url)
        failed(result, 1, "listener", "refused")
        revoked_once(plane)
    assert {head.split()[1] for head in tunnels.heads} == {"wrong.example:443"}


def test_an_endpoint_whose_name_cannot_be_looked_up_for_now_is_looked_up_again(cli, monkeypatch):
    def getaddrinfo(host, *more, **named):
        if host != "node.test" or failures.append(host) or len(failures) > 1:
            return real("127.0.0.1", *more, **named)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    failures, real = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with ControlPlane(endpoint="node.test:22", endpoint_on="read") as plane:
        assert "node.test:22" in forward_to(cli, plane).out and len(failures) == 2


# Revoking

@pytest.mark.parametrize("status", [204, 404, 409, 410, 302, 400, 401, 403])
def test_a_revoke_that_fails_is_only_a_warning_and_none_where_the_session_is_gone(cli, lone_plane, status):
    lone_plane.endpoint_on = "read"
    lone_plane.script("get", problem("rebac_denied"))
    lone_plane.script("revoke", Answer(status))
    result = forward_to(cli, lone_plane)
    failed(result, 77, "GetSession: 403", alone=False)
    warnings = [line for line in result.err.splitlines() if line.startswith("plexctl: warning: ")]
    assert len(warnings) == (status not in (204, 404, 409, 410))
    assert all(lone_plane.issued[0] in line and "RevokeSession: %d" % status in line for line in warnings)
    assert asked(lone_plane, "revoke") == 1


def test_a_revoke_that_fails_passingly_is_tried_again(cli, lone_plane, short_pauses):
    lone_plane.endpoint_on = "read"
    lone_plane.script("revoke", drop, Answer(502), problem("internal"), Answer(429), process_then_drop)
    failed(forward_to(cli, lone_plane, "--wait-seconds", "0"), 1, "listener endpoint")
    assert asked(lone_plane, "revoke") == 6 and lone_plane.revoked == lone_plane.issued


# As a library

def assert_shows_no_secret(thing, *more):
    """Neither the bearer token nor a session token is in any text of it, nor of the errors behind it."""
    texts = [str(thing), repr(thing), repr(getattr(thing, "__dict__", None))]
    if isinstance(thing, BaseException):
        texts += [repr(thing.args)] + traceback.format_exception(type(thing), thing, thing.__traceback__)
        for each in filter(None, (thing.__cause__, thing.__context__)):
            assert_shows_no_secret(each, *more)
    for secret in (BEARER, SESSION_TOKEN_MARK) + more:
        assert secret not in "".join(texts), "a secret shows: %.200s" % texts


@pytest.mark.parametrize("threads", [contextlib.ExitStack, no_more_threads], ids=["", "nor further threads"])
def test_the_client_is_usable_without_the_command_line(lone_plane, threads):
    told, lines = [], []
    client = create_client(lone_plane, say=lines.append)
    with threads():
        issued = client.issue(session_request(900), told.append)
        read = client.get(PROJECT_ID, issued.session_id)
        client.revoke(PROJECT_ID, issued.session_id)
        read_again = client.get(PROJECT_ID, issued.session_id)
    session, = lone_plane.sessions
    assert told == [session.id] == [issued.session_id] == lone_plane.revoked
    assert (issued.token.reveal(), issued.expires_at) == (session.token, session.expires_at)
    assert str(issued.listener_endpoint) == str(read.listener_endpoint) == "127.0.0.1:9"
    assert abs(issued.lifetime_seconds - 900) < 1.5
    assert 0 <= plexctl.elapsed_seconds() - issued.issued_on < 10
    assert (read.session_id, read.status, read_again.status) == (session.id, "active", "revoked")
    assert [line.split(":")[0].split()[0] for line in lines] == ["POST", "GET", "POST", "GET"]
    assert [(each.method, each.path, each.body) for each in lone_plane.requests[1:3]] == [
        ("GET", SESSIONS_PATH + "/" + session.id, b""),
        ("POST", SESSIONS_PATH + "/" + session.id + "/revoke", {"revoke_reason": "operator_request"})]
    for thing in (client, issued, read, issued.session, lines):
        assert_shows_no_secret(thing)


@by_id("answer", {
    "401": problem("unauthenticated"), "drip": drip, "time": with_field(("expires_at",), "soon"),
    "session": with_field(("session",), [BEARER]),
    "token": with_field(("token",), SESSION_TOKEN_MARK + " " + BEARER),
    "truncated JSON": Answer(201, raw=('{"token": "%s' % SESSION_TOKEN_MARK).encode()),
    "not UTF-8": Answer(201, raw=('{"token": "%s"}\xff' % SESSION_TOKEN_MARK).encode("latin-1")),
    "no HTTP": sending(SESSION_TOKEN_MARK.encode() * 10000),
    "cut off": sending(b"HTTP/1.1 201 Created\r\nContent-Length: 99\r\n\r\n" + SESSION_TOKEN_MARK.encode())})
def test_no_exception_shows_a_secret(lone_plane, short_limits, answer):
    client = create_client(lone_plane)
    client.cancel.set()  # one attempt
    lone_plane.script("issue", answer)
    with pytest.raises(plexctl.PlexctlError) as raised:
        client.issue(session_request())
    assert_shows_no_secret(raised.value)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError])
def test_an_exchange_that_fails_in_an_unforeseen_way_shows_only_the_class(lone_plane, monkeypatch, error):
    def fail(*_arguments):
        raise error("Bearer " + BEARER)
    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", fail)
    client = create_client(lone_plane)
    with pytest.raises(plexctl.TransportError, match=error.__name__) as raised:
        client.get(PROJECT_ID, OTHER_ID, 5)
    assert_shows_no_secret(raised.value)


@pytest.mark.parametrize("token", ["", "psk_a\r\nX-Evil: 1", "psk_\xe9", "psk_" + "x" * 200000], ids=shown)
def test_the_client_sends_no_token_of_odd_characters_either(lone_plane, token):
    with pytest.raises(plexctl.PlexctlError) as raised:
        create_client(lone_plane, token).get(PROJECT_ID, OTHER_ID, 5)
    assert lone_plane.requests == []
    assert_shows_no_secret(raised.value, "psk_")


def test_one_client_serves_several_threads_at_once(lone_plane):
    client, meet = create_client(lone_plane), threading.Barrier(8)

    def work(_number):
        meet.wait(10)
        for _ in range(5):
            issued = client.issue(session_request())
            assert client.get(PROJECT_ID, issued.session_id).session_id == issued.session_id
            assert issued.session_id in issued.token.reveal()
            client.revoke(PROJECT_ID, issued.session_id)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(set(lone_plane.issued)) == 40 and sorted(lone_plane.issued) == sorted(lone_plane.revoked)
    assert_nothing_remains(lone_plane)


@pytest.mark.parametrize("source", ["PLEXSPHERE_TOKEN", "--token-file", "token of a profile"])
@pytest.mark.parametrize("name, status", [("unauthenticated", 3), ("forbidden", 4)])
def test_a_refusal_says_where_the_token_came_from(cli, lone_plane, tmp_path, source, name, status):
    lone_plane.script("issue", problem(name))
    environ, args = lone_plane.environment(), []
    if source == "--token-file":
        args = ["--token-file", write_private(tmp_path / "token", BEARER)]
    elif source == "token of a profile":
        environ = write_config(tmp_path, config_of(lone_plane))
    result = cli(TCP_FORWARD + args, environ)
    failed(result, status, "401" if status == 3 else "403", "the token is from", source)


# ---- tests: relay --------------------------------------------------------------------------------

MIB = 1 << 20


def standstill(read, seconds=20, still=0.6):
    """Wait until a counter has not moved for `still` seconds; its value."""
    seen, since, deadline = read(), time.monotonic(), time.monotonic() + seconds
    while time.monotonic() - since < still:
        if read() != seen:
            seen, since = read(), time.monotonic()
        assert time.monotonic() < deadline, "it still moves"
        time.sleep(0.02)
    return seen


@contextlib.contextmanager
def using_sessions(plane, local="127.0.0.1:0", establish=True, allow_other_users=False, ttl_seconds=0,
                   verbose=False, **options):
    """A Forwarder on Sessions of a control plane; at the end no thread of a session is left, and every
    session was revoked just once. Options in capitals are constants of plexctl meanwhile."""
    def report(line):
        lines.append(line)
        running.count()  # whoever takes the lines may ask for the counts

    lines, constants = [], {name: options.pop(name) for name in list(options) if name.isupper()}
    ledger = plexctl.Ledger(create_client(plane, plane.bearer), PROJECT_ID, report,
                            report if verbose else lambda line: None)
    running = types.SimpleNamespace(
        lines=lines, plane=plane, node=plane.node, ledger=ledger, count=lambda: None,
        said=lambda *words: [line for line in lines if all(word in line for word in words)])
    with pytest.MonkeyPatch.context() as patches, plexctl.Forwarder(
            plexctl.parse_local_address(local), ledger, session_request(ttl_seconds),
            allow_other_users=allow_other_users, **options) as forwarder:
        for name, value in constants.items():
            patches.setattr(plexctl, name, value)
        running.forwarder, running.address, running.count = forwarder, str(forwarder.local), forwarder.count
        running.why = lambda: str(eventually(lambda: forwarder.over))  # it has ended
        running.relays = lambda: [each.relay for each in list(forwarder._carriers) if each.relay]
        done = threading.Event()

        def look_after():  # as the main thread of a run does
            while not done.wait(0.02):
                forwarder.tick()

        try:
            if establish:
                forwarder.establish()
            threading.Thread(target=look_after, daemon=True).start()
            yield running
        finally:
            done.set()
            forwarder.stop()
            ledger.leave(8)
    eventually(lambda: not forwarder._carriers, state=lambda: forwarder._carriers)
    assert ledger.settle() == [] and not [line for line in lines if "given up" in line], lines
    assert plane.revocations() == collections.Counter(plane.issued), lines


@contextlib.contextmanager
def relayed_to(serve=echo, direct=False, **options):
    """A Simulation and using_sessions() on it, with the options of both; `direct`: no Node in between."""
    names = {*Node.__init__.__kwdefaults__, *ControlPlane.__init__.__kwdefaults__}
    of_simulation = {name: options.pop(name) for name in list(options) if name in names}
    with Simulation(serve, **of_simulation) as simulation:
        if direct:
            leave_out_the_node(simulation)
        with using_sessions(simulation.plane, **options) as running:
            running.target = simulation.target
            yield running


def leave_out_the_node(simulation):
    """Every session's endpoint is the target itself."""
    simulation.plane.node, simulation.plane.endpoint = None, "%s:%d" % simulation.target.address


@pytest.fixture
def kinder(monkeypatch):
    """Options of relayed_to() for a Node that keeps half-closes and resets, as a real one does not."""
    monkeypatch.setattr(plexctl, "QUIET_SECONDS", 0.2)
    return dict(kinder=True)


@pytest.fixture(params=["real", "kinder"])
def way(request):
    """Options of relayed_to(), for each kind of Node."""
    return request.getfixturevalue("kinder") if request.param == "kinder" else {}


@contextlib.contextmanager
def all_at_once():
    """(client, target's end, go_on) of a proxy, which sees only at go_on() what has happened before."""
    with Simulation(silent) as simulation:
        leave_out_the_node(simulation)
        with running_proxy(simulation) as (process, address), dial(address) as client:
            target = simulation.target.connection()
            client.sendall(b"!")
            assert target.recv(1) == b"!"  # so it is being carried
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # all its threads have stopped
            yield client, target, lambda: process.send_signal(signal.SIGCONT)


def dial_with(address, *options, port=0):
    """Connect with these socket options from the start, and perhaps from a port of our choice."""
    host, number = address.rsplit(":", 1)
    client = socket.socket()
    client.settimeout(20)
    for name, value in options:
        client.setsockopt(socket.SOL_SOCKET, name, value)
    client.bind((host, port))
    client.connect((host, int(number)))
    return client


def small_window(address):
    """Connect with a receive buffer as small as it gets; the far side is soon stuck."""
    return dial_with(address, (socket.SO_RCVBUF, 4096))


def read_exactly(connection, size):
    """So many bytes, or fewer where the peer ends before."""
    data = bytearray()
    for piece in iter(lambda: connection.recv(size - len(data)), b""):
        data.extend(piece)
    return bytes(data)


def how_it_ends(connection):
    """("eof" or "reset", what came before it)."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        for piece in chunks(connection):
            received += piece
        return "eof", bytes(received)
    return "reset", bytes(received)


def knock(address):
    """how_it_ends() for a new client that says nothing; a reset may come before connect is through."""
    with contextlib.suppress(ConnectionError), dial(address) as client:
        return how_it_ends(client)
    return "reset", b""


def after(event, serve):
    """A service that does nothing until an event is set."""
    return lambda connection, target: event.wait(30) and serve(connection, target)


def recording(received, pause_seconds=0.0, each_seconds=0.0, greeting=b"", ends=False, echoes=False):
    """A service that keeps what comes in a bytearray, behind a greeting, and perhaps the end of its output;
    if asked after a pause, or with one each 4 KiB, or sending it back."""
    def serve(connection, target):
        connection.sendall(greeting)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        target.closing.wait(pause_seconds)
        for data in iter(lambda: connection.recv(4096 if each_seconds else 1 << 16), b""):
            received.extend(data)
            if echoes:
                connection.sendall(data)
            target.closing.wait(each_seconds)
    return serve


def on_request(**services):
    """A service for each first byte that a client may send, which it finds there; an echo for any other."""
    def serve(connection, target):
        first = connection.recv(1, socket.MSG_PEEK).decode("latin-1")
        services.get(first, echo)(connection, target)
    return serve


def talk(connection, data=b"ping"):
    """Send something to an echo; whether just that comes back."""
    with while_sending(connection, data):
        return read_exactly(connection, len(data)) == data


def chat(connection, rounds):
    """Ping-pong of 64 bytes with an echo."""
    for number in range(rounds):
        assert talk(connection, pattern(64, number))


def visit(address, data=b"hello"):
    """A connection that talks to an echo and closes; whether just that came back."""
    with dial(address) as client:
        return talk(client, data)


def raising(error):
    """A function that fails with this error, whatever it is given."""
    def fail(*_arguments):
        raise error
    return fail


def resident_bytes():
    """VmRSS of this process."""
    with open("/proc/self/status") as stream:
        return int(re.search(r"VmRSS:\s*([0-9]+) kB", stream.read()).group(1)) * 1024


def test_what_a_client_sends_arrives_as_it_is_and_so_does_the_answer(way):
    sizes = [1, 64, 65535, 65536, 65537, 4 * 65536, 300001, 3 * MIB]
    with relayed_to(**way) as running:
        for size in sizes:
            assert visit(running.address, pattern(size, size))
        eventually(lambda: running.count() == plexctl.Counts(0, 0, len(sizes), 1, sum(sizes), sum(sizes)))
        eventually(lambda: running.target.ends == ["eof"] * len(sizes))
        assert running.lines == []
        with dial(running.address) as client:
            chat(client, 300)
            sent = sum(sizes) + 300 * 64
            eventually(lambda: running.count() == plexctl.Counts(1, 0, len(sizes), 1, sent, sent))


def test_256_mebibytes_go_each_way_at_once(way):
    def numbered():
        return (struct.pack(">Q", number) + block[8:] for number in range(256))

    block = pattern(MIB)
    with relayed_to(**way) as running, dial(running.address) as client:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: [client.sendall(each) for each in numbered()])
            assert all(read_exactly(client, MIB) == each for each in numbered())
        chat(client, 3)
        assert running.count().open == 1 and running.lines == []


def test_half_closes_and_all_that_goes_before_them_arrive(kinder):
    with relayed_to(sink, **kinder) as running:
        for size in (0, 1, 5 * MIB):
            assert exchange(running.address, pattern(size)) == hashlib.sha256(pattern(size)).digest()
        eventually(lambda: running.target.ends == ["eof"] * 3)
        assert (running.count().up, running.lines) == (5 * MIB + 1, [])


@pytest.mark.skipif(not LINUX, reason="the options are Linux's")
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_reset_behind_an_end_costs_nothing_of_what_came_before(monkeypatch, way):
    """A peer that has closed is forgotten by its kernel, which answers our keepalive with a reset."""
    quick = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1}
    monkeypatch.setattr(plexctl, "LEG_OPTIONS", [
        (level, name, quick.get(name, value)) for level, name, value in plexctl.LEG_OPTIONS])
    with relayed_to(silent, direct=True) as running, small_window(running.address) as client:
        target, sent = running.target.connection(), []
        sender, receiver = (client, target) if way == "up" else (target, client)
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
        with contextlib.suppress(AssertionError):  # so much that the proxy is stuck, and a little more
            while True:
                sent.append(pattern(65536, len(sent)))
                sender.sendall(sent[-1])
                eventually(lambda: getattr(running.count(), way) == 65536 * len(sent), 1)
        sent.append(b"the last words" * 4096)
        sender.sendall(sent[-1])
        sender.close()
        let_pass(4)
        assert how_it_ends(receiver) == ("eof", b"".join(sent))


def test_a_client_may_go_on_after_the_server_has_ended(kinder):
    heard = bytearray()
    serve = recording(heard, greeting=b"goodbye", ends=True)
    with relayed_to(serve, QUIET_SECONDS=2, **kinder) as running, dial(running.address) as client:
        assert how_it_ends(client) == ("eof", b"goodbye")
        client.sendall(pattern(MIB))
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: running.target.ends == ["eof"])
        eventually(lambda: running.count().open == 0)
        assert heard == pattern(MIB) and running.count().up == MIB


@pytest.mark.parametrize("half_close", [False, True], ids=["", "has ended its input"])
def test_a_slow_reader_slows_the_server_and_loses_nothing_when_that_ends_first(way, half_close):
    """Nor is it taken for a quiet target, or for a path that has died."""
    size = 24 * MIB
    with relayed_to(source(size), QUIET_SECONDS=0.5, UNANSWERED_SECONDS=1, **way) as running, \
            small_window(running.address) as client:
        if half_close:
            client.shutdown(socket.SHUT_WR)
        assert standstill(lambda: running.count().down, still=4) < size
        assert how_it_ends(client) == ("eof", pattern(size))
        client.close()
        eventually(lambda: running.target.ends)  # a reset, if it was let go before it has closed


def test_a_slow_target_slows_the_client_and_gets_all(way):
    go, heard, data = threading.Event(), bytearray(), pattern(64 * MIB)  # more than the kernels take
    serve = after(go, recording(heard, echoes=True))
    with relayed_to(serve, **way) as running, dial(running.address) as client:
        with while_sending(client, data):
            assert standstill(lambda: running.count().up) < len(data)
            go.set()
            assert read_exactly(client, len(data)) == data
        assert heard == data


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_thirty_stuck_readers_take_little_memory_and_hamper_nobody():
    serve = on_request(s=source(64 * MIB))
    with relayed_to(serve, kinder=True, max_sessions=32, limit=32) as running, \
            dialled(running, 1) as (other,), contextlib.ExitStack() as stack:
        before = resident_bytes()
        for _ in range(30):
            stack.enter_context(small_window(running.address)).sendall(b"s")
        eventually(lambda: running.count().open == 31, 30)
        assert standstill(lambda: running.count().down) < 30 * 64 * MIB
        assert resident_bytes() - before < 100 * MIB
        for _ in range(50):
            with lasts(0, 2):
                chat(other, 1)
        stack.close()
        eventually(lambda: running.count().open == 1)


def test_urgent_data_stays_in_the_stream_on_both_legs():
    with relayed_to(silent, direct=True) as running, dial(running.address) as client:
        target = running.target.connection()
        for sender, receiver in ((client, target), (target, client)):
            sender.sendall(b"abc")
            sender.send(b"!", socket.MSG_OOB)
            sender.sendall(b"def")
            assert read_exactly(receiver, 7) == b"abc!def"
        target.shutdown(socket.SHUT_WR)
        assert how_it_ends(client) == ("eof", b"")


def get_stuck(client):
    """Ask for more than fits on the way, and read nothing until nothing moves."""
    client.sendall(b"d")
    assert select.select([client], [], [], 20)[0]  # it is carried by now
    standstill(lambda: unread(client.fileno()), still=0.4)


CLIENT_RESETS = {  # what it does before
    "idle": lambda client: chat(client, 3),
    "amid a download": lambda client: client.sendall(b"d") or read_exactly(client, MIB),
    "amid an upload": lambda client: client.sendall(b"u" + bytes(4 * MIB)),
    "amid an upload that is stuck": lambda client: client.sendall(b"s") or fill(client),
    "amid an upload that is stuck, and an answer": lambda client: client.sendall(b"a") or fill(client),
    "not reading": get_stuck,
    "not reading, after its half-close": lambda client: get_stuck(client) or client.shutdown(socket.SHUT_WR),
}


def test_an_end_of_input_waits_for_what_is_still_on_its_way():
    """The Node reads the end right behind the last byte, and would cut the answer off."""
    def serve(connection, _target):
        let_pass(4)
        read_exactly(connection, 5 * MIB)
        connection.sendall(b"answer")

    with relayed_to(serve) as running, dial(running.address) as client:
        client.sendall(bytes(5 * MIB))
        client.shutdown(socket.SHUT_WR)
        let_pass(1)
        if not any(relay.remote.count_unsent() for relay in running.relays()):
            pytest.skip("the kernel's buffers take it all")
        assert how_it_ends(client) == ("eof", b"answer")


@pytest.mark.parametrize("when", list(CLIENT_RESETS))
def test_a_client_that_resets_is_no_clean_end_for_the_target_and_harms_nobody(kinder, when):
    def send_before(connection, target):
        while not go.wait(0.01):
            connection.sendall(b"more")
        sink(connection, target)

    go = threading.Event()
    serve = on_request(d=source(64 * MIB), u=sink, s=after(go, sink), a=send_before)
    with relayed_to(serve, limit=8, **kinder) as running, dialled(running, 1) as (other,):
        for _ in range(3):
            client = dial(running.address)
            CLIENT_RESETS[when](client)
            reset_close(client)
        eventually(lambda: running.count().open == 1)
        go.set()
        # a session that is stuck may have been dialled ahead, of which the target sees the end
        eventually(lambda: len(running.target.ends) >= 3, state=lambda: running.target.ends)
        chat(other, 3)
        if "half-close" not in when:  # else what it sent was complete, and a Node that keeps it sends on
            assert running.target.ends == ["reset"] * 3
            assert len(running.lines) == len(running.said("not used any more")) <= ("upload" in when)


def test_what_is_complete_is_not_reset_by_the_end_of_the_run(kinder):
    data = pattern(6 * MIB)
    with relayed_to(source(6 * MIB), **kinder) as running, small_window(running.address) as client:
        relay, read = eventually(running.relays)[0], 0
        while not relay.down.end_was_sent:
            read += len(client.recv(1 << 16))
        running.forwarder.stop()
        assert how_it_ends(client) == ("eof", data[read:])


def test_a_session_whose_node_resets_right_after_the_client_did_is_not_stuck():
    """The kernel goes on counting as unacknowledged what it had sent before the reset."""
    with relayed_to(on_request(s=silent), limit=1) as running:
        client = dial(running.address)
        client.sendall(b"s")
        fill(client)
        relay = running.relays()[0]
        reset_close(client)
        eventually(lambda: relay.error)
        reset_close(running.target.connection())
        assert visit(running.address)
        assert running.lines == [] and running.plane.revoked == []


@pytest.mark.parametrize("options, size, pause_seconds, ends_first", [
    (dict(STUCK_SECONDS=30), 5 * MIB, 3, False), (dict(direct=True), MIB // 2, 1.2, False),
    (dict(direct=True), MIB // 2, 1.2, True)],
    ids=["its Node is stuck meanwhile", "a kinder Node", "which has ended first"])
def test_what_a_client_sent_before_its_reset_arrives(options, size, pause_seconds, ends_first):
    """It closes with something unread. The session is not revoked as soon as the Node has the bytes."""
    received = bytearray()
    with relayed_to(recording(received, pause_seconds, 0.002, b"hello", ends_first), **options) as running:
        with dial(running.address) as client:
            client.recv(1, socket.MSG_PEEK)
            client.sendall(pattern(size))
            eventually(lambda: running.count().up == size)
        running.target.wait_for(lambda: running.target.ends)
        assert received == pattern(size) and not running.plane.revoked


@pytest.mark.parametrize("request_bytes", [b"r" + bytes(10), b"d", b"u" + bytes(64 * MIB)], ids=[
    "idle", "amid a download", "amid an upload"])
def test_a_target_that_resets_is_no_clean_end_for_the_client_and_harms_nobody(kinder, request_bytes):
    serve = on_request(r=resetter(10, 1), d=resetter(0, 4 * MIB), u=resetter(3 * MIB, 1))
    with relayed_to(serve, **kinder) as running, dialled(running, 1) as (other,):
        for _ in range(3):
            with dial(running.address) as client:
                client.sendall(request_bytes[:1])
                assert client.recv(1)  # or the Node's reset may overtake it
                try:
                    if request_bytes[1:]:  # sending nothing would fetch the reset as well
                        client.sendall(request_bytes[1:])
                except ConnectionError:
                    assert len(request_bytes) > MIB
                else:
                    assert how_it_ends(client)[0] == "reset"
        eventually(lambda: running.count().open == 1)
        chat(other, 3)
        assert running.lines == []


def test_a_client_that_resets_just_as_the_target_sends_is_no_clean_end_for_the_target():
    with all_at_once() as (client, target, go_on):
        target.sendall(b"more")
        reset_close(client)
        go_on()
        assert how_it_ends(target)[0] == "reset"


@pytest.mark.skipif(not LINUX, reason="elsewhere the error is another one")
def test_a_client_that_has_seen_the_end_and_loses_what_it_sends_is_reset():
    with relayed_to(silent, direct=True) as running, dial(running.address) as client:
        target = running.target.connection()
        target.shutdown(socket.SHUT_WR)
        assert how_it_ends(client) == ("eof", b"")
        reset_close(target)
        let_pass(0.1)  # or what the client sends may overtake it
        client.sendall(b"more")
        assert eventually(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) == errno.EPIPE


@pytest.mark.parametrize("words, half_close", [(b"", False), (b"error: too big", False), (b"error", True)],
                         ids=["no words", "while it sends", "after its end"])
def test_last_words_before_a_reset_arrive_and_the_reset_too(words, half_close):
    """A server that has heard enough, as of an upload that is too large."""
    with all_at_once() as (client, target, go_on):
        client.sendall(b"hello")
        if half_close:
            client.shutdown(socket.SHUT_WR)
        target.sendall(words)
        let_pass(0.1)  # or the reset may overtake them
        reset_close(target)
        go_on()
        assert how_it_ends(client) == ("reset", words)


def test_a_process_that_is_killed_resets_both_ends():
    with Simulation(source(64 * MIB), kinder=True) as simulation, start(simulation, "--proxy") as process:
        with dial(proxy_address(process)) as client:
            read_exactly(client, MIB)
            process.kill()
            process.finish()
            del FORWARDED[:]  # it could not revoke
            assert how_it_ends(client)[0] == "reset"
            simulation.target.wait_for(lambda: simulation.target.ends == ["reset"])


def test_a_defect_in_one_connection_ends_that_one_alone(kinder):
    with relayed_to(limit=1, **kinder) as running:
        with dial(running.address) as client:
            chat(client, 3)
            running.relays()[0].up.move = None  # ends in a TypeError
            client.sendall(b"x")
            assert how_it_ends(client)[0] == "reset"
        assert visit(running.address) and running.forwarder.over is None


def test_a_dead_path_ends_a_connection_but_has_not_taken_what_came_before_a_reset():
    with contextlib.ExitStack() as stack:
        client, remote = [plexctl.Leg(stack.enter_context(each)) for each in socket.socketpair()]
        remote.is_dead, remote.count_unsent = lambda: True, lambda: 1
        relay = plexctl.Relay(client, remote, plexctl.create_buffers(), None, None, lambda seconds: seconds)
        for relay.ending, is_over in ((plexctl.CLIENT_CLOSED, True), (plexctl.CLIENT_RESET, False)):
            assert relay.await_end(0.1) is is_over


@pytest.mark.parametrize("starved", ["recv_into", "send"])
def test_want_of_memory_is_neither_an_end_nor_a_reset_and_loses_nothing(starved):
    def read(buffer):
        buffer[:5] = b"hello"
        return 5

    fail = raising(OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)))
    source = types.SimpleNamespace(reads_at=0, recv_into=read if starved == "send" else fail)
    flow = plexctl.Flow(source, types.SimpleNamespace(writes_at=1, send=fail), memoryview(bytearray(9)))
    with pytest.raises(OSError) as raised:
        flow.move()
    assert raised.type is OSError and flow.count_undelivered() == (5 if starved == "send" else 0)


# ---- tests: forwarder ----------------------------------------------------------------------------

READS_PROC = pytest.mark.skipif(not LINUX, reason="reads /proc")


def descriptors():
    """How many descriptors this process has open, but for those of garbage."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def nothing_left():
    """What runs inside leaves neither a thread nor a descriptor."""
    threads, before = set(threading.enumerate()), descriptors()
    yield
    eventually(lambda: set(threading.enumerate()) <= threads, state=threading.enumerate)
    eventually(lambda: descriptors() <= before, state=lambda: "%d, %d before" % (descriptors(), before))


def test_nothing_is_dialled_but_for_a_connection(simulation):
    with using_sessions(simulation.plane, minimum=3) as running:
        eventually(lambda: running.count().sessions == 3)
        assert visit(running.address)
        eventually(lambda: running.count().ended == 1)
        assert sum(simulation.node.connections.values()) == simulation.target.accepted == 1


def test_an_ipv6_address_can_be_listened_on():
    with relayed_to(local="[::1]:0") as running:
        assert re.match(r"\[::1\]:[1-9][0-9]*\Z", running.address)
        assert visit(running.address) and running.lines == []  # nor that nobody can tell whose it is


def dial_unix(path, name=""):
    """Connect to a unix socket, with a name of our own if one is given."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    if name:
        client.bind(name)
    client.connect(path)
    return client


def test_a_unix_socket_is_ours_alone_and_goes_at_the_end(tmp_path, way):
    path, umask = str(tmp_path / "s"), os.umask(0o027)
    names = ["", str(tmp_path / "client")] + ["\0plexctl test %d" % os.getpid()] * LINUX
    try:
        with relayed_to(local="unix:" + path, verbose=True, **way) as running:
            assert os.umask(0o027) == 0o027  # which is the whole process's, and no business of ours
            assert os.stat(path).st_mode & 0o777 == 0o600 and running.address == "unix:" + path
            for name in names:
                with dial_unix(path, name) as client:
                    assert talk(client, pattern(MIB))
            eventually(lambda: running.count().ended == len(names))
            assert len(running.said("from a local process to ")) == len(names) and not running.said("warning")
        assert not os.path.lexists(path)
    finally:
        os.umask(umask)


@pytest.mark.parametrize("make", [
    lambda path: write_private(path, "precious"), lambda path: os.symlink(path + "_elsewhere", path),
    lambda path: socketserver.UnixStreamServer(path, None).server_close()],
    ids=["file", "dangling link", "stale socket"])
def test_an_existing_file_is_neither_overwritten_nor_removed(tmp_path, make):
    path = str(tmp_path / "s")
    make(path)
    before = os.lstat(path)
    with pytest.raises(plexctl.PlexctlError, match="--local-addr"):
        plexctl.Forwarder(plexctl.parse_local_address("unix:" + path),
                          plexctl.Ledger(None, PROJECT_ID, pytest.fail), None)
    assert os.lstat(path) == before and os.listdir(str(tmp_path)) == ["s"]


def test_stopping_even_twice_does_not_remove_somebody_else_s_unix_socket(tmp_path):
    path, other = str(tmp_path / "s"), str(tmp_path / "other")
    with relayed_to(local="unix:" + path) as running:
        running.forwarder.stop()
        assert not os.path.lexists(path)
        with relayed_to(local="unix:" + path):  # may well get the same inode
            running.forwarder.stop()
            with dial_unix(path) as client:
                assert talk(client)
            socketserver.UnixStreamServer(other, None).server_close()
            os.rename(other, path)
    assert os.path.exists(path)


@pytest.mark.skipif(not LINUX, reason="how the kernel tells of it")
def test_a_unix_client_that_hangs_up_or_gets_stuck_holds_nothing_up(tmp_path):
    """A hang-up that nobody acts on is reported for ever, at the cost of a whole core."""
    path = str(tmp_path / "s")
    with relayed_to(source(64 * MIB), local="unix:" + path) as running, dial_unix(path) as client:
        standstill(lambda: running.count().down)
        client.shutdown(socket.SHUT_RDWR)
        eventually(lambda: running.count().ended == 1)
        with dial_unix(path) as second:
            assert second.recv(1)
            standstill(lambda: running.count().down)
            with lasts(0, 3):
                running.forwarder.stop()
            how_it_ends(second)  # else it hangs


@pytest.mark.skipif(not LINUX, reason="how the kernel tells of it")
def test_a_unix_client_that_reads_no_more_and_stays_is_let_go_when_the_node_has_ended(tmp_path):
    path = str(tmp_path / "s")
    with relayed_to(on_request(d=source(MIB)), limit=1, local="unix:" + path, QUIET_SECONDS=0.5) as running, \
            dial_unix(path) as client:
        client.shutdown(socket.SHUT_RD)
        client.sendall(b"d")
        with dial_unix(path) as following:
            following.sendall(b"d")
            assert how_it_ends(following) == ("eof", pattern(MIB))
        assert not running.said("nothing came back")


STOP_STATES = {  # what the first client does, if there is a session, and what is waited for then
    "issuing": (None, lambda running: asked(running.plane, "issue")),
    "waiting for the Node": (None, lambda running: asked(running.plane, "get")),
    "idle": (lambda client: chat(client, 1) or client.close(), lambda running: running.count().ended == 1),
    "dialling": (str, lambda running: not running.count().open),
    "talking": (lambda client: chat(client, 1), None),
    "not reading": (get_stuck, None),
    "bulk": (lambda client: client.sendall(b"d") or read_exactly(client, MIB), None),
    "nobody reads": (lambda client: client.sendall(b"s" + bytes(MIB)), None),
    "a held end": (lambda client: client.shutdown(socket.SHUT_WR) or let_pass(0.5), None),
}


@READS_PROC
@pytest.mark.parametrize("waiting", [0, 7], ids=["nobody waits", "seven wait"])
@pytest.mark.parametrize("state", list(STOP_STATES))
def test_stop_takes_less_than_three_seconds_and_leaves_nothing(state, waiting):
    act, reached = STOP_STATES[state]
    serve, go = on_request(d=source(64 * MIB), s=silent), threading.Event()
    if state == "idle" and waiting:
        pytest.skip("nobody waits for an idle session")
    with nothing_left(), contextlib.ExitStack() as stack:
        simulation = stack.enter_context(Simulation(serve, late=60 if state == "waiting for the Node" else 0))
        if state == "issuing":
            simulation.plane.script("issue", hold(go))
        elif state == "dialling":
            hanging = stack.enter_context(dial_that_hangs())
            simulation.plane.node, simulation.plane.endpoint = None, "%s:%d" % hanging.getsockname()
        running = stack.enter_context(using_sessions(simulation.plane, establish=False, limit=1))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        establishing = pool.submit(running.forwarder.establish)
        clients = [stack.enter_context(dial(running.address)) for _ in range(1 + waiting)]
        if act:
            act(clients[0])
        eventually(lambda: reached(running) if reached else running.count().open)
        eventually(lambda: running.count().waiting == waiting + (not act))
        with lasts(0, 3):
            running.forwarder.stop()
        assert all(how_it_ends(client)[0] == "reset" for client in clients if client.fileno() >= 0)
        with pytest.raises(ConnectionError):
            dial(running.address)
        go.set()
        assert isinstance(establishing.exception(10), plexctl.Cancelled) == (not act)
        assert not running.said("not served")  # a dial that was given up is no failure


@READS_PROC
def test_five_thousand_short_connections_leave_nothing():
    def visit_often(times):
        return sum(visit(running.address, b"x") for _ in range(times))

    def state():
        return threading.active_count(), descriptors()

    with relayed_to(echo_of(1)) as running, concurrent.futures.ThreadPoolExecutor(4) as pool:
        with dialled(running, 4, served=0) as clients:
            for client in clients:
                assert talk(client, b"x")
        assert sum(pool.map(visit_often, [124] * 4)) == 496
        eventually(lambda: running.count().ended == len(running.target.ends) == 500)
        before, memory = standstill(state), resident_bytes()
        assert sum(pool.map(visit_often, [1125] * 4)) == 4500
        eventually(lambda: running.count().ended == len(running.target.ends) == 5000)
        assert running.count().up == running.count().down == 5000
        eventually(lambda: all(now <= then for now, then in zip(state(), before)),
                   state=lambda: (state(), before))
        assert resident_bytes() - memory < 8 * MIB
        assert running.lines == running.said("--max-sessions")  # a busy machine may let one wait for a while
        assert never_two_at_once(running) and len(running.plane.issued) == 4


@READS_PROC
def test_two_hundred_clients_wait_in_turn_and_cost_neither_thread_nor_descriptor():
    order = []

    def note(connection, _target):
        words = read_exactly(connection, 3)
        if words:
            order.append(words)
        connection.sendall(b"!")

    with relayed_to(note, limit=1) as running, contextlib.ExitStack() as stack:
        first = stack.enter_context(dial(running.address))
        eventually(lambda: running.target.accepted)
        threads, before = threading.active_count(), descriptors()
        clients = [stack.enter_context(dial(running.address)) for _ in range(200)]
        for number, client in enumerate(clients):
            client.sendall(b"%03d" % number)
        eventually(lambda: running.count().waiting == 200)
        assert threading.active_count() < threads + 20 and descriptors() < before + 220  # 200 are ours
        assert (running.count().open, running.count().ended) == (1, 0)
        eventually(lambda: running.lines)
        first.close()
        for client in clients:
            assert client.recv(1) == b"!"
            client.close()
        eventually(lambda: running.count().ended == 201)
        assert order == [b"%03d" % number for number in range(200)]
        assert len(running.said("--max-sessions")) == len(running.lines) == 1 and never_two_at_once(running)


def attempt(address, data=b"hello"):
    """Whether a connection is served now."""
    with contextlib.suppress(OSError):
        return visit(address, data)
    return False


@pytest.mark.parametrize("which", [1, 2])
def test_one_of_two_first_sessions_whose_thread_cannot_be_started_is_made_up_for(which):
    starts, this = iter([which == 1, which == 2]), threading.current_thread()
    with relayed_to(establish=False, minimum=2, FAILED_PAUSE_SECONDS=0.5) as running:
        with no_more_threads(lambda: threading.current_thread() is this and next(starts)):
            running.forwarder.establish()
        assert visit(running.address)
        eventually(lambda: running.count().sessions == 2)
        assert running.forwarder.over is None and len(running.plane.issued) == 2


def test_a_look_at_the_backlog_that_fails_ends_nothing_that_works(simulation, monkeypatch):
    def fail():
        if running.lines:
            return count_waiting()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with using_sessions(simulation.plane) as running, dial(running.address) as client:
        chat(client, 1)
        count_waiting = running.forwarder.listener.count_waiting
        monkeypatch.setattr(running.forwarder.listener, "count_waiting", fail)
        eventually(lambda: running.said("warning: cannot accept connections for now"))
        chat(client, 1)
        assert visit(running.address)
        assert len(running.lines) == 1 and running.forwarder.over is None


@READS_PROC
def test_an_accept_that_fails_is_told_once_and_tried_again(simulation):
    def cpu_seconds():
        with open("/proc/%d/stat" % process.pid) as stream:
            fields = stream.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with running_proxy(simulation) as (process, address):
        assert visit(address)
        old = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, old[1]))
        with dial(address) as client:
            process.wait_for_output("cannot accept connections for now")
            used = cpu_seconds()
            let_pass(1.5)
            assert cpu_seconds() - used < 0.15  # it does not spin
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, old)
            chat(client, 3)
    assert process.err.count("cannot accept") == 1


# ---- tests: whose connection it is ---------------------------------------------------------------

NEEDS_A_STRANGER = pytest.mark.skipif(
    not (LINUX and ROOT and os.path.exists("/usr/bin/python3")), reason="needs root, on Linux")
STRANGER = """
import os, socket, struct, sys
where = sys.argv[1], int(sys.argv[2])
def connect(port=0, device=b""):
    client = socket.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.settimeout(10)
    if device:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    if port:
        client.bind((where[0], port))
    client.connect(where)
    return client
"""
KNOCKS = """
try:
    with connect() as client:
        client.sendall(b"let me in")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        client.shutdown(socket.SHUT_WR)
        print(client.makefile().read(), flush=True)
except OSError:
    print("", flush=True)
"""
@contextlib.contextmanager
def stranger(program, address, *arguments):
    """Another user at the forwarder's address: a Process of which the first line has come."""
    host, port = address.rsplit(":", 1)
    words = ["/usr/bin/python3", "-I", "-c", STRANGER + program, host.strip("[]"), port, *map(str, arguments)]
    become = becoming(65534, "/")["preexec_fn"]
    with Process(words, cwd="/", env={}, stdin=subprocess.PIPE, preexec_fn=become) as process:
        process.ready()
        yield process


def quiet_port():
    """A port that the kernel hands out to nobody, and another process of these tests does not take."""
    first = 20000 + os.getpid() * 13 % 9000
    for port in range(first, first + 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@NEEDS_A_STRANGER
@pytest.mark.parametrize("local", ["127.0.0.1:0", "[::1]:0"])
def test_another_user_is_turned_away_and_we_are_not(local):
    def try_as_another():
        with stranger(KNOCKS, running.address) as process:
            assert process.out == "\n"

    with relayed_to(local=local) as running:
        try_as_another()
        assert running.target.accepted == 0 and not running.node.connections
        with dial(running.address) as client:
            chat(client, 1)
            try_as_another()
        assert running.target.accepted == 1
        assert running.said("warning: ", "rejected", "uid 65534") == running.lines and len(running.lines) == 1


@NEEDS_A_STRANGER
def test_another_user_is_let_in_where_that_is_wanted():
    with relayed_to(kinder=True, allow_other_users=True) as running:
        with stranger(KNOCKS, running.address) as process:
            assert process.out == "let me in\n"
        assert running.lines == []


@NEEDS_A_STRANGER
@pytest.mark.parametrize("waits_for_node", [False, True], ids=["while it serves", "while it waits"])
def test_a_flood_of_another_user_s_dead_connections_reaches_nobody_and_keeps_nobody_out(waits_for_node):
    heard, floods = bytearray(), """
print("", flush=True)
while True:
    try:
        with connect() as client:
            client.sendall(b"EVIL")
    except OSError:
        pass
"""
    with relayed_to(recording(heard, echoes=True), late=3 * waits_for_node, limit=10,
                    establish=not waits_for_node) as running:
        with stranger(floods, running.address):
            with dialled(running, 20, served=0) as clients:  # the kernel hands out the next one's ports
                for client in clients:
                    client.sendall(b"good")
                if waits_for_node:
                    running.forwarder.establish()
                for client in clients:
                    assert read_exactly(client, 4) == b"good"
                    client.close()
            for _ in range(20):
                assert visit(running.address, b"good")
        assert b"EVIL" not in bytes(heard) and len(heard) == 160
        assert len(running.said("rejected")) <= 1
        assert len(running.lines) <= 2 + waits_for_node  # it waits; there are more connections than sessions


@NEEDS_A_STRANGER
@pytest.mark.parametrize("owner", ["connects", "listens"])
def test_a_payload_from_a_dead_connection_is_not_ours_whatever_we_do_on_its_port(owner):
    heard, port, leaves_a_payload = bytearray(), quiet_port(), """
with connect(int(sys.argv[3])) as client:
    client.sendall(b"EVIL")
print("", flush=True)
"""
    with relayed_to(recording(heard, echoes=True), establish=False) as running, \
            contextlib.ExitStack() as stack:
        stack.enter_context(stranger(leaves_a_payload, running.address, port))
        if owner == "listens":
            stack.enter_context(listening_socket(port))  # a service of ours
            socket.create_connection(("127.0.0.1", port), 10).close()
        client = stack.enter_context(dial_with(running.address, (socket.SO_REUSEADDR, 1),
                                               port=port if owner == "connects" else 0))
        running.forwarder.establish()
        assert talk(client, b"good")
        assert running.forwarder.listener.unidentified == 1 and running.lines == []
        assert bytes(heard) == b"good"


@NEEDS_A_STRANGER
def test_a_socket_that_is_bound_to_a_device_is_judged_by_its_own_user():
    heard, port, is_bound_to_lo = bytearray(), quiet_port(), """
with connect(int(sys.argv[3]), b"lo") as client:
    client.sendall(b"EVIL")
    print("", flush=True)
    sys.stdin.read()
"""
    with relayed_to(recording(heard, echoes=True), establish=False) as running, \
            stranger(is_bound_to_lo, running.address, port), listening_socket(port):  # a service of ours
        running.forwarder.establish()
        eventually(lambda: running.said("rejected", "uid 65534"))
        with dial_with(running.address, (socket.SO_BINDTODEVICE, b"lo")) as client:  # ours may be, as well
            assert talk(client, b"good")
        assert bytes(heard) == b"good" and len(running.lines) == 1


@pytest.mark.skipif(not LINUX, reason="asks the kernel")
@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_kernel_says_who_holds_the_other_end_and_of_nobody_else(family, host):
    def owner(client):
        return plexctl.find_owner(family, client, local)

    nobody = plexctl.NOBODY, True
    with contextlib.ExitStack() as stack:
        listener, client, half, other = [stack.enter_context(socket.socket(family)) for _ in range(4)]
        listener.bind((host, 0))
        listener.listen(8)
        local = listener.getsockname()[:2]
        for each in (client, half):
            each.connect(local)
        name, half_name = client.getsockname()[:2], half.getsockname()[:2]
        accepted = [stack.enter_context(listener.accept()[0]) for _ in range(2)]
        half.shutdown(socket.SHUT_WR)
        assert [owner(each) for each in (name, half_name)] == [(os.geteuid(), False)] * 2
        client.close()
        assert [owner(each) for each in (name, (host, 1))] == [nobody] * 2  # inode 0; no such socket
        reset_close(accepted[0])
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(name)
        except OSError:
            pytest.skip("somebody else was given the port meanwhile")
        other.listen(1)
        assert owner(name) == nobody  # the kernel answers with the listener


@pytest.mark.skipif(not LINUX, reason="a full backlog drops what comes")
def test_a_connection_that_is_only_being_asked_for_is_nobody_s():
    with dial_that_hangs() as listener, socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
        found = plexctl.find_owner(socket.AF_INET, client.getsockname(), listener.getsockname())
        assert found == (plexctl.NOBODY, True)  # SYN_SENT, of this very user


@pytest.mark.skipif(not LINUX, reason="asks the kernel")
def test_one_that_has_gone_before_it_could_be_asked_for_is_not_served_and_told_of_at_the_end(simulation):
    heard = bytearray()
    simulation.target.serve = recording(heard, echoes=True)
    with running_proxy(simulation, "--max-sessions", 1) as (process, address):
        with dial(address) as first:
            chat(first, 1)
            with dial(address) as second:
                second.sendall(b"rm -rf")
        assert visit(address)
    assert b"rm -rf" not in bytes(heard) and simulation.target.accepted == 2
    assert re.search("; 1 closed before .* owner could be checked", process.err), process.err


@pytest.mark.skipif(not (LINUX and shutil.which("unshare") and subprocess.call(
    ["unshare", "-U", "true"], stderr=subprocess.DEVNULL) == 0), reason="no user namespaces")
def test_where_our_uid_is_the_one_of_every_stranger_that_is_announced(simulation):
    with running_proxy(simulation, within=["unshare", "-U"]) as (process, address):
        assert visit(address)
        assert process.err.count("warning: this host cannot tell whose a connection is") == 1


def test_a_host_that_cannot_tell_is_announced_once_and_connections_are_served(simulation, monkeypatch):
    monkeypatch.setattr(plexctl, "find_socket", raising(OSError("not here")))
    with using_sessions(simulation.plane) as running:
        assert visit(running.address) and visit(running.address)
        assert len(running.lines) == len(running.said("warning: this host cannot tell")) == 1


def test_an_address_beyond_loopback_is_announced():
    with relayed_to(local="0.0.0.0:0") as running:
        assert len(running.lines) == 1 and "not a loopback address" in running.lines[0]
        assert visit("127.0.0.1:" + running.address.rsplit(":", 1)[1])


# ---- tests: sessions in use ----------------------------------------------------------------------

@contextlib.contextmanager
def dialled(running, count, served=None):
    """So many clients at once, of which so many talk to an echo (all unless told)."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(running.address)) for _ in range(count)]
        for client in clients[:count if served is None else served]:
            chat(client, 1)
        yield clients


def never_two_at_once(running):
    """No listener of the Node had a second connection, served or in its backlog."""
    return set(running.node.most.values()) <= {1} and running.node.waits == []


def let_pass(seconds):
    """Time in which something is not to happen."""
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began > seconds, seconds + 10)


def settled(running, ended):
    """Wait until so many connections have ended, here and at the Node."""
    eventually(lambda: running.count().ended == ended, state=lambda: running.count().ended)
    eventually(lambda: not any(running.node.busy(each) for each in running.plane.issued))


def test_four_connections_have_four_sessions_which_the_next_four_use_again(simulation):
    with using_sessions(simulation.plane, limit=4) as running:
        for number in (1, 2, 3):
            with dialled(running, 4):
                assert sorted(simulation.node.busy(each) for each in simulation.plane.issued) == [1] * 4
            settled(running, 4 * number)
        assert len(simulation.plane.issued) == 4 and running.lines == [] and never_two_at_once(running)


def test_sequential_use_needs_one_session_and_never_waits_for_the_node_or_the_server():
    with relayed_to(late=[0, 60], delay=0.02) as running:
        for _ in range(10):
            assert visit(running.address)
        settled(running, 10)
        assert len(running.plane.issued) == 1 and running.lines == [] and asked(running.plane, "get") == 0


@pytest.mark.parametrize("grace, issued", [(30, 1), (0.3, 2)], ids=["within the grace", "after it"])
def test_a_connection_that_waits_gets_the_session_that_is_idle_first(grace, issued):
    with relayed_to(late=[0, 60], GRACE_SECONDS=grace) as running, dialled(running, 2, served=1) as clients:
        eventually(lambda: running.count().waiting == 1 and len(running.plane.issued) == issued)
        clients[0].close()
        chat(clients[1], 1)
        clients[1].close()
        assert visit(running.address) and len(running.plane.issued) == issued


def test_eight_at_once_ask_for_seven_at_once(simulation):
    go = threading.Event()
    simulation.plane.script("issue", PASS, *[hold(go)] * 7)
    with using_sessions(simulation.plane, limit=8) as running, dialled(running, 8, served=1) as clients:
        eventually(lambda: asked(simulation.plane, "issue") == 8)
        assert len(simulation.plane.issued) == 1
        go.set()
        for client in clients:
            chat(client, 1)
        assert len(simulation.plane.issued) == 8 and never_two_at_once(running) and running.lines == []


@pytest.fixture(params=["tcp", "tcp of all users", "unix"])
def kind(request, tmp_path):
    """Options of relayed_to() for a local address, and what connects to it."""
    path = str(tmp_path / "s")
    return types.SimpleNamespace(
        is_unix=request.param == "unix", asks_for_owners=request.param == "tcp" and LINUX,
        options=dict(local="unix:" + path if request.param == "unix" else "127.0.0.1:0",
                     allow_other_users=request.param == "tcp of all users"),
        dial=lambda running: dial_unix(path) if request.param == "unix" else dial(running.address))


@pytest.mark.parametrize("leave", [socket.socket.close, reset_close], ids=["closes", "resets"])
def test_a_client_that_leaves_while_it_waits_is_never_dialled(kind, leave):
    if kind.is_unix and leave is reset_close:
        pytest.skip("there is no reset on a unix socket")
    with relayed_to(limit=1, **kind.options) as running, contextlib.ExitStack() as stack:
        first, second, third, fourth = [stack.enter_context(kind.dial(running)) for _ in range(4)]
        chat(first, 1)
        third.sendall(b"its bytes count, where its owner need not be asked for")
        eventually(lambda: running.count().waiting == (1 if kind.is_unix else 3))
        leave(second)
        leave(third)
        first.close()
        chat(fourth, 1)
        served = not kind.asks_for_owners
        eventually(lambda: running.count().up == 64 + 54 * served + 64)  # counted after it was sent
        assert running.target.accepted == sum(running.node.connections.values()) == 2 + served
        assert running.forwarder.listener.unidentified == 2 * kind.asks_for_owners


@pytest.mark.parametrize("late", [[0.5, 60, 60], [60, 0.5, 60], [60, 60, 0.5]], ids=shown)
def test_the_minimum_is_issued_at_once_and_ready_as_soon_as_one_is(late):
    go = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, \
            relayed_to(late=late, establish=False, minimum=3) as running, dial(running.address) as client:
        running.plane.script("issue", *[hold(go)] * 3)
        establishing = pool.submit(running.forwarder.establish)
        eventually(lambda: asked(running.plane, "issue") == 3)
        go.set()
        assert establishing.result(15)
        chat(client, 1)  # it came before any session was there
        assert running.count().sessions == 1 and len(running.plane.issued) == 3


@pytest.mark.parametrize("name", ["forbidden", "session_limit_exceeded", "access_session_not_provisioned"])
def test_sessions_that_are_refused_altogether_are_told_of_once_and_who_waits_is_reset(simulation, name):
    simulation.plane.script("issue", *[problem(name)] * 3)
    with using_sessions(simulation.plane, establish=False, minimum=3) as running, \
            dial(running.address) as client:
        with pytest.raises(plexctl.ApiError):
            running.forwarder.establish()
        assert how_it_ends(client) == ("reset", b"") and running.lines == []


def test_a_session_that_may_exist_is_told_of_once_also_where_another_one_is_there(lone_plane):
    ledger = plexctl.Ledger(create_client(lone_plane), PROJECT_ID, pytest.fail)
    ledger.issue(session_request())
    for _ in range(2):
        lone_plane.script("issue", *[PASSING["502"]] * 3)
        with pytest.raises(plexctl.ApiError):
            ledger.issue(session_request())
    ledger.leave()
    line, = ledger.settle()
    assert line.startswith("session unknown: ") and MAY_EXIST in line


def test_sessions_that_run_out_one_after_the_other_are_told_of_once(simulation):
    with using_sessions(simulation.plane, ttl_seconds=1, renew=True, minimum=2) as running:
        eventually(lambda: len(simulation.plane.issued) > 4, 20)
        assert len(running.said("the session expired")) == 1


def test_a_session_id_that_comes_again_is_refused_and_revoked_no_second_time(simulation):
    answers = []

    def answer(handler, plane):
        answers[:] = answers or [plane.decide(handler.seen)]
        handler.wfile.write(handler.render(answers[0]))
    simulation.plane.script("issue", answer, answer, answer)
    with using_sessions(simulation.plane, limit=2) as running, dialled(running, 1) as (client,):
        with dial(running.address) as other:
            eventually(lambda: running.said("warning: no further session", "of an earlier session"))
            client.close()
            chat(other, 1)


def test_the_minimum_is_replaced_when_it_ends(simulation):
    with using_sessions(simulation.plane, minimum=2, RECHECK_SECONDS=0.5, ASK_SECONDS=0.1) as running:
        eventually(lambda: running.count().sessions == 2)
        simulation.plane.revoke(simulation.plane.issued[1], "idle_timeout")
        eventually(lambda: len(simulation.plane.issued) == 3 and running.count().sessions == 2)
        assert running.forwarder.over is None and len(running.lines) == 1


@pytest.mark.parametrize("minimum", [1, 2])
def test_what_is_idle_above_the_minimum_is_given_back(simulation, minimum):
    with using_sessions(simulation.plane, minimum=minimum, IDLE_SECONDS=0.3) as running:
        for _ in range(2):
            with dialled(running, 4) as clients:
                for client in clients[1:]:
                    client.close()
                eventually(lambda: running.count().sessions == minimum + 1)  # so many are free
                chat(clients[0], 1)
        with dialled(running, 4):
            pass
        eventually(lambda: not running.relays())
        before = dict(simulation.node.connections)
        assert visit(running.address)
        used, = [each for each in before if simulation.node.connections[each] > before[each]]
        eventually(lambda: running.count().sessions == minimum)
        let_pass(1)
        assert running.count().sessions == len(simulation.plane.active()) == minimum
        assert used in simulation.plane.active()  # the one that was used last stays
        assert visit(running.address) and running.lines == []


@pytest.mark.parametrize("answer, words, node", [
    (problem("session_limit_exceeded"), ["--max-sessions", "print mode"], {}),
    (problem("forbidden"), ["403"], {}), (problem("rebac_denied"), ["insufficient_relation"], {}),
    (PASS, ["reported no listener"], dict(max_sessions=2)),
    (PASS, ["reported no listener"], dict(late=[0, 0, 60]))],
    ids=["429", "403", "ReBAC", "the Node is full", "the Node is late"])
def test_a_further_session_that_is_refused_lowers_the_limit_with_one_warning(answer, words, node):
    with relayed_to(wait_seconds=0.6, limit=3, **node) as running, dialled(running, 2) as clients:
        running.plane.script("issue", answer)
        clients += [dial(running.address) for _ in range(3)]
        warning, = eventually(lambda: running.said("warning: no further session for now"))
        assert all(word in warning for word in words), warning
        let_pass(3 * plexctl.GRACE_SECONDS)  # three wait, and nobody asks again
        for number in (0, 1, 2):
            clients[number].close()
            chat(clients[number + 2], 1)
        for client in clients:
            client.close()
        assert asked(running.plane, "issue") == 3 and running.forwarder.over is None
        assert [line for line in running.lines if "waiting for" not in line] == [warning]
        eventually(lambda: len(running.plane.active()) == 2)


def test_a_further_session_that_fails_for_now_is_asked_for_again(simulation):
    simulation.plane.script("issue", PASS, *[reset] * 3)
    with using_sessions(simulation.plane, FAILED_PAUSE_SECONDS=0.5) as running, dialled(running, 2):
        assert asked(simulation.plane, "issue") == 5
        assert len(running.said("warning: no further session for now")) == len(running.lines) == 1


def test_the_end_of_a_client_that_is_gone_is_passed_on_at_once(kind):
    serve = on_request(r=recording(bytearray()), d=source(64 * MIB))
    with relayed_to(serve, QUIET_SECONDS=60, **kind.options) as running:
        for number, word in enumerate((b"r", b"d"), 1):  # also one whose target is never quiet
            client = kind.dial(running)
            client.sendall(word)
            eventually(lambda: running.count().up == number)  # noqa: B023
            client.shutdown(socket.SHUT_WR)
            client.close()
            settled(running, number)
        assert running.lines == []


@pytest.mark.skipif(not LINUX, reason="the kernel tells")
def test_the_end_of_a_client_whose_child_has_its_socket_is_a_half_close():
    with relayed_to(kinder=True, QUIET_SECONDS=60) as running:
        client = dial(running.address)
        chat(client, 1)
        twin = client.dup()
        client.shutdown(socket.SHUT_WR)
        client.close()
        let_pass(1)
        assert running.count().open == 1 and running.target.ends == []
        twin.close()
        settled(running, 1)


@pytest.mark.parametrize("goes_on", [False, True], ids=["says nothing", "sends on and on"])
def test_a_client_that_keeps_its_end_open_after_the_target_s_keeps_no_session(goes_on):
    """As curl and connection pools do; the Node serves the next one already."""
    with relayed_to(source(5), limit=1, QUIET_SECONDS=0.5) as running, dial(running.address) as first:
        assert how_it_ends(first) == ("eof", pattern(5))
        with pytest.raises(ConnectionError) if goes_on else contextlib.ExitStack():
            for _ in range(400 * goes_on):
                first.sendall(b"x")
                time.sleep(0.05)
        assert knock(running.address) == ("eof", pattern(5))
        assert running.node.waits == [] and len(running.plane.issued) == 1


@pytest.mark.parametrize("end, options", [(lambda *_: None, {}), (resetter(1), dict(direct=True))],
                         ids=["ends", "resets"])
def test_a_target_that_ends_without_an_answer_is_told_of_once_but_not_beside_another_connection(end, options):
    """Such is psql's cancel request; once nothing else has an answer, the target may well be gone."""
    with relayed_to(on_request(c=end), **options) as running:
        with dialled(running, 1):
            assert not attempt(running.address, b"c")
            eventually(lambda: running.count().ended == 1)
            assert not running.said("nothing came back")
        eventually(lambda: running.count().ended == 2)
        for _ in range(3):
            assert not attempt(running.address, b"c")
        eventually(lambda: running.count().ended == 5 and running.lines)
        warning, = running.lines
        assert "nothing came back: nothing listens at %s:%d" % (HOST, PORT) in warning
        assert "(--host and --port are as the Node sees them)" in warning


@pytest.mark.parametrize("ends_first", ["the one with an answer", "the one without"])
def test_a_connection_without_an_answer_is_no_sign_of_that_beside_one_that_has_had_one(ends_first):
    """Browsers connect in advance, and the target ends what stays idle."""
    with relayed_to(on_request(s=silent)) as running:
        with dial(running.address) as idle:
            idle.sendall(b"s")
            target = running.target.connection()
            with dialled(running, 1) as (client,):
                eventually(lambda: running.count().down)
                if ends_first == "the one with an answer":
                    client.close()
                    eventually(lambda: running.count().ended == 1)
                target.shutdown(socket.SHUT_WR)
                assert how_it_ends(idle) == ("eof", b"")
                idle.close()
                eventually(lambda: running.count().ended)
        settled(running, 2)
    assert running.lines == []  # what is to be found out is by now


def test_a_client_that_leaves_at_once_is_no_sign_of_an_unreachable_target(simulation):
    with using_sessions(simulation.plane, QUIET_SECONDS=0.2) as running:
        assert exchange(running.address) == b""  # it has ended its input, and the Node follows
        for _ in range(5):
            dial(running.address).close()
            client = dial(running.address)
            client.sendall(b"x")
            reset_close(client)
        eventually(lambda: running.count().waiting == running.count().open == 0)
    assert running.lines == []


def test_when_the_node_ends_first_that_is_passed_on_at_once_and_asked_about_each_two_seconds():
    with relayed_to(source(5), QUIET_SECONDS=60) as running:
        began = time.monotonic()
        for _ in range(10):
            assert knock(running.address) == ("eof", pattern(5))
        settled(running, 10)
        eventually(lambda: asked(running.plane, "get") >= 1)
        assert asked(running.plane, "get") <= 1 + (time.monotonic() - began) / 2
        assert running.forwarder.over is None and len(running.plane.issued) == 1


@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["the first", "a further one"])
def test_a_session_that_is_revoked_amid_a_connection_ends_the_run_at_once(simulation, renew, which):
    with using_sessions(simulation.plane, renew=renew) as running, dialled(running, 2) as clients:
        simulation.plane.revoke(simulation.plane.issued[which], "policy_violation")
        assert running.why() == "the session was revoked (policy_violation)"
        assert type(running.forwarder.over) is plexctl.SessionRevoked
        assert how_it_ends(clients[which])[1] == b""
        assert knock(running.address) == ("reset", b"") and len(simulation.plane.issued) == 2
        eventually(lambda: not simulation.plane.active())  # while a COMMAND goes on


def test_a_session_that_is_revoked_before_its_node_has_a_listener_ends_the_run_too():
    with relayed_to(late=[0, 60], renew=True) as running, dialled(running, 2, served=1):
        running.plane.revoke(eventually(lambda: running.plane.issued[1:])[0])
        assert running.why() == "the session was revoked (operator_request)"


def test_a_session_that_is_revoked_while_nobody_uses_it_is_found_out_within_a_minute(simulation):
    with using_sessions(simulation.plane, renew=True, RECHECK_SECONDS=1) as running:
        simulation.plane.revoke(simulation.plane.issued[0])
        assert "revoked (operator_request)" in running.why()
        assert asked(simulation.plane, "get") == 1 and len(simulation.plane.issued) == 1


def test_a_session_that_is_gone_ends_the_run(simulation):
    simulation.plane.script("get", problem("resource_not_found"))
    with using_sessions(simulation.plane, renew=True) as running:
        simulation.node.refuse(simulation.plane.issued[0])
        assert knock(running.address) == ("reset", b"")
        assert "the session is gone" in running.why()


def test_a_gateway_that_knows_no_session_ends_no_run(simulation):
    simulation.plane.script("get", Answer(502), *[Answer(404, raw=b"<html>")] * 20)
    with using_sessions(simulation.plane, GONE_SECONDS=0, ASK_SECONDS=0) as running:
        for _ in range(3):
            running.forwarder.first.ask()
            running.forwarder.first.await_answer()
        assert visit(running.address) and running.forwarder.over is None
        assert [line.split()[2] for line in running.lines] == ["502", "404"]  # once for each status
        simulation.node.refuse(simulation.plane.issued[0])
        assert knock(running.address) == ("reset", b"") and running.forwarder.over is None  # who knows why
        eventually(lambda: running.said("a connection was not served: cannot connect to the listener"))


def test_a_node_that_comes_back_elsewhere_is_found_again(simulation):
    with using_sessions(simulation.plane, verbose=True, ASK_SECONDS=0) as running:
        for number in (1, 2):
            simulation.node.restart()
            assert visit(running.address)
            settled(running, number)
            assert asked(simulation.plane, "get") == number
        assert len(running.said("new listener endpoint")) == 2 and len(simulation.plane.issued) == 1


def test_a_new_endpoint_is_tried_once_and_one_that_leads_nowhere_does_no_harm():
    with relayed_to(direct=True, establish=False, ASK_SECONDS=0) as running:
        good, running.plane.endpoint = running.plane.endpoint, "127.0.0.1:9"
        running.forwarder.establish()
        for endpoint, asks in (("127.0.0.1:%d" % quiet_port(), 2), ("nowhere.invalid:80", 1)):
            before, running.plane.endpoint = asked(running.plane, "get"), endpoint
            assert knock(running.address) == ("reset", b"")
            assert asked(running.plane, "get") - before == asks
        running.plane.endpoint = good
        assert visit(running.address) and len(running.said("not served")) == 1


def test_whom_several_sessions_turn_away_is_told_of_once(simulation):
    go = threading.Event()
    simulation.plane.script("get", *[hold(go)] * 3)
    with using_sessions(simulation.plane, minimum=3) as running:
        eventually(lambda: running.count().sessions == 3)
        for each in simulation.plane.issued:
            simulation.node.refuse(each)
        with dialled(running, 3, served=0) as clients:
            eventually(lambda: asked(simulation.plane, "get") == 3)  # so each has one
            go.set()
            assert [how_it_ends(client) for client in clients] == [("reset", b"")] * 3
        eventually(lambda: running.count().ended == 3)
        assert len(running.said("not served")) == len(running.lines) == 1


@pytest.mark.parametrize("step, attempts, options", [
    (reset, 3, {}), (problem("internal"), 1, dict(renew=True, REPLACE_SECONDS=0))],
    ids=["no answer", "an error, where the session may be replaced"])
def test_dials_that_fail_do_not_each_ask_the_control_plane_again(simulation, step, attempts, options):
    with using_sessions(simulation.plane, **options) as running:
        simulation.plane.script("get", *[step] * 99)
        simulation.node.refuse(simulation.plane.issued[0])
        began = time.monotonic()
        for _ in range(20):
            assert knock(running.address) == ("reset", b"")
        assert asked(simulation.plane, "get") <= attempts * (1 + (time.monotonic() - began) / 2)
        told = running.said("warning: ", "not served", simulation.plane.sessions[0].endpoint)
        assert len(told) == len(running.said("not served")) == 1 and running.forwarder.over is None


@pytest.mark.parametrize("renew", [False, True])
def test_a_listener_that_is_gone_for_long_ends_its_session(lone_plane, renew):
    """Without a word from the control plane; one line for all who are turned away."""
    with using_sessions(lone_plane, renew=renew, ASK_SECONDS=0.1, GONE_SECONDS=2) as running:
        attempts = 0
        with lasts(0 if renew else 2, 20):
            while not (running.said("the Node has closed") if renew else running.forwarder.over):
                assert knock(running.address) == ("reset", b"")
                attempts += 1
        if not renew:
            assert attempts > 5 and "has closed the session's listener" in running.why()
            assert len(running.said("not served")) == len(running.lines) == 1


def test_a_new_endpoint_ends_the_time_for_which_dials_were_refused(lone_plane):
    with using_sessions(lone_plane, ASK_SECONDS=0, GONE_SECONDS=0.5) as running:
        assert knock(running.address) == ("reset", b"")
        let_pass(0.5)
        lone_plane.endpoint = "127.0.0.1:%d" % quiet_port()
        assert knock(running.address) == ("reset", b"") and asked(lone_plane, "get") == 3
        assert running.forwarder.first.why is None


@pytest.mark.parametrize("asks", [False, True], ids=["", "an answer is on its way"])
def test_a_dial_of_a_session_that_is_over_does_not_hide_that_and_waits_for_no_answer(simulation, asks):
    with using_sessions(simulation.plane, renew=not asks, ASK_SECONDS=0) as running:
        session = running.forwarder.first
        if asks:
            simulation.plane.script("get", hold(60))
            session.ask()
            eventually(lambda: asked(simulation.plane, "get"))
            session.end(plexctl.SessionOver("enough"))
        else:
            expire(running)
        with lasts(0, 2), pytest.raises(plexctl.SessionOver, match="enough" if asks else "expired"):
            session.dial()
        assert asked(simulation.plane, "get") == asks


@pytest.mark.parametrize("is_first", [True, False])
def test_with_renew_an_answer_from_before_a_revocation_does_not_renew_the_session(
        simulation, monkeypatch, is_first):
    with using_sessions(simulation.plane, renew=True, ASK_SECONDS=60) as running:
        running.forwarder.first.ask()
        assert running.forwarder.first.await_answer()  # active
        if not is_first:  # refused before, when it was too young to be replaced
            simulation.node.refuse(simulation.plane.issued[0])
            assert knock(running.address) == ("reset", b"")
        simulation.plane.revoke(simulation.plane.issued[0])
        monkeypatch.setattr(plexctl, "REPLACE_SECONDS", 0)
        assert knock(running.address) == ("reset", b"") and len(simulation.plane.issued) == 1
        assert not is_first or "was revoked" in running.why()


@pytest.mark.parametrize("when", ["at once", "after each connection"])
def test_a_node_that_refuses_everybody_costs_no_session_per_attempt(simulation, when):
    def a_third_was_issued():
        if when == "at once":
            assert knock(running.address) == ("reset", b"")
        else:
            attempt(running.address)
        for each in list(simulation.node.connections):
            simulation.node.refuse(each)
        assert len(simulation.plane.issued) <= 1 + (time.monotonic() - began) / 2
        return len(simulation.plane.issued) == 3

    if when == "at once":
        simulation.plane.node, simulation.plane.endpoint = None, "127.0.0.1:9"
    began = time.monotonic()
    with using_sessions(simulation.plane, renew=True, ASK_SECONDS=0, GONE_SECONDS=0,
                        REPLACE_SECONDS=2) as running:
        eventually(a_third_was_issued)
        assert len(running.said("the Node has closed")) == len(running.lines) == 1


def test_after_a_refusal_one_more_session_is_asked_for_after_each_pause():
    supply = plexctl.Supply(limit=4, minimum=1)
    supply.hold_back(0, 1000.0, 60)
    assert [supply.count_allowed(1000.0 + each) for each in (0, 59, 60, 119, 120, 300)] == [0, 0, 1, 1, 2, 4]


def test_a_session_runs_out_by_the_server_s_clock_and_not_by_ours():
    with relayed_to(clock_offset=-3600, ttl=3) as late, relayed_to(clock_offset=3600, ttl=3) as early:
        for running in (late, early):
            assert 0 < running.forwarder.seconds_left() <= 4 and visit(running.address)
        for running in (late, early):
            error = eventually(lambda: running.forwarder.over)  # noqa: B023
            assert (str(error), error.exit_code) == ("the session expired", 1)
            assert knock(running.address) == ("reset", b"")


def expire(running):
    """The time of a session is up, by our clock alone."""
    running.forwarder.first.expires_on = plexctl.elapsed_seconds()


@pytest.mark.parametrize("why", ["it has expired", "its listener is gone"])
def test_a_renewal_follows_the_revocation_of_the_old_session(why):
    """At its expiry a connection is reset; one that meets the Node's own cap goes to the new session."""
    with relayed_to(session_limit=1, renew=True, REPLACE_SECONDS=0) as running:
        running.plane.script("revoke", hold(0.5))
        if why == "it has expired":
            with dialled(running, 1) as (client,):
                expire(running)
                with lasts(0, 5):
                    assert how_it_ends(client) == ("reset", b"")
            eventually(lambda: running.said("the session expired; the next connection gets a new one"))
            eventually(lambda: not running.count().sessions)
            assert len(running.plane.issued) == 1  # nobody needs one yet
        else:
            running.node.refuse(running.plane.issued[0])
        assert visit(running.address) and running.forwarder.over is None and not running.said("not served")
        assert len(running.plane.issued) == 2 and running.plane.active() == running.plane.issued[1:]


@pytest.mark.parametrize("own_ttl, asked_for, more", [(100, 0, 0), (1800, 50, 0), (1800, 50, 1000)],
                         ids=["the server's TTL", "a TTL", "more than the TTL"])
def test_without_renew_the_run_is_over_when_the_first_session_s_time_is_up(own_ttl, asked_for, more):
    with relayed_to(ttl=own_ttl, ttl_seconds=asked_for) as running, dialled(running, 1):
        running.forwarder.first.expires_on += more
        let_pass(2)
        with dial(running.address) as client:
            chat(client, 1)
        first, second = [each.body.get("requested_ttl_seconds", 0) for each in running.plane.requests
                         if each.operation == "issue"]
        assert first == asked_for and 20 < second <= (asked_for or own_ttl) - (0 if more else 2)
        expire(running)
        assert running.why() == "the session expired"


@pytest.mark.parametrize("renew", [False, True])
def test_one_session_that_ends_otherwise_is_one_less_and_the_last_one_the_end(simulation, renew):
    with using_sessions(simulation.plane, renew=renew, ASK_SECONDS=0.1) as running:
        with dialled(running, 2) as clients:
            simulation.plane.revoke(simulation.plane.issued[0], "idle_timeout")
            eventually(lambda: running.said("the session expired (idle_timeout)"))
            chat(clients[1], 1)
            assert running.forwarder.over is None and running.count().sessions == 1
            simulation.plane.revoke(simulation.plane.issued[1], "idle_timeout")
            if not renew:
                eventually(lambda: running.forwarder.over)
                return
            eventually(lambda: not running.count().sessions)
        assert visit(running.address) and running.forwarder.over is None


@pytest.mark.parametrize("name, code", [("forbidden", 4), ("rebac_denied", 77), ("unauthenticated", 3),
                                        ("session_limit_exceeded", 1)])
def test_a_renewal_that_the_server_refuses_ends_it(simulation, name, code):
    with using_sessions(simulation.plane, renew=True) as running:
        simulation.plane.script("issue", problem(name))
        expire(running)
        eventually(lambda: not running.count().sessions)
        assert knock(running.address) == ("reset", b"")
        assert running.why() and running.forwarder.over.exit_code == code
        assert asked(simulation.plane, "issue") == 2


def test_a_first_session_that_fails_when_it_is_ready_ends_the_run(simulation):
    with using_sessions(simulation.plane, establish=False, renew=True) as running:
        running.ledger.say = raising(MemoryError())
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(plexctl.PlexctlError):
            pool.submit(running.forwarder.establish).result(15)


def test_a_session_whose_node_refuses_does_not_take_every_client():
    with relayed_to(limit=2, minimum=2) as running:
        eventually(lambda: running.count().sessions == 2)
        running.node.refuse(running.plane.issued[0])
        served = collections.Counter(attempt(running.address) for _ in range(200))
        assert served[True] >= served[False], served


def test_a_revocation_of_one_of_the_first_sessions_ends_the_run_whatever_failed_before(simulation):
    simulation.node.late = [60, 1, 60]
    simulation.plane.script("issue", problem("session_limit_exceeded"))
    with using_sessions(simulation.plane, establish=False, minimum=3, limit=3) as running, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:
        establishing = pool.submit(running.forwarder.establish)
        eventually(lambda: running.forwarder._first_failure and len(simulation.plane.issued) == 2)
        simulation.plane.revoke(simulation.plane.issued[0])
        assert "revoked" in running.why()
        running.forwarder.stop()
        with contextlib.suppress(plexctl.PlexctlError):
            establishing.result(15)


def test_at_the_node_s_own_cap_all_who_wait_get_sessions_at_once():
    with relayed_to(limit=3, renew=True) as running:
        with dialled(running, 3):
            pass
        eventually(lambda: not running.relays())
        for carrier in running.forwarder._carriers:
            carrier.session.ready_on -= plexctl.REPLACE_SECONDS
        for each in list(running.plane.issued):
            running.node.refuse(each)
        running.node.late = 3
        with lasts(3, 6.5), dialled(running, 3):  # not one after another
            pass


def test_a_listener_that_refuses_now_and_again_is_not_asked_about_each_time(lone_plane):
    port = quiet_port()
    lone_plane.endpoint = "127.0.0.1:%d" % port
    with using_sessions(lone_plane) as running:
        before, began = asked(lone_plane, "get"), time.monotonic()
        for _ in range(10):
            with listening_socket(port) as listener, dial(running.address) as client:
                client.sendall(b"x")
                with listener.accept()[0] as accepted:
                    accepted.sendall(accepted.recv(1))
                    assert client.recv(1) == b"x"
            assert knock(running.address)[0] == "reset"
        assert asked(lone_plane, "get") - before <= 2 + (time.monotonic() - began) / plexctl.ASK_SECONDS


def test_a_question_that_hangs_does_not_keep_a_session_from_being_replaced():
    with relayed_to(renew=True, RECHECK_SECONDS=0.5) as running:
        running.plane.script("get", hold(threading.Event()))
        assert visit(running.address) and eventually(lambda: asked(running.plane, "get"))
        running.forwarder.first.ready_on -= plexctl.REPLACE_SECONDS
        running.node.refuse(running.plane.issued[0])
        assert visit(running.address) and len(running.plane.issued) == 2


def test_a_session_that_is_named_again_after_its_revocation_is_revoked_once():
    go = threading.Event()
    with ControlPlane() as plane, concurrent.futures.ThreadPoolExecutor(2) as pool:
        ledger = plexctl.Ledger(create_client(plane, plane.bearer), PROJECT_ID, print)
        plane.script("issue", cut_off, hold(go))
        issuing = pool.submit(ledger.issue, session_request())
        eventually(lambda: asked(plane, "issue") == 2)
        leaving = pool.submit(ledger.leave)
        eventually(lambda: sum(plane.revocations().values()) == 1)
        go.set()
        with pytest.raises(plexctl.PlexctlError):
            issuing.result(15)
        leaving.result(15)
        assert set(plane.revocations().values()) == {1}


@pytest.mark.parametrize("what", ["a failure that may pass", "one behind it", "no room", "no thread"])
def test_a_session_that_is_stuck_is_not_the_end_of_the_run(what):
    with relayed_to(on_request(s=silent), session_limit=1 if what == "no room" else None,
                    FAILED_PAUSE_SECONDS=0.5, STUCK_SECONDS=4) as running:
        client = dial(running.address)
        client.sendall(b"s")
        fill(client)
        reset_close(client)
        eventually(lambda: running.said("not used any more"))
        if what == "one behind it":  # it is given back
            eventually(lambda: running.plane.revocations() and not running.forwarder._carriers, 20)
        if what in ("a failure that may pass", "one behind it"):
            running.plane.script("issue", *[reset] * 3)
        with no_more_threads() if what == "no thread" else contextlib.ExitStack(), \
                dial(running.address) as waiting:
            eventually(lambda: running.said("no further session for now"))
            if what == "no room":
                assert talk(waiting)  # once the stuck one is given back
            if what == "one behind it":
                assert how_it_ends(waiting)[0] == "reset"
        eventually(lambda: attempt(running.address), 20)  # one that comes too early is reset
        assert running.forwarder.over is None and len(running.lines) == 2


@pytest.mark.parametrize("what, words", [
    ("server", "for now"), ("rate limit", "for now"), ("thread", "cannot start a thread"),
    ("late Node", "no further session for now: the Node reported no listener")])
def test_a_renewal_that_fails_for_now_fails_alone(what, words):
    answers = {"server": reset, "rate limit": problem("session_limit_exceeded", headers=AT_ONCE)}
    with relayed_to(renew=True, FAILED_PAUSE_SECONDS=1, wait_seconds=0.5,
                    late=[0, 60, 0] if what == "late Node" else 0) as running:
        if what in answers:
            running.plane.script("issue", *[answers[what]] * 3)
        with no_more_threads() if what == "thread" else contextlib.ExitStack():
            expire(running)
            eventually(lambda: not running.count().sessions)
            assert knock(running.address) == ("reset", b"")
        eventually(lambda: attempt(running.address), 20)
        assert running.forwarder.over is None
        eventually(lambda: len(running.said(words)) == 1)


def test_a_client_is_reset_before_its_session_is_revoked_where_memory_runs_out(simulation):
    go = threading.Event()
    simulation.plane.script("revoke", hold(go))
    with using_sessions(simulation.plane) as running:
        running.forwarder.first.dial = raising(MemoryError())
        assert knock(running.address) == ("reset", b"") and "given up after MemoryError" in running.why()
        assert running.count().ended == 1 and not running.plane.revoked
        go.set()


@pytest.mark.parametrize("told, last", [("AB", "A"), ("A", "a"), ("BA", "A")])
def test_a_session_is_owed_as_it_was_written_last_and_what_else_was_told_is_given_back(
        lone_plane, monkeypatch, told, last):
    def issue(_request, on_issued):
        for each in told:
            on_issued(each)
        return types.SimpleNamespace(session_id=last, expires_at="then")

    client, given_back = create_client(lone_plane), []
    monkeypatch.setattr(client, "issue", issue)
    monkeypatch.setattr(client, "revoke", lambda _project, each, _seconds: given_back.append(each))
    ledger = plexctl.Ledger(client, PROJECT_ID, lambda line: None)
    ledger.issue(session_request())
    assert given_back == ["B"] * ("B" in told)
    ledger.give_back(last)
    assert given_back[-1] == last


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_session_that_comes_after_the_end_is_revoked(lone_plane, is_kept):
    go = threading.Event()
    lone_plane.script("issue", hold(go))
    ledger = plexctl.Ledger(create_client(lone_plane, lone_plane.bearer), PROJECT_ID, pytest.fail)
    ledger.is_kept = is_kept
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        issuing = pool.submit(ledger.issue, session_request())
        lone_plane.wait_for(lambda: lone_plane.requests)
        ledger.leave(0.1)
        assert ledger.settle() == ["a session may have been issued, it will expire on its own"]
        go.set()
        with pytest.raises(plexctl.Cancelled):
            issuing.result(15)
    assert lone_plane.revoked == lone_plane.issued != []
    assert ledger.settle() == ledger.list_kept() == []


def test_every_session_of_a_busy_run_is_revoked_once_and_once_only(simulation):
    with using_sessions(simulation.plane, minimum=2, limit=8) as running, dialled(running, 6):
        assert len(simulation.plane.issued) == 6
    assert simulation.plane.active() == []


# ---- tests: what the tests with processes share --------------------------------------------------

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def proxy_address(process):
    return parse_document(process.ready(2), "text")["local_addr"]


def revoked_once(plane, sessions=1):
    """So many sessions were issued, and each was revoked once."""
    assert len(plane.issued) == sessions, plane.describe()
    assert plane.revocations() == collections.Counter(plane.issued), plane.describe()
    assert sorted(plane.revoked) == sorted(plane.issued), plane.describe()


@contextlib.contextmanager
def running_proxy(simulation, *flags, **popen):
    """(process, address) of a proxy, which ends by SIGTERM."""
    with start(simulation, "--proxy", *flags, **popen) as process:
        yield process, proxy_address(process)
        process.send_signal(signal.SIGTERM)
        ends_by(process, signal.SIGTERM, 10)


def has_no_bad_word(text):
    """No traceback, and nothing else of Python's."""
    assert not re.search("Traceback|Exception ignored|Fatal Python|error: internal error", text), text
    return True


def error_of(result):
    """The one error line among the lines of stderr."""
    err = result.err if isinstance(result, Result) else result.stderr
    errors = [line for line in err.splitlines() if line.startswith("plexctl: error: ")]
    assert len(errors) == 1 and has_no_bad_word(err), err
    return errors[0]


def ends_by(process, signum, seconds=3.0):
    """The process ends by that signal, in that time, and without an error on stderr."""
    with lasts(0, seconds):
        result = process.finish(12)
    assert result.returncode == -signum, process.describe()
    assert has_no_bad_word(result.stderr) and "plexctl: error" not in result.stderr, result.stderr
    return result


def unread(fd):
    """How many bytes wait in a pipe."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]


@pytest.fixture
def make_pipe():
    """make_pipe() -> (reader, writer), which block; make_pipe(full=True): it takes no byte more."""
    with contextlib.ExitStack() as stack:
        def make(full=False):
            reader, writer = [open(fd, mode, 0) for fd, mode in zip(os.pipe(), ("rb", "wb"))]
            for file in (reader, writer):
                stack.enter_context(file)
            os.set_blocking(writer.fileno(), not full)
            while full and writer.write(b"x" * 4096):
                pass
            os.set_blocking(writer.fileno(), True)
            return reader, writer
        yield make


# ---- tests: signals ------------------------------------------------------------------------------

STATES = {  # what is to be seen then
    "issuing": lambda at: at.plane.requests,
    "waiting for the Node": lambda at: asked(at.plane, "get"),
    **dict.fromkeys(("reading --token-file", "reading --ca-file", "reading stdin"),
                    lambda at: not unread(at.reader.fileno())),
    **dict.fromkeys(("idle", "4 carried and 20 waiting"), lambda at: at.process.out),
    "stdio": lambda at: "hello" in at.process.out,
    **dict.fromkeys(("stdout full", "stderr full"), lambda at: at.plane.issued),
    "revealing, stderr full": lambda at: at.log.exists() and at.log.read_text(),
}
OTHER_SIGNALS = (3, 10, 12, 14, 16, 24, 26, 27, 29, 30, 34, 50, 64) if LINUX else ()  # SIGQUIT to SIGRTMAX


@contextlib.contextmanager
def plexctl_while(state, tmp_path, make_pipe, more=(), **popen):
    """(simulation, process, go, sessions): a process in one of STATES; go() lets the answer go."""
    with contextlib.ExitStack() as stack:
        simulation, answer = stack.enter_context(Simulation()), threading.Event()
        stack.callback(answer.set)
        plane, log, sessions, flags = simulation.plane, tmp_path / "log", 1, ["--proxy", *more]
        reader, writer = make_pipe()
        if state == "issuing":
            plane.script("issue", hold(answer))
        elif state == "waiting for the Node":
            plane.endpoint_on = "never"
        elif state.startswith("reading"):
            sessions = 0
            if state == "reading stdin":
                flags += ["--token-file", "-"]
            else:
                fifo = str(tmp_path / "fifo")
                os.mkfifo(fifo, 0o600)
                reader = writer = stack.enter_context(open(fifo, "r+b", 0))
                flags += ["--server", "https://localhost:1", state.split()[1], fifo]
            writer.write(b"psk_")
        elif state == "stdio":
            flags[0] = "--stdio"
            writer.write(b"hello")
        elif state == "revealing, stderr full":
            flags[0] = "--reveal-secrets"
            popen.update(stderr=make_pipe(full=True)[1], env={"PLEXCTL_AUDIT_LOG": str(log)})
        elif state.endswith("full"):
            flags.append("-v")
            popen[state.split()[0]] = make_pipe(full=True)[1]
        process = stack.enter_context(start(simulation, *flags, stdin=reader, **popen))
        at = types.SimpleNamespace(plane=plane, process=process, reader=reader, log=log)
        eventually(lambda: STATES[state](at), 20, process.describe)
        if state == "4 carried and 20 waiting":
            sessions = 4
            for _ in range(24):
                stack.enter_context(dial(proxy_address(process))).sendall(b"hello")
            simulation.target.wait_for(lambda: simulation.target.accepted == 4)
        yield simulation, process, answer.set, sessions


@pytest.mark.parametrize("state, signals", [(state, (signum,)) for signum in SIGNALS for state in STATES] + [
    (state, (signum,)) for signum in OTHER_SIGNALS for state in ("waiting for the Node", "idle", "stdio")] + [
    (state, (signum, signal.SIGTERM)) for signum in SIGNALS[:2]  # in quick succession
    for state in ("issuing", "waiting for the Node", "4 carried and 20 waiting")])
def test_every_signal_revokes_and_ends_it_without_a_core_file(state, signals, tmp_path, make_pipe):
    def may_dump_core():
        resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)

    with plexctl_while(state, tmp_path, make_pipe, cwd=str(tmp_path), preexec_fn=may_dump_core) as (
            simulation, process, go, sessions):
        for signum in signals:
            process.send_signal(signum)
        go()
        with process.changed:  # nobody else asks for the status meanwhile
            status = eventually(lambda: os.waitpid(process.pid, os.WNOHANG)[1], 3, process.describe)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in signals, (status, process.err)
        assert not os.WCOREDUMP(status) and not glob.glob(str(tmp_path / "*core*"))
        err = process.finish().stderr
        assert has_no_bad_word(err) and "plexctl: error" not in err and (state != "stdio" or err == ""), err
        revoked_once(simulation.plane, sessions)


@pytest.mark.skipif(not LINUX, reason="watches /proc")
@pytest.mark.parametrize("when", [
    "while revoking", "at once", "and a third one", "while another one is issued"])
def test_a_second_signal_does_not_wait_for_a_server_that_hangs_and_names_what_is_left(simulation, when):
    plane = simulation.plane
    with start(simulation, "--proxy") as process, contextlib.ExitStack() as stack:
        address = proxy_address(process)
        del FORWARDED[:]  # the server hangs
        plane.script("revoke", hold(60))
        if when == "while another one is issued":
            plane.script("issue", hold(30))
            for _ in range(2):
                stack.enter_context(dial(address))
            plane.wait_for(lambda: asked(plane, "issue") == 2)
        process.send_signal(signal.SIGINT)
        if when != "at once":
            plane.wait_for(lambda: asked(plane, "revoke"))
        for _ in range(2 if when == "and a third one" else 1):
            eventually(lambda: not signal_mask(process.pid, "ShdPnd"))  # the one before is seen
            process.send_signal(signal.SIGINT)
        err = ends_by(process, signal.SIGINT, 8 if "issued" in when else 3.5).stderr
    warnings = [line for line in err.splitlines() if plane.issued[0] in line]
    assert len(warnings) == 1 or when == "and a third one" and not warnings, err
    for line in warnings:
        assert line.startswith("plexctl: warning: session %s is not revoked" % plane.issued[0])
    assert ("a session may have been issued" in err) == ("issued" in when), err


def test_a_signal_that_came_before_the_run_s_end_decides(simulation):
    simulation.plane.ttl = 3
    with start(simulation, "--proxy") as process:
        proxy_address(process)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)  # the session expires, and nobody sees it
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert "ended by SIGTERM" in ends_by(process, signal.SIGTERM).stderr


def signal_mask(pid, name):
    """A line of /proc/PID/status: SigCgt (caught), SigIgn (ignored), ShdPnd (pending)."""
    with open("/proc/%d/status" % pid) as stream:
        return int(re.search(name + r":\s*([0-9a-f]+)", stream.read()).group(1), 16)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(simulation, signum):
    other = signal.SIGTERM if signum != signal.SIGTERM else signal.SIGHUP
    with start(simulation, "--proxy", preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN)) as process:
        address = proxy_address(process)
        process.send_signal(signum)
        assert visit(address)
        process.send_signal(other)
        ends_by(process, other)


@pytest.mark.skipif(not LINUX, reason="watches /proc")
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_right_at_the_start_leaves_no_traceback(simulation, signum):
    for delay_ms in (0, 3, 7, 12, 18, 25, 35, 50, 80, 120, 180):
        with start(simulation, "--proxy", program=["-v", PLEXCTL]) as process:
            if signum == signal.SIGINT:  # while Python starts and compiles, its own handler tells of it
                process.wait_for_output("import 'gettext'")  # argparse needs it: plexctl has begun
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay_ms / 1000)
            process.send_signal(signum)
            ends_by(process, signum)


@pytest.mark.parametrize("state, clients", [("idle", 0), ("idle", 2), ("stdio", 0)],
                         ids=["idle", "another one is being opened", "stdio"])
def test_keep_session_revokes_nothing(state, clients, tmp_path, make_pipe):
    with plexctl_while(state, tmp_path, make_pipe, more=["--keep-session"]) as (simulation, process, _, _), \
            contextlib.ExitStack() as stack:
        simulation.node.late = 60
        for _ in range(clients):
            stack.enter_context(dial(proxy_address(process)))
        eventually(lambda: not clients or asked(simulation.plane, "get"))
        process.send_signal(signal.SIGTERM)
        err = ends_by(process, signal.SIGTERM).stderr
    assert not asked(simulation.plane, "revoke")
    kept = ["session %s is kept until %s" % (each.id, each.expires_at) for each in simulation.plane.sessions]
    assert [err.count(each) for each in kept] == [1] * (1 + bool(clients))


@pytest.mark.skipif(not LINUX, reason="how much a terminal takes")
def test_a_terminal_that_takes_a_part_of_a_line_does_not_keep_it_from_revoking(simulation):
    """As of an ssh whose network is gone: poll() says that it can be written to, and a write blocks."""
    def has_room(seconds):
        return select.select([], [stderr], [], seconds)[1]

    def is_full():
        assert visit(address)  # which -v has lines about
        return not has_room(0.3)

    master, slave = pty.openpty()
    with open(master, "rb", 0) as screen, open(slave, "wb", 0) as stderr:
        os.set_blocking(slave, False)
        while has_room(0.3):
            stderr.write(b"x" * 512)
        while not has_room(0):
            screen.read(512)
        os.set_blocking(slave, True)
        with start(simulation, "--proxy", "-v", stderr=stderr, start_new_session=True) as process:
            address = proxy_address(process)
            eventually(is_full, 60)
            process.send_signal(signal.SIGTERM)
            ends_by(process, signal.SIGTERM, 5)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_right_before_the_end_does_not_belie_what_was_done(simulation, signum):
    result = run(simulation, program=prepared(
        "import os; end = os._exit\n"
        "os._exit = lambda status: (os.kill(os.getpid(), %d), end(status))" % signum))
    assert (result.status, result.err) == (0, "")
    assert simulation.plane.issued and not asked(simulation.plane, "revoke")


@pytest.mark.parametrize("mode", [[], ["--stdio"]], ids=["print", "stdio"])
def test_a_session_that_may_exist_is_told_of_after_a_signal_too(lone_plane, mode):
    lone_plane.script("issue", lambda *request: time.sleep(1.5) or drop(*request))
    with start(lone_plane, *mode) as process:
        lone_plane.wait_for(lambda: lone_plane.requests)
        process.send_signal(signal.SIGTERM)  # it stops listening to the answer
        result = process.finish()
    assert result.returncode == -signal.SIGTERM and MAY_EXIST in result.stderr


@pytest.mark.skipif(not LINUX, reason="watches /proc")
@pytest.mark.parametrize("module", ["argparse", "collections", "socket", "threading"])
def test_ctrl_c_before_the_handlers_stand_has_its_default_action(simulation, module):
    """A KeyboardInterrupt amid an import may be lost in a weak reference's callback."""
    slowly = "import os, pkgutil, runpy, sys, time" + ON_IMPORT % (
        module, "os.write(2, b'importing'); time.sleep(60)") + """
sys.modules.pop(%r, None)
runpy.run_path(%r, run_name="__main__")""" % (module, PLEXCTL)
    with start(simulation, program=prepared(slowly),
               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        process.wait_for_output("importing")
        assert not signal_mask(process.pid, "SigCgt") >> signal.SIGINT - 1 & 1
        process.send_signal(signal.SIGINT)
        assert ends_by(process, signal.SIGINT).stderr == "importing"
    assert simulation.plane.requests == []


def test_a_library_user_s_own_handlers_stay(cli, lone_plane):
    def note(handler, _plane):
        seen.append(signal.getsignal(signal.SIGUSR1))
        handler.answer_really()

    seen = []
    lone_plane.script("issue", note)
    before = signal.signal(signal.SIGUSR1, print)
    try:
        assert forward_to(cli, lone_plane).status == 0
        assert seen == [print] and signal.getsignal(signal.SIGUSR1) == print
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not LINUX, reason="/proc")
def test_it_waits_with_descriptors_beyond_what_select_takes(simulation):
    def take_1100():
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        for _ in range(1100):
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)

    result = run(simulation, preexec_fn=take_1100, close_fds=False)
    assert (result.status, result.err) == (0, "")


# ---- tests: exit codes ---------------------------------------------------------------------------

EXIT_CODES = [  # id, status, flags, answers to IssueSession, sessions issued, words of the error
    ("printed", 0, [], [], 1, ""),
    ("server error", 1, [], [problem("internal")], 0, "500"),
    ("no endpoint", 1, ["--wait-seconds", "0"], [], 1, "listener"),
    ("address in use", 1, ["--proxy", "--local-addr", "127.0.0.1:IN_USE"], [], 0, "in use"),
    ("no such flag", 2, ["--nonsense"], [], 0, "--nonsense"),
    ("COMMAND is missing", 2, ["--"], [], 0, "after --"),
    ("insecure token file", 3, ["--token-file", PLEXCTL], [], 0, "permissions"),
    ("unauthorized", 3, [], [problem("unauthenticated")], 0, "401"),
    ("step up", 3, ["--proxy"], [problem("step_up_required")], 0, STEP_UP_ACR),
    ("forbidden", 4, [], [problem("forbidden")], 0, "403"),
    ("rebac", 77, ["--stdio"], [problem("rebac_denied")], 0, "insufficient_relation"),
    ("rebac, the other one has no endpoint", 77, "--proxy --min-sessions 2 --wait-seconds 2".split(),
     [problem("rebac_denied")], 1, "insufficient_relation"),
    ("not executable", 126, ["--", PLEXCTL], [], 0, PLEXCTL),
    ("a directory", 126, ["--", HERE], [], 0, HERE),
    ("a FIFO", 126, ["--", "FIFO"], [], 0, "fifo"),
    ("not found", 127, ["--", "no-such-command-anywhere"], [], 0, "no-such-command-anywhere"),
    ("not found by path", 127, ["--", "/nonexistent/command"], [], 0, "/nonexistent/command"),
]


@pytest.mark.parametrize("name, status, flags, answers, sessions, words", EXIT_CODES,
                         ids=[row[0] for row in EXIT_CODES])
def test_a_process_ends_with_the_published_exit_code(
        simulation, tmp_path, name, status, flags, answers, sessions, words):
    plane, fifo = simulation.plane, str(tmp_path / "fifo")
    os.mkfifo(fifo, 0o700)
    plane.script("issue", *answers)
    if "no endpoint" in name:
        plane.endpoint_on = "never"
    in_use = str(simulation.target.address[1])
    result = run(plane, *[flag.replace("IN_USE", in_use).replace("FIFO", fifo) for flag in flags])
    assert result.status == status, result.err
    if status:
        assert words in error_of(result) and result.out == ""
        revoked_once(plane, sessions)
    else:
        assert parse_document(result.out, "text")["session_id"] == plane.issued[0]
        assert result.err == "" and not asked(plane, "revoke")
    if not sessions and not answers:
        assert plane.requests == []


@pytest.mark.parametrize("ignored", [[], [signal.SIGCHLD]], ids=["", "SIGCHLD was ignored"])
@pytest.mark.parametrize("end, status", [
    ("", 0), ("sys.exit(7)", 7), ("sys.exit(77)", 77), ("sys.exit(255)", 255)] + [
    ("os.kill(os.getpid(), signal.%s)" % name, 128 + getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGKILL", "SIGSEGV")], ids=shown)
def test_the_exit_status_is_that_of_command(simulation, end, status, ignored):
    program = ("import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
               "print(signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, flush=True);" + end)
    result = run(simulation, "--", sys.executable, "-c", program, preexec_fn=lambda: [
        signal.signal(signum, signal.SIG_IGN) for signum in ignored])
    assert (result.status, result.out) == (status, "True\n") and "error" not in result.err, result


def limited(what, limit, folder):
    """How to run it with so many descriptors; or threads, the limit on which counts all that a user runs."""
    if what == "threads":
        return becoming(40000 + os.getpid() % 20000, folder, limit)
    return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))


def glibc_has_aborted(simulation, stderr):
    """Up to 3.8 a thread's end opens libgcc_s, the first time, and aborts where it finds no descriptor."""
    found = sys.version_info < (3, 9) and "libgcc_s.so.1 must be installed" in stderr
    for session_id in simulation.plane.active() if found else ():
        simulation.plane.revoke(session_id)
        del FORWARDED[:]  # plexctl could not
    return found


@pytest.mark.skipif(not LINUX, reason="counts descriptors")
@pytest.mark.parametrize("what, least", [
    ("descriptors", 6), pytest.param("threads", 1, marks=[pytest.mark.once, BECOMES_OTHERS])])
@pytest.mark.parametrize("mode", ["print", "stdio", "COMMAND"])
def test_too_few_descriptors_or_threads_are_an_error_in_one_line_that_leaves_nothing(
        simulation, lone_copy, tmp_path, mode, what, least):
    plane, path = simulation.plane, tmp_path / "socket"
    unix = ["--local-addr", "unix:%s" % path] * (mode == "COMMAND" and what == "descriptors")
    for limit in range(least, 40):
        result = run(plane, *unix * (limit % 2), *MODES[mode], **limited(what, limit, lone_copy))
        assert not path.exists() and "any local user" not in result.err
        if result.status == 0:
            assert len(plane.active()) == (mode == "print")
            return
        if not glibc_has_aborted(simulation, result.err):
            assert result.status in (1, 126) and error_of(result), (limit, result.err)
            assert plane.active() == [], (limit, result.err)
    raise AssertionError("not even with 39")


MODES = {"print": [], "proxy": ["--proxy"], "stdio": ["--stdio"], "COMMAND": ["--", "true"],
         "COMMAND that speaks": ["--", "sh", "-c", "trap '' PIPE; echo hello || exit 1"],
         "help": ["-h"], "version": ["--version"], "usage": ["--host", ""],
         "credentials": ["--token-file", "/nonexistent"]}
NO_DEVICES = ["unshare", "-m", "sh", "-c",
              'mount -t tmpfs none /dev && test ! -e /dev/null && exec "$@"', "sh"]
CLOSED = ["<&-", "<&- 2>&-", "<&- >&-", "<&- >&- 2>&-"]


@FULL
@pytest.mark.parametrize("redirections, within", [(words, []) for words in CLOSED + [
    ">/dev/full", ">&-", "2>/dev/full", "2>&-", ">/dev/full 2>/dev/full", ">&- 2>&-", "unread pipe"]] + [
    (words, NO_DEVICES) for words in [""] + CLOSED],
    ids=lambda value: value if isinstance(value, str) else "no /dev/null" if value else "")
@pytest.mark.parametrize("mode", sorted(MODES))
def test_what_cannot_be_printed_is_an_error_that_revokes_and_no_path_ends_in_120(
        make_pipe, mode, redirections, within):
    if within and (not ROOT or not shutil.which("unshare") or run_words(within + ["true"]).status):
        pytest.skip("no mount namespaces here")
    shell, popen = redirected(redirections), {}
    if "pipe" in redirections:
        reader, writer = make_pipe()
        reader.close()
        shell, popen = [], dict(stdout=writer)
    with Simulation(source(10), ttl=1 if mode == "proxy" else 1800) as simulation:  # its end is the proxy's
        result = run(simulation, "-v", *MODES[mode], within=within + shell, **popen)
        has_output = not popen and not re.search("(?<!2)>", redirections)
        wanted = {"proxy": 1, "COMMAND": 0, "usage": 2, "credentials": 3}.get(mode, 0 if has_output else 1)
        assert result.status == wanted, (result, simulation.plane.describe())
        assert has_no_bad_word(result.err)
        if mode in ("print", "proxy", "help", "version") and not has_output and result.err:
            assert "standard output" in error_of(result)
        left = mode == "print" and has_output
        assert simulation.plane.revocations() == collections.Counter([] if left else simulation.plane.issued)
        if left:
            assert parse_document(result.out, "text")["session_id"] == simulation.plane.issued[0]


@pytest.mark.parametrize("words, status, flags", [
    ("the session expired", 1, ["--ttl-seconds", 4]),
    ("the session was revoked (policy_violation)", 1, ["--renew"]),
    ("IssueSession: 403", 4, ["--ttl-seconds", 4, "--renew"])], ids=["expired", "revoked", "not renewed"])
def test_a_reason_is_said_once_in_a_run_and_has_its_exit_code(simulation, words, status, flags):
    simulation.plane.script("issue", PASS, problem("forbidden"))
    with start(simulation, "--proxy", "-v", *flags) as process:
        address = proxy_address(process)
        with dial(address) as client:
            chat(client, 1)
            if "revoked" in words:
                simulation.plane.revoke(simulation.plane.issued[0], "policy_violation")
            assert how_it_ends(client)[1] == b""
        if status == 4:
            process.wait_for_output("next connection gets a new one")
            assert knock(address)[1] == b""
        result = process.finish()
    assert result.returncode == status and words in error_of(result)
    assert result.stderr.count(words) == result.stderr.count("plexctl: 1 connection, ") == 1, result.stderr


def test_a_defect_is_told_with_its_line_and_nothing_that_it_was_given(cli, lone_plane, monkeypatch):
    monkeypatch.setattr(plexctl.ControlPlane, "issue", raising(KeyError(BEARER)))
    result = forward_to(cli, lone_plane)
    failed(result, 1, "please report it: KeyError")
    assert re.search("internal error in line [1-9][0-9]*,", result.err)


@pytest.mark.skipif(not LINUX, reason="counts descriptors")
@pytest.mark.parametrize("what, kinder", [("descriptors", False)] + [
    pytest.param("threads", kinder, marks=[pytest.mark.once, BECOMES_OTHERS]) for kinder in (False, True)])
def test_a_proxy_with_too_few_descriptors_or_threads_serves_or_says_why_not(lone_copy, what, kinder):
    limits, data = (8, 9, 10, 11, 12, 13, 16, 20, 28, 32, 33, 34, 36, 40), pattern(4 << 20)
    with Simulation(echo_of(len(data)), kinder=kinder) as simulation:  # the target ends first, not a client
        for limit in limits if what == "descriptors" else range(1, 12):
            got = b""
            with start(simulation, "--proxy", **limited(what, limit, lone_copy)) as process:
                process.wait_for(lambda: process.out.count("\n") == 2 or process.poll() is not None, 20)
                if process.out:
                    with contextlib.suppress(ConnectionResetError), dial(proxy_address(process)) as client, \
                            while_sending(client, data):
                        got = b"".join(chunks(client))  # TimeoutError: it hangs
                    assert got == data or got == b"" and ("warning: " in process.err or what != "threads")
                    process.send_signal(signal.SIGTERM)
                result = process.finish()
                if not process.out and glibc_has_aborted(simulation, result.stderr):
                    continue
                assert result.returncode == (-signal.SIGTERM if process.out else 1), process.describe()
                assert process.out or error_of(result)
                assert len(result.stderr.splitlines()) <= 4 and has_no_bad_word(result.stderr), result.stderr
            assert "any local user" not in result.stderr and simulation.plane.active() == [], limit
    assert got == data  # in the end


# ---- tests: COMMAND ------------------------------------------------------------------------------

@pytest.mark.parametrize("local, proxies", [
    (None, {}), ("[::1]:0", {"no_proxy": "a.example,b"}), (None, {"NO_PROXY": "a.example"}), ("unix:", {})],
    ids=["", "IPv6, no_proxy", "NO_PROXY", "unix"])
def test_command_is_told_where_the_port_is_and_no_secret(simulation, tmp_path, local, proxies):
    """Its own connections to a loopback address go to no proxy; it has stdin, and stdout for itself."""
    path = str(tmp_path / "s")
    flags = [] if not local else ["--local-addr", local if local != "unix:" else local + path]
    program = "import json, os, sys; print(json.dumps([sys.stdin.read(), sys.argv[1:], dict(os.environ)]))"
    command = [sys.executable, "-c", program, "{host}", "{addr},{addr}", "{other}{}", "PLEXCTL"]
    command += [] if local == "unix:" else ["a{port}b"]
    result = run(simulation, *flags, "--", *command, input=b"typed\n" * 20000,
                 env=dict(MARK="kept", http_proxy="http://proxy.example:3128", **proxies))
    assert result.status == 0 and "0 connections, 0 B up, 0 B down" in result.err, result.err
    typed, arguments, environment = json.loads(result.out)
    assert typed == "typed\n" * 20000
    host, port, addr = [environment["PLEXCTL_LOCAL_" + name] for name in ("HOST", "PORT", "ADDR")]
    if local == "unix:":
        assert (host, port, addr) == (path, "", local + path)
    else:
        assert host == ("::1" if local else "127.0.0.1")
        assert addr == ("[::1]:%s" if local else "127.0.0.1:%s") % port and int(port) > 0
        for name in ("no_proxy", "NO_PROXY"):
            names = environment[name].replace("[", "").replace("]", "").split(",")
            assert {host, *",".join(proxies.values()).split(",")} - {""} <= set(names), environment
    assert arguments == [host, "%s,%s" % (addr, addr), "{other}{}", "PLEXCTL"] + ["a%sb" % port] * bool(port)
    assert "PLEXSPHERE_TOKEN" not in environment and environment["MARK"] == "kept"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_command_has_the_limits_that_there_were_and_none_of_our_descriptors(simulation):
    """And no core file of ours has a token: 1 byte holds for a core_pattern that is a pipe, too."""
    def set_limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400))
        resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))

    def core_limits():
        with open("/proc/%d/limits" % process.pid) as stream:
            return re.search(r"core file size +(\S+) +(\S+)", stream.read()).groups()

    program = ("import os, resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE),"
               "*resource.getrlimit(resource.RLIMIT_CORE),"
               "sorted(os.listdir('/proc/self/fd'), key=int)[:-1], flush=True); input()")
    with start(simulation, "--", sys.executable, "-c", program, stdin=subprocess.PIPE,
               preexec_fn=set_limits) as process:
        assert process.ready() == "200 400 4096 8192 ['0', '1', '2']\n"
        eventually(lambda: core_limits() == ("1", "8192"))  # once COMMAND is started
        process.stdin.close()
        process.finish()


SEND_AND_VANISH = ("import hashlib, os, socket, sys; size = int(sys.argv[1]);"
                   "s = socket.create_connection(('127.0.0.1', int(os.environ['PLEXCTL_LOCAL_PORT'])));"
                   "s.sendall(hashlib.shake_128(b'0').digest(size)); os._exit(0)")
# a close with something unread is a reset: so it is with the tickets of TLS 1.3
LEAVE_UNREAD = SEND_AND_VANISH.replace("s.sendall", "s.recv(1, socket.MSG_PEEK); s.sendall").replace(
    "os._exit", "import time; time.sleep(0.4); os._exit")


@pytest.mark.parametrize("size, pause_seconds, each_seconds, more", [
    (5, 0, 0, []), (3 * MIB, 0, 0, []), (MIB, 1.2, 0, []), (5 * MIB, 1.2, 0, []),
    (MIB // 2, 1.2, 0, "unread"), (5 * MIB, 1.2, 0, ["--local-addr", "0.0.0.0:0"]), (6 * MIB, 0, 0.003, [])],
    ids=["5 B", "3 MiB", "1 MiB to a target that pauses", "5 MiB to a target that pauses",
         "and it left something unread", "5 MiB where nobody can say whether it is gone",
         "6 MiB that take longer than 2 s"])
def test_what_command_sent_just_before_its_end_arrives(size, pause_seconds, each_seconds, more):
    received, leaves_unread = bytearray(), more == "unread"
    record = recording(received, pause_seconds, each_seconds, b"hello" if leaves_unread else b"")
    with Simulation(record) as simulation:
        target = simulation.target
        if pause_seconds + each_seconds:  # no Node in between, whose buffers would take everything at once
            leave_out_the_node(simulation)
        # a client that is gone before it is accepted has no owner any more, and would be turned away
        flags = [] if leaves_unread else more + ["--allow-other-users"]
        result = run(simulation, *flags, "--", sys.executable, "-c",
                     LEAVE_UNREAD if leaves_unread else SEND_AND_VANISH, size)
        assert result.status == 0, result.err
        target.wait_for(lambda: target.ends)
        assert (len(received), target.ends) == (size, ["reset" if leaves_unread else "eof"])
        assert received == pattern(size)


def test_a_revocation_amid_the_delivery_at_command_s_end_is_told():
    with relayed_to(silent, direct=True, RECHECK_SECONDS=0.5) as running:
        with dial(running.address) as client:
            client.sendall(bytes(100 * 1024))
            eventually(lambda: running.count().up == 100 * 1024)
        eventually(lambda: running.count().ended == 1)
        run = types.SimpleNamespace(wait=time.sleep, ledger=running.ledger)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            delivering = pool.submit(plexctl.Run.deliver, run, running.forwarder)
            running.plane.revoke(running.plane.issued[0])
            delivering.result(20)
        assert running.forwarder.over is not None and running.said("may not have arrived: the session was")


@pytest.mark.parametrize("count, flags, options", [
    (8, ["--local-addr", "0.0.0.0:0", "--max-sessions", 1], {}),
    pytest.param(300, ["--allow-other-users"], dict(one_at_a_time=False), marks=pytest.mark.skipif(
        not LINUX, reason="a backlog of a thousand"))], ids=["where nobody can say who has closed", "300"])
def test_every_short_connection_of_command_arrives_also_those_that_wait_at_its_end(count, flags, options):
    program = ("import os, socket\nfor _ in range(%d):\n    socket.create_connection("
               "('127.0.0.1', {port})).sendall(bytes(100))" % count)
    received = []
    with Simulation(lambda connection, _: received.append(b"".join(chunks(connection))),
                    **options) as simulation, lasts(0, 1.5 * count):  # not QUIET_SECONDS for each
        result = run(simulation, *flags, "--", sys.executable, "-c", program)
        assert result.status == 0 and "may not have arrived" not in result.err, result.err
        eventually(lambda: received == [bytes(100)] * count)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_just_behind_command_s_end_does_not_change_its_status(simulation, signum):
    # so long after it, sent by a process that outlives it: plexctl may just have seen the end
    program = "import os, time\nif os.fork():\n    os._exit(7)\nos.close(1)\nos.close(2)\ntime.sleep(%s)\n" \
              "os.kill(%d, %d)"
    for delay in (0.01, 0.03, 0.06, 0.09):
        with start(simulation, "--", sys.executable, "-c", "import os\nexec(%r %% (%s, os.getppid(), %d))" % (
                program, delay, signum)) as process:
            assert process.finish().returncode == 7


@pytest.mark.parametrize("local, seconds, is_told", [("127.0.0.1:0", 8, False), ("0.0.0.0:0", 40, True)],
                         ids=["", "where nobody can say whether it is gone"])
def test_who_goes_on_sending_behind_command_does_not_keep_the_proxy(simulation, local, seconds, is_told):
    simulation.target.serve = sink
    with start(simulation, "--local-addr", local, "--", "/bin/sh", "-c",
               "echo $PLEXCTL_LOCAL_PORT; read line", stdin=subprocess.PIPE) as process:
        with dial("127.0.0.1:" + process.ready(), 30) as client, lasts(0, seconds):
            client.sendall(b"x")
            simulation.target.wait_for(lambda: simulation.target.accepted)
            process.stdin.close()
            with pytest.raises(ConnectionError):
                for _ in range(800):
                    client.sendall(b"x")
                    time.sleep(0.05)
        assert process.finish().returncode == 1, process.describe()  # read found the end
        assert ("COMMAND has ended, and what it sent may not have arrived" in process.err) == is_told


@BECOMES_OTHERS
def test_a_unix_socket_that_cannot_be_removed_costs_command_no_status(simulation, lone_copy):
    uid = 60000 + os.getpid() % 5000
    with tempfile.TemporaryDirectory(prefix="plexctl-test-") as folder:
        os.chown(folder, uid, uid)
        result = run(simulation, "--local-addr", "unix:%s/socket" % folder, "--", "/bin/sh", "-c",
                     "chmod 500 %s; exit 7" % folder, **becoming(uid, lone_copy))
        assert result.status == 7, result.err


def test_connections_that_still_wait_when_command_has_ended_are_told_of(simulation, tmp_path):
    program = ("import os, socket; path = os.environ['PLEXCTL_LOCAL_HOST']\n"
               "held = socket.socket(socket.AF_UNIX); held.connect(path); held.send(b'x'); held.recv(1)\n"
               "told, tell = os.pipe()\n"
               "if os.fork(): os.read(told, 1); os._exit(0)\n"  # who goes on has the connection
               "late = socket.socket(socket.AF_UNIX); late.connect(path); late.sendall(b'important')\n"
               "late.close(); os.write(tell, b'x'); os.close(1); os.close(2); input()")
    simulation.node.late = [0, 60]
    with start(simulation, "--max-sessions", "2", "--local-addr", "unix:%s" % (tmp_path / "s"), "--",
               sys.executable, "-c", program, stdin=subprocess.PIPE) as process:
        assert process.finish(40).returncode == 0
        assert "COMMAND has ended, and what it sent may not have arrived" in process.err, process.err


@READS_PROC
def test_a_signal_ends_the_wait_for_a_slow_target_after_command():
    with Simulation(recording(bytearray(), each_seconds=0.3)) as simulation:
        leave_out_the_node(simulation)
        program = SEND_AND_VANISH.replace("os._exit", "print(os.getpid(), flush=True); os._exit")
        with start(simulation, "--allow-other-users", "--", sys.executable, "-c", program, MIB) as process:
            command_pid = int(process.ready())
            eventually(lambda: not os.path.exists("/proc/%d" % command_pid))
            process.send_signal(signal.SIGTERM)
            assert process.finish(4).returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.parametrize("signum, status", [(signum, 5) for signum in SIGNALS] + [
    (signum, 128 + signum) for signum in SIGNALS + OTHER_SIGNALS])
def test_a_signal_is_handed_on_to_command_and_those_of_the_terminal_are_its_own(
        simulation, terminal, tmp_path, signum, status):
    program = ("import os, signal, sys\n"
               "def leave(signum, frame): sys.exit(5)\n"
               "signal.signal(%d, leave if %d == 5 else signal.SIG_DFL)\n"
               "os.write(1, b'ready\\n')\n"
               "while True: signal.pause()" % (signum, status))
    keys, screen = {signal.SIGINT: b"\x03", signal.SIGQUIT: b"\x1c"}, terminal(80)
    with start(simulation, "--", sys.executable, "-c", program, cwd=str(tmp_path),
               **screen.controlling()) as process:
        process.wait_for(lambda: b"ready" in screen.seen)
        if signum in keys:
            screen.type(keys[signum])
        else:
            process.send_signal(signum)
        assert process.finish(5).returncode == status, process.describe()
    text = screen.read()
    assert "interrupted" not in text and "COMMAND ended" in text


@pytest.mark.skipif(not LINUX, reason="/dev/stdin")
@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "T", "T.link"])
def test_a_token_on_standard_input_is_not_handed_to_command(simulation, tmp_path, name):
    path = write_private(tmp_path / "token", simulation.plane.bearer + "\n")
    os.symlink(path, path + ".link")
    program = "import os, sys; os.lseek(0, 0, 0); sys.stdout.write(sys.stdin.read())"
    with open(path) as stream:
        result = run(simulation, "--token-file", name.replace("T", path), "--", sys.executable, "-c", program,
                     env=NO_TOKEN, stdin=stream)
    assert (result.status, result.out) == (0, "")


def test_hangups_reach_command_as_often_as_they_come_and_a_second_sigterm_ends_it(simulation):
    program = """
import os, signal
def tell(signum, frame):
    os.write(1, b"%d\\n" % signum)
for signum in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(signum, tell)
os.write(1, b"%d\\n" % os.getpid())
while True:
    signal.pause()
"""
    signals = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2] * 4 + [signal.SIGTERM, signal.SIGHUP]
    with start(simulation, "--", sys.executable, "-c", program) as process:
        command_pid = int(process.ready())
        try:
            for count, signum in enumerate(signals, 2):
                process.send_signal(signum)
                process.ready(count)
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            process.ready(len(signals) + 2)  # COMMAND hears of that one too, and is left to itself
        finally:
            os.kill(command_pid, signal.SIGKILL)
        result = ends_by(process, signal.SIGTERM)
    assert [int(line) for line in result.stdout.split()][1:] == signals + [signal.SIGTERM]


def test_signals_that_were_handed_on_do_not_count_once_command_has_ended(simulation):
    simulation.plane.script("revoke", hold(1.0))
    with start(simulation, "--", "sh", "-c", "trap '' HUP; echo up; sleep 1") as process:
        process.wait_for_output("up")
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.1)  # two that come at once are one
        simulation.plane.wait_for(lambda: simulation.plane.revocations())
        process.send_signal(signal.SIGTERM)
        assert process.finish().returncode == 0


# ---- tests: stdio --------------------------------------------------------------------------------

def stdio(simulation, *flags, **popen):
    """plexctl --stdio to its end; a character of its Result is a byte."""
    return run(simulation, "--stdio", *flags, encoding="latin-1", **popen)


@contextlib.contextmanager
def piped_stdio(simulation, make_pipe, *flags, **how):
    """plexctl --stdio between two pipes: (process, what writes to its stdin, what reads its stdout)."""
    (stdin, to_stdin), (from_stdout, stdout) = make_pipe(), make_pipe()
    with start(simulation, "--stdio", *flags, stdin=stdin, stdout=stdout, **how) as process:
        stdin.close()
        stdout.close()
        yield process, to_stdin, from_stdout


@contextlib.contextmanager
def socket_stdio(simulation, *streams, giver="inetd"):
    """plexctl --stdio with a connection of inetd or socat as these streams: (process, its other end)."""
    if giver == "inetd":
        with listening_socket() as listener:
            far, near = dial("127.0.0.1:%d" % listener.getsockname()[1]), listener.accept()[0]
    else:
        near, far = socket.socketpair()
        far.settimeout(20)
    with far, start(simulation, "--stdio", **dict.fromkeys(streams, near)) as process:
        near.close()
        yield process, far


@pytest.mark.parametrize("kinder", [False, True], ids=["real Node", "kinder Node"])
@pytest.mark.parametrize("size", [0, 1, 20 << 20], ids=["0 B", "1 B", "20 MiB"])
def test_stdio_carries_bytes_both_ways_at_once(size, kinder):
    data = pattern(size)
    with Simulation(echo_of(size) if size else echo, kinder=kinder) as simulation:
        result = stdio(simulation, input=data)
        assert (result.status, len(result.out), result.err) == (0, size, "")
        assert result.out == data.decode("latin-1")


def test_stdio_is_silent_but_for_errors_and_verbose_says_the_rest(simulation):
    simulation.target.serve = echo_of(5)
    simulation.plane.endpoint_on, simulation.plane.reads_before_endpoint = "read", 1
    assert stdio(simulation, input=b"hello").err == ""
    text = stdio(simulation, "-v", input=b"hello").err
    session = simulation.plane.sessions[1]
    assert "GET %s/%s: 200" % (SESSIONS_PATH, session.id) in text
    for words in ("waiting for the Node to report its listener",
                  "session %s: listener endpoint %s, expires at %s" % (
                      session.id, session.endpoint, session.expires_at),
                  "1 connection, 5 B up, 5 B down, ", "session %s released" % session.id):
        assert text.count(words) == 1, text
    assert all(line.startswith("plexctl: ") for line in text.splitlines())


def test_what_stdin_gives_arrives_also_when_nobody_reads_the_answer_any_more(make_pipe):
    data, heard = pattern(8 * MIB), bytearray()
    with Simulation(recording(heard, 0, 0.0005, b"hi"), kinder=True) as simulation, \
            piped_stdio(simulation, make_pipe) as (process, to_stdin, from_stdout):
        assert from_stdout.read(2) == b"hi"
        to_stdin.write(data)
        from_stdout.close()
        to_stdin.close()
        assert process.finish().returncode == 0
        simulation.target.wait_for(lambda: simulation.target.ends)
    assert heard == data


@pytest.mark.parametrize("kind", ["a half-closed target", "a reset on stdin"])
def test_stdin_that_is_cut_off_does_not_look_complete(kind):
    with Simulation(silent, kinder=True) as simulation, socket_stdio(simulation, "stdin") as (process, far):
        target = simulation.target.connection()
        if kind == "a half-closed target":
            target.shutdown(socket.SHUT_WR)
        far.sendall(b"half of an upl")
        let_pass(0.5)
        if kind == "a reset on stdin":
            reset_close(far)
        assert process.finish().returncode == 1
        assert how_it_ends(target) == ("reset", b"half of an upl")


def test_a_client_with_one_socket_for_all_gets_the_error_too(simulation):
    simulation.plane.node, simulation.plane.endpoint = None, "127.0.0.1:%d" % quiet_port()
    with socket_stdio(simulation, "stdin", "stdout", "stderr") as (process, far):
        assert b"plexctl: error: " in b"".join(chunks(far))
        assert process.finish().returncode == 1


@pytest.mark.parametrize("giver", ["inetd", "socat"])
def test_a_client_with_one_socket_for_both_sees_the_target_s_end_and_may_go_on(giver):
    heard = bytearray()
    with Simulation(recording(heard, greeting=b"goodbye", ends=True), kinder=True) as simulation:
        with socket_stdio(simulation, "stdin", "stdout", giver=giver) as (process, far):
            assert b"".join(chunks(far)) == b"goodbye"
            far.sendall(b"and more")
            far.close()
            assert process.finish().returncode == 0, process.describe()
        assert heard == b"and more"


@pytest.mark.parametrize("giver, serve", [("inetd", source(64 * MIB)), ("socat", source(64 * MIB)), (
    "inetd", silent)], ids=["inetd", "socat", "the target takes nothing"])
def test_a_client_with_one_socket_for_both_that_leaves_is_an_error(giver, serve):
    with Simulation(serve, kinder=serve is silent) as simulation:
        with socket_stdio(simulation, "stdin", "stdout", giver=giver) as (process, far):
            if serve is silent:
                fill(far)
                reset_close(far)
            else:
                read_exactly(far, MIB)
                far.close()
            result = process.finish(8)
        # where it has read all that there was, its close is no reset
        words = "the connection ended" if serve is silent else "the connection ended|nobody reads it"
        assert result.returncode == 1 and re.search(words, error_of(result))


def test_a_stream_that_is_cut_off_is_reset_also_where_stdout_alone_is_a_socket():
    with Simulation(source(64 * MIB)) as simulation:
        with socket_stdio(simulation, "stdout") as (process, far):
            read_exactly(far, MIB)
            process.send_signal(signal.SIGTERM)
            assert how_it_ends(far)[0] == "reset"
            ends_by(process, signal.SIGTERM)


@pytest.mark.parametrize("kinder, hangs_up", [(False, False), (True, False), (False, True)],
                         ids=["real Node", "kinder Node", "ssh hangs up"])
def test_a_server_that_ends_first_loses_none_of_its_bytes_and_is_no_error(make_pipe, kinder, hangs_up):
    """ssh hangs up as soon as it has read the end of stdout; stdin is still open then."""
    with Simulation(source(3 << 20), kinder=kinder) as simulation:
        with piped_stdio(simulation, make_pipe) as (process, to_stdin, from_stdout):
            assert from_stdout.readall() == pattern(3 << 20)
            if hangs_up:
                process.send_signal(signal.SIGHUP)
            to_stdin.close()
            result = process.finish()
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("size, stdin", [(20 * MIB, "stays open"), (5, "has ended"), (MIB, "has ended")])
def test_a_stdout_closed_by_its_reader_is_an_error(make_pipe, size, stdin):
    (out_reader, out_writer), (in_reader, in_writer) = make_pipe(), make_pipe()
    with Simulation(source(size)) as simulation:
        if stdin == "has ended":
            in_writer.close()
            out_reader.close()
        with start(simulation, "--stdio", stdin=in_reader, stdout=out_writer) as process:
            out_writer.close()
            if stdin == "stays open":
                assert pattern(1000).startswith(out_reader.read(1000))
                out_reader.close()
            result = process.finish()
        assert result.returncode == 1 and "standard output" in error_of(result), process.describe()


def test_stdio_ends_with_its_session_although_the_node_takes_nothing(make_pipe):
    from_stdout, stdout = make_pipe()
    from_stdout.close()
    with Simulation(silent, ttl=3) as simulation, tempfile.TemporaryFile() as stdin:
        leave_out_the_node(simulation)
        stdin.truncate(MIB)  # the kernels take all of it
        with start(simulation, "--stdio", stdin=stdin, stdout=stdout) as process:
            result = process.finish()
        assert result.returncode == 1 and error_of(result)


def test_stdio_without_a_thread_is_an_error(simulation, make_pipe):
    statements = """
import threading
def start(thread):
    if getattr(sys._getframe(2).f_locals.get("function"), "__name__", "") == "carry":
        raise RuntimeError("can't start new thread")
    really_start(thread)
really_start, threading.Thread.start = threading.Thread.start, start
"""
    result = run(simulation, "--stdio", program=prepared(statements), stdin=make_pipe()[0])
    failed(result, 1, "cannot start a thread")


@pytest.mark.parametrize("way", ["pipes", "a socket"])
def test_a_reset_by_the_target_is_an_error_of_stdio_and_on_a_socket_a_reset(make_pipe, way):
    with Simulation(resetter(6, says=5), kinder=True) as simulation:  # a Node of today makes an end of it
        if way == "pipes":
            with piped_stdio(simulation, make_pipe) as (process, to_stdin, from_stdout):
                assert from_stdout.read(5) == bytes(5)
                to_stdin.write(b"123456")
                result = process.finish()
        else:
            with socket_stdio(simulation, "stdin", "stdout") as (process, far):
                assert read_exactly(far, 5) == bytes(5)
                far.sendall(b"123456")
                assert how_it_ends(far) == ("reset", b"")
                result = process.finish()
        assert result.returncode == 1 and "connection ended" in error_of(result)


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_the_status_flags_of_stdin_and_stdout_are_left_alone(simulation, make_pipe, blocking):
    (stdin, to_stdin), (from_stdout, stdout), data = make_pipe(), make_pipe(), pattern(2 << 20)
    for file in (stdin, stdout):  # the process has the same open files
        os.set_blocking(file.fileno(), blocking)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, \
            start(simulation, "--stdio", stdin=stdin, stdout=stdout) as process:
        simulation.target.wait_for(lambda: simulation.target.accepted)  # both pipes stay empty till here
        to_stdin.write(data[:1])
        assert select.select([from_stdout], [], [], 20)[0] and from_stdout.read(1) == data[:1]
        assert os.get_blocking(stdin.fileno()) == os.get_blocking(stdout.fileno()) == blocking
        stdout.close()
        rest = pool.submit(from_stdout.readall)
        to_stdin.write(data[1:])
        to_stdin.close()
        assert rest.result(20) == data[1:] and process.finish().returncode == 0, process.describe()


def test_stdio_on_a_terminal_leaves_it_as_it_was(terminal):
    with Simulation(source(10)) as simulation:
        screen = terminal(80)
        before = termios.tcgetattr(screen.slave), fcntl.fcntl(screen.slave, fcntl.F_GETFL)
        with start(simulation, "--stdio", **screen.controlling()) as process:
            assert process.finish(10).returncode == 0  # nobody has to press a key
        assert (termios.tcgetattr(screen.slave), fcntl.fcntl(screen.slave, fcntl.F_GETFL)) == before
        text = screen.read()
        assert pattern(10).decode("latin-1") in text.replace("\r\n", "\n") and "\x1b[" not in text


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_stdio_has_no_local_port_and_the_proxy_has_one(simulation, make_pipe):
    def listening_ports(pid):
        with open("/proc/net/tcp") as tcp, open("/proc/net/tcp6") as tcp6:
            rows = [line.split() for line in tcp.readlines() + tcp6.readlines()]
        listening = {"socket:[%s]" % row[9]: int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"}
        opened = map(os.readlink, glob.glob("/proc/%d/fd/*" % pid))
        return [listening[name] for name in opened if name in listening]

    with piped_stdio(simulation, make_pipe) as (process, to_stdin, _):
        simulation.target.wait_for(lambda: simulation.target.accepted)
        assert listening_ports(process.pid) == []
        to_stdin.close()
        process.finish()
    with running_proxy(simulation) as (process, address):
        assert address == "127.0.0.1:%d" % listening_ports(process.pid)[0]


@pytest.mark.parametrize("full", [False, True], ids=["it takes a part", "it takes nothing"])
def test_a_reader_that_pauses_does_not_keep_stdio_from_sending(make_pipe, full):
    """Standard output blocks."""
    (stdin, to_stdin), (_, stdout) = make_pipe(), make_pipe(full=full)
    with Simulation(silent) as simulation, \
            start(simulation, "--stdio", stdin=stdin, stdout=stdout) as process:
        target = simulation.target.connection()
        fill(target)
        target.settimeout(20)
        to_stdin.write(b"question")
        assert read_exactly(target, 8) == b"question"
        process.send_signal(signal.SIGTERM)
        process.finish()


@pytest.mark.parametrize("why, words, stdin", [
    ("down", "%s:%d" % (HOST, PORT), "stays open"), ("down", "--host and --port", "has ended"),
    ("down", "--host and --port", "stays open, and ssh hangs up at the end"),
    ("reset", "--host and --port", "stays open"),
    ("revoked", "the session was revoked", "stays open"),
    ("revoked", "the session was revoked", "stays open, and ssh hangs up at the end"),
    ("revoked", "the session was revoked", "stays open, and a question goes unanswered"),
    ("expired", "the session expired", "stays open")])
def test_stdio_says_why_it_ended_and_exits_1(make_pipe, why, words, stdin):
    often = prepared("import plexctl; plexctl.RECHECK_SECONDS = 0.5")
    with Simulation(early=-5, ttl=1 if why == "expired" else 1800) as simulation:
        if "question" in stdin:
            simulation.plane.script("get", hold(60))
        if why == "down":
            simulation.target.close()
        if why == "reset":
            leave_out_the_node(simulation)
            simulation.target.serve = resetter(5)
        with piped_stdio(simulation, make_pipe, program=often if "question" in stdin else [PLEXCTL]) as (
                process, to_stdin, from_stdout):
            if stdin == "has ended":
                to_stdin.close()
            if why in ("revoked", "reset"):
                to_stdin.write(b"hello")
            if why == "revoked":
                assert from_stdout.read(5) == b"hello"
                eventually(lambda: "question" not in stdin or asked(simulation.plane, "get"))
                simulation.plane.revoke(simulation.plane.issued[0])  # the Node ends the connection
            assert from_stdout.read(1) == b""
            if "ssh" in stdin:
                process.send_signal(signal.SIGHUP)
            result = process.finish()
    assert result.returncode == 1 and words in error_of(result), process.describe()
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("flags, signum, seconds", [
    (["--stdio"], signal.SIGINT, 60), (["--stdio"], signal.SIGTERM, 60), (["--stdio"], signal.SIGHUP, 2.5),
    (["--", "true"], signal.SIGINT, 60), (["--", "true"], signal.SIGTERM, 60)], ids=shown)
def test_a_signal_after_the_end_cuts_a_revocation_short_but_for_ssh_s_hangup_and_is_no_accident(
        simulation, flags, signum, seconds):
    simulation.target.serve = source(10)
    simulation.plane.script("revoke", hold(seconds))
    with start(simulation, *flags) as process:  # stdin has ended
        simulation.plane.wait_for(lambda: asked(simulation.plane, "revoke"))
        process.send_signal(signum)
        result = process.finish(8)
    if signum == signal.SIGHUP:
        assert (result.returncode, result.stderr) == (0, "")
    else:
        del FORWARDED[:]  # the server hangs
        assert result.returncode in (0, -signum if flags != ["--stdio"] else 0), process.describe()
        assert "session %s is not revoked" % simulation.plane.issued[0] in result.stderr
        assert has_no_bad_word(result.stderr) and (flags != ["--stdio"] or result.stderr.count("\n") == 1)


def test_the_last_minutes_are_warned_of_where_somebody_wants_to_know(simulation, make_pipe):
    def proxy(*flags):
        process = stack.enter_context(start(simulation, "--proxy", *flags))
        assert visit(proxy_address(process))
        return process

    def stdio(*flags):
        process, to_stdin, from_stdout = stack.enter_context(piped_stdio(simulation, make_pipe, *flags))
        to_stdin.write(b"hello")
        assert from_stdout.read(5) == b"hello"
        return process

    minute, minutes = ["--ttl-seconds", 61], ["--ttl-seconds", 301]
    with contextlib.ExitStack() as stack:
        # those that say nothing would have had to say it before the others
        quiet = [proxy("--renew", *minute), proxy("--renew", *minutes), stdio(*minute)]
        warned = [(proxy(*minute), r"1m00|5\d"), (proxy(*minutes), r"5m00|4m5\d"),
                  (stdio("-v", *minute), r"1m00|5\d")]
        for process, _ in warned:
            process.wait_for_output("are left")
        let_pass(1.2)  # a turn of waiting
        for process, left in warned + [(each, "") for each in quiet]:
            process.send_signal(signal.SIGTERM)
            err = ends_by(process, signal.SIGTERM).stderr
            shape = r"plexctl: warning: (?:%s)s of the session are left\n" % left
            assert len(re.findall(shape, err)) == err.count("are left") == bool(left), err


# ---- tests: terminal -----------------------------------------------------------------------------

@pytest.fixture
def terminal():
    """terminal(columns) -> a pseudo-terminal; `seen` is all that was written to it so far."""
    class Terminal:
        def __init__(self, columns):
            self._master, self.slave = pty.openpty()
            fds.extend((self._master, self.slave))
            self._seen = bytearray()
            self.resize(columns)

        def resize(self, columns):
            fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

        @property
        def seen(self):
            while select.select([self._master], [], [], 0)[0]:
                self._seen.extend(os.read(self._master, 1 << 16))
            return self._seen

        def read(self):
            SEEN.append(("err", self.seen.decode("latin-1")))
            return SEEN[-1][1]

        def type(self, keys):
            os.write(self._master, keys)

        def controlling(self):
            """What makes it the controlling terminal of a process."""
            return dict(stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    fds = []
    yield Terminal
    for fd in fds:
        os.close(fd)


def rows_of(text, columns):
    """What stands on a terminal of that width, row by row: knows CR, LF, ESC[J and ESC[nA."""
    rows, row, column = [[]], 0, 0
    for token in re.findall(r"\x1b\[(?:\d+A|J)|[^\x1b]|\x1b", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token == "\x1b[J":
            del rows[row + 1:], rows[row][column:]
        elif token[0] == "\x1b":
            assert token.endswith("A"), "unknown sequence in %r" % text
            row -= int(token[2:-1])
        else:
            assert " " <= token <= "~", "unknown character in %r" % text
            if column == columns:
                row, column = row + 1, 0
            rows.extend([] for _ in range(row + 1 - len(rows)))
            rows[row].extend(" " * (column + 1 - len(rows[row])))
            rows[row][column] = token
            column += 1
        rows.extend([] for _ in range(row + 1 - len(rows)))
    return ["".join(each).rstrip() for each in rows]


@pytest.mark.parametrize("columns, drawn", [
    (40, "1 open, 0 waiting"), (80, "1 open, 0 waiting, 1 ended, 1 session, 2.0 KiB up, 2.0 KiB down"),
    (200, "1 open, 0 waiting, 1 ended, 1 session, 2.0 KiB up, 2.0 KiB down, %%s -> %s:%d" % (HOST, PORT))])
def test_the_live_line_is_one_line_cut_to_the_terminal_among_few_others(simulation, terminal, columns, drawn):
    screen = terminal(columns)
    simulation.plane.script("revoke", hold(2))
    with running_proxy(simulation, stderr=screen.slave) as (process, address):
        assert visit(address, b"x" * 2048)
        process.wait_for(lambda: b"0 open, 0 waiting, 1 ended" in screen.seen or columns < 200)
        with dial(address) as client:
            assert talk(client, b"hello")
            wanted = drawn.replace("%s", address)
            process.wait_for(lambda: screen.seen.count(wanted.encode()) >= 2)
            row = rows_of(screen.read(), columns)[-1]
            assert re.match(r"(30m00|29m5\d)s left, " + re.escape(wanted) + "$", row), row
    rows = rows_of(screen.read(), columns)
    left = "".join(row.ljust(columns) for row in rows).strip()  # three lines
    assert re.match(r"plexctl: forwarding %s to %s:%d; press Ctrl-C to stop +"
                    r"plexctl: 2 connections, .* ended by SIGTERM +"
                    r"plexctl: releasing the session$" % (address, HOST, PORT), left), rows


def test_the_live_line_follows_the_width_of_the_terminal(simulation, terminal):
    screen = terminal(200)
    with running_proxy(simulation, stderr=screen.slave) as (process, _):
        process.wait_for(lambda: b" -> " in screen.seen)
        drawn = len(rows_of(screen.read(), 200)[-1])
        screen.resize(30)  # the terminal wraps the old line: all its rows have to go
        process.wait_for(lambda: b"\x1b[1A" * ((drawn - 1) // 30) in screen.seen)
        assert screen.read().rsplit("\x1b[J", 1)[1].endswith("s left, 0 open")
        screen.resize(150)
        process.wait_for(lambda: screen.seen.count(b" -> ") > 1 and screen.seen.endswith(b":%d" % PORT))
        assert rows_of(screen.read().rsplit("\r", 1)[1], 150)[0].endswith(":%d" % PORT)


def test_quiet_leaves_errors_alone(simulation, terminal):
    screen = terminal(200)
    with running_proxy(simulation, "-q", "--local-addr", "0.0.0.0:0", stderr=screen.slave) as (_, address):
        assert visit("127.0.0.1:" + address.rsplit(":", 1)[1])
    assert screen.read() == ""
    simulation.plane.script("issue", problem("forbidden"))
    result = run(simulation, "-q")
    assert result.status == 4 and result.err == error_of(result) + "\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_ctrl_c_leaves_nothing_of_the_live_line_and_no_row_of_its_own(simulation, terminal, columns):
    """The terminal writes ^C where the line ends; in the last column that would begin another row."""
    screen = terminal(columns)
    with start(simulation, "--proxy", **screen.controlling()) as process:
        process.wait_for(lambda: b"0 open, 0 waiting" in screen.seen)
        screen.type(b"\x03")
        ends_by(process, signal.SIGINT)
    text = screen.read()
    rows = rows_of(text, columns)
    assert "^C" in text and "^C" not in "".join(rows) and "open, " not in "".join(rows), rows


@pytest.mark.parametrize("flags, program", [
    ([], [PLEXCTL]), (["--proxy"], [PLEXCTL]), ([], prepared("import os; del os.tcgetpgrp, os.getpgrp"))],
    ids=["print", "proxy", "print on Windows"])
def test_waiting_for_the_node_counts_the_seconds_in_one_line_and_print_mode_says_that_nothing_listens(
        simulation, terminal, flags, program):
    simulation.plane.endpoint_on, simulation.plane.reads_before_endpoint = "read", 3
    simulation.plane.script("issue", hold(1.5))
    screen = terminal(200)
    with start(simulation, *flags, program=program, stdin=screen.slave, stdout=screen.slave,
               stderr=screen.slave) as process:
        process.wait_for(lambda: b"LOCAL_ADDR" in screen.seen)
        if flags:
            process.send_signal(signal.SIGTERM)
        process.finish(5)
    text = screen.read()
    assert "waiting for the control plane: 1s" in text and re.search("waiting for the Node: [2-9]s", text)
    (said, header, row, *more), session = rows_of(text, 200), simulation.plane.sessions[0]
    assert said.startswith("plexctl: waiting for the Node to report its listener")
    assert header.startswith("LOCAL_ADDR  "), header  # with nothing of the live line in front of it
    local, *values = row.split()
    assert values == [session.endpoint, "%s:%d" % (HOST, PORT), session.id, session.expires_at]
    if not flags:
        line, = filter(None, more)
        for words in ("nothing listens on " + local, "connect to %s, or use --proxy" % session.endpoint,
                      "stays until " + session.expires_at):
            assert words in line


def test_off_a_terminal_there_are_plain_lines_of_connections_and_sessions_whatever_the_width(simulation):
    simulation.plane.endpoint_on, simulation.plane.reads_before_endpoint = "read", 1
    with running_proxy(simulation, "--verbose", env={"COLUMNS": "40"}) as (process, address):
        for number, size in enumerate((5, 3000), 1):
            assert visit(address, pattern(size))
            process.wait_for(lambda: process.err.count("connection closed") == number)  # noqa: B023
        let_pass(1.2)  # a turn of what would be the live line
    lines, session = process.err.splitlines(), simulation.plane.sessions[0]
    assert re.match(r"[ -~\n]+\Z", process.out + process.err) and "open, " not in process.err
    assert all(line.startswith("plexctl: ") for line in lines)
    shapes = [r"connection from 127\.0\.0\.1:\d+ to " + session.endpoint,
              r"connection closed: 5 B up, 5 B down",
              r"connection from 127\.0\.0\.1:\d+ to " + session.endpoint,
              r"connection closed: 2\.9 KiB up, 2\.9 KiB down",
              r"2 connections, 2\.9 KiB up, 2\.9 KiB down, \d+s: ended by SIGTERM"]
    found = [line[9:] for line in lines if "connection" in line]
    assert re.match("\n".join(shapes) + r"\Z", "\n".join(found)), found
    for words in ("waiting for the Node to report its listener", "session %s released" % session.id,
                  "session %s: listener endpoint %s, expires at %s" % (
                      session.id, session.endpoint, session.expires_at),
                  "POST %s: 201, " % SESSIONS_PATH):
        assert len([line for line in lines if words in line]) == 1, lines


@pytest.mark.parametrize("flags", [[], ["--proxy"]], ids=["print", "proxy"])
def test_on_a_terminal_narrower_than_the_table_there_is_a_line_per_column(simulation, terminal, flags):
    screen = terminal(40)
    with start(simulation, *flags, stdout=screen.slave) as process:
        process.wait_for(lambda: screen.seen.count(b"\n") >= 5)
        process.send_signal(signal.SIGTERM)
        process.finish()
    session, lines = simulation.plane.sessions[0], screen.read().replace("\r", "").splitlines()
    names, (local, *values) = zip(*(line.split() for line in lines))
    assert names == ("LOCAL_ADDR", "LISTENER_ENDPOINT", "TARGET", "SESSION_ID", "EXPIRES_AT")
    assert values == [session.endpoint, "%s:%d" % (HOST, PORT), session.id, session.expires_at]
    assert local.startswith("127.0.0.1:")
    assert len({line.index(value) for line, value in zip(lines, [local] + values)}) == 1


def test_the_live_line_counts_who_waits_and_is_wiped_before_any_other_line(simulation, terminal):
    screen = terminal(200)
    with running_proxy(simulation, "-v", "--max-sessions", 2, stderr=screen.slave) as (process, address):
        assert visit(address)
        process.wait_for(lambda: b"0 open, 0 waiting, 1 ended, 1 session, " in screen.seen)
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(dial(address)).sendall(b"hello")
            process.wait_for(lambda: b"2 open, 3 waiting, 1 ended, 2 sessions, " in screen.seen)
        process.wait_for(lambda: b"0 open, 0 waiting, " in screen.seen[screen.seen.rindex(b"3 waiting"):])
        process.wait_for(lambda: screen.seen.endswith(b":%d" % PORT))
        rows = rows_of(screen.read(), 200)
        assert all(row.startswith("plexctl: ") for row in rows[:-1]) and " -> " in rows[-1], rows
    rows = rows_of(screen.read(), 200)
    assert rows.pop() == "" and all(row.startswith("plexctl: ") for row in rows), rows
    warning, = [row for row in rows if "warning" in row]
    assert re.match(r"plexctl: warning: [123] connections? waits? until one closes: each needs a session "
                    r"\(--max-sessions is 2; a connection pool must not be larger\)\Z", warning), warning


def test_the_live_line_says_no_time_left_where_there_is_no_session(simulation, terminal):
    screen = terminal(200)
    with running_proxy(simulation, "--renew", "--ttl-seconds", 4, stderr=screen.slave) as (process, address):
        process.wait_for(lambda: re.search(rb"s left, 0 open, 0 waiting, 0 ended, 1 session, ", screen.seen))
        process.wait_for(lambda: re.search(rb"\x1b\[J0 open, 0 waiting, 0 ended, 0 sessions, ", screen.seen))
        assert visit(address)  # and the next connection has a session again
    assert not re.search("left, 0 open, 0 waiting, [01] ended, 0 sessions", screen.read())


@pytest.mark.parametrize("flags", [["--stdio"], ["--", "sleep", "1.5"]], ids=["stdio", "COMMAND"])
def test_a_terminal_that_is_somebody_else_s_has_no_live_line(simulation, terminal, flags):
    simulation.target.serve = echo_of(5)
    simulation.plane.endpoint_on, simulation.plane.reads_before_endpoint = "read", 2
    simulation.plane.script("revoke", hold(1.5))
    screen = terminal(200)
    with start(simulation, *flags, stdin=subprocess.PIPE, stderr=screen.slave) as process:
        process.stdin.write(b"hello")
        process.stdin.close()
        assert process.finish(20).returncode == 0
    text = screen.read()
    assert "\x1b" not in text and "waiting," not in text and "waiting for the Node: " not in text
    assert text == "" or flags != ["--stdio"]


# ---- tests: readiness ----------------------------------------------------------------------------

@pytest.mark.skipif(not LINUX, reason="abstract sockets, systemd")
@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_when_the_port_listens_and_when_it_ends(simulation, tmp_path, kind):
    name = str(tmp_path / "notify") if kind == "path" else "@plexctl-test-%d" % os.getpid()
    address = "127.0.0.1:%d" % quiet_port()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(name.replace("@", "\0", 1))
        bound.settimeout(5)
        with start(simulation, "--proxy", "--local-addr", address, env={"NOTIFY_SOCKET": name}) as process:
            assert bound.recv(99) == b"READY=1"
            assert visit(address, b"at once")
            status = bound.recv(999).decode()
            shape = (r"STATUS=\w+ left, \d open, \d waiting, \d ended, 1 session, \d B up, \d B down, "
                     r"%s -> %s:%d$" % (address, HOST, PORT))
            assert re.match(shape, status), status
            assert not select.select([bound], [], [], 1.5)[0]  # at most once a minute, though it has changed
            process.send_signal(signal.SIGTERM)
            assert bound.recv(99) == b"STOPPING=1"
            ends_by(process, signal.SIGTERM)
        assert not select.select([bound], [], [], 0)[0]
        assert run(simulation, "--", "true", env={"NOTIFY_SOCKET": name}).status == 0
        assert [bound.recv(99), bound.recv(99)] == [b"READY=1", b"STOPPING=1"]  # with COMMAND too


@pytest.mark.skipif(not LINUX, reason="systemd")
@pytest.mark.parametrize("flags", [["--proxy", "--ttl-seconds", 1], ["--", "true"]], ids=["proxy", "COMMAND"])
def test_a_notify_socket_where_nobody_listens_is_one_warning(simulation, tmp_path, flags):
    result = run(simulation, *flags, env={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert result.status == (flags[0] == "--proxy")  # its session is over
    lines = [line for line in result.err.splitlines() if "NOTIFY_SOCKET" in line]
    assert len(lines) == 1 and lines[0].startswith("plexctl: warning: NOTIFY_SOCKET: "), result.err


@READS_PROC
def test_the_descriptors_that_were_closed_lead_nowhere(simulation):
    with running_proxy(simulation, within=redirected("<&- 2>&-")) as (process, address):
        assert visit(address)
        for fd in (0, 2):
            assert os.readlink("/proc/%d/fd/%d" % (process.pid, fd)) == "/dev/null"


# ---- tests: what the Node's agent and others found -----------------------------------------------

@pytest.mark.parametrize("limit", [1, 4])
@pytest.mark.parametrize("where", ["a write", "a dial"])
def test_a_client_that_leaves_while_the_node_is_blocked_keeps_no_session(where, limit):
    """The Node reads neither its end nor its reset: only a revocation helps."""
    with relayed_to(on_request(x=silent), limit=limit) as running, dial_that_hangs() as hanging:
        plane, node = running.plane, running.node
        if where == "a dial":
            node.target_address = hanging.getsockname()
        client = dial(running.address)
        client.sendall(b"x")
        node.wait_for(lambda: node.busy(plane.issued[0]))
        if where == "a write":
            fill(client)
        (reset_close if where == "a write" else socket.socket.close)(client)
        eventually(lambda: running.said("warning: ", "is not used any more"))
        node.target_address = running.target.address
        for _ in range(3):
            with dial(running.address, 30) as following:
                chat(following, 1)
        plane.wait_for(lambda: plane.issued[0] in plane.revoked, 30)
        assert len(running.lines) == len(set(running.lines)) and len(plane.issued) < 4


@pytest.mark.parametrize("way", ["proxy", "stdio"])
def test_a_target_that_the_node_gives_up_on_is_named_however_late(make_pipe, way):
    with Simulation(dial_seconds=12) as simulation, dial_that_hangs() as hanging:
        simulation.node.target_address = hanging.getsockname()
        with start(simulation, "--" + way, stdin=make_pipe()[0]) as process:
            if way == "proxy":
                assert knock(proxy_address(process))[1] == b""
                process.wait_for_output("--host")
                process.send_signal(signal.SIGTERM)
            assert process.finish(40).returncode == (1 if way == "stdio" else -signal.SIGTERM)
        said = [line for line in process.err.splitlines() if "--host" in line]
        assert len(said) == 1 and all(word in said[0] for word in ("--port", HOST, str(PORT))), said


def test_the_port_of_a_session_that_is_over_stays_bound_while_command_goes_on(simulation):
    script = "echo $PLEXCTL_LOCAL_PORT; read line; exit 7"
    with start(simulation, "--ttl-seconds", 1, "--", "sh", "-c", script, stdin=subprocess.PIPE) as process:
        address = "127.0.0.1", int(process.ready())
        process.wait_for(lambda: "expired" in process.err)
        for _ in range(20):
            with socket.socket() as other, pytest.raises(OSError):
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind(address)
            assert knock("%s:%d" % address) == ("reset", b"")
        process.stdin.close()
        assert process.finish().returncode == 7 and process.err.count("expired") == 1


@READS_PROC
def test_a_node_that_does_not_end_costs_no_further_sessions_or_threads_and_is_dialled_no_further():
    def tick(connection, target):
        while not target.closing.wait(0.02):
            connection.sendall(b"tick")

    def come_and_go():
        while not simulation.target.closing.is_set():
            with contextlib.suppress(OSError), dial(address, 2) as client:
                client.recv(4)

    with Simulation(tick, kinder=True) as simulation:
        with running_proxy(simulation) as (process, address):
            for _ in range(4):
                threading.Thread(target=come_and_go, daemon=True).start()
            for _ in range(80):
                let_pass(0.1)
                assert len(simulation.plane.active()) <= 4
                assert len(os.listdir("/proc/%d/task" % process.pid)) < 20
                assert len(os.listdir("/proc/%d/fd" % process.pid)) < 40
        assert max(simulation.node.most.values()) < 3  # a reset may be on its way to the Node still


@pytest.mark.parametrize("why", ["refused", "the Node is full", "the Node is late"])
def test_a_limit_that_was_learned_is_forgotten(why):
    options = {"the Node is full": dict(max_sessions=1), "the Node is late": dict(late=[0, 1e6, 0])}
    with relayed_to(wait_seconds=1, REFUSED_PAUSE_SECONDS=2, **options.get(why, {})) as running:
        running.plane.script("issue", *[problem("session_limit_exceeded")] * (why == "refused"))
        with dialled(running, 1) as (first,), dial(running.address) as second:
            eventually(lambda: running.said("warning: no further session"))
            running.node.max_sessions = 2
            chat(second, 1)
            chat(first, 1)
        assert len(running.lines) == len(set(running.lines))


def test_a_getsession_that_hangs_delays_no_connection():
    with relayed_to(lambda connection, _: connection.recv(100), limit=1) as running:
        running.plane.script("get", *[hold(60)] * 50)
        with lasts(0, 8):
            for _ in range(4):
                with dial(running.address) as client:
                    client.sendall(b"a line")
                    assert how_it_ends(client)[1] == b""


@pytest.mark.skipif(not LINUX, reason="TCP_INFO")
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_path_that_dies_under_unacknowledged_data_is_noticed(way):
    with relayed_to(silent, direct=True, UNANSWERED_SECONDS=1) as running, dial(running.address) as client:
        target = running.target.connection()
        sender, receiver = (client, target) if way == "up" else (target, client)
        drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # of what comes: return 0
        attach = 26  # SO_ATTACH_FILTER
        receiver.setsockopt(socket.SOL_SOCKET, attach, struct.pack("HL", 1, ctypes.addressof(drop_all)))
        sender.sendall(b"more")
        assert how_it_ends(sender) == ("reset", b"")


@pytest.mark.parametrize("trouble", [
    problem("session_limit_exceeded", headers=[("Retry-After", "1")]), problem("session_limit_exceeded"),
    problem("internal"), problem("signing_unavailable"), Answer(502), Answer(504), drop],
    ids=["429 with Retry-After", "429", "500", "503", "502", "504", "no answer"])
def test_eight_sessions_are_revoked_at_a_gateway_that_is_in_trouble(simulation, trouble):
    plane = simulation.plane
    with start(simulation, "--proxy", "--max-sessions", 8, "--min-sessions", 8) as process:
        proxy_address(process)
        plane.wait_for(lambda: len(plane.issued) == 8)
        plane.script("revoke", *[PASS] * 4, *[trouble] * 12)
        process.send_signal(signal.SIGTERM)
        assert "warning" not in ends_by(process, signal.SIGTERM, 12).stderr
    del FORWARDED[:]  # some were asked for several times
    assert plane.active() == [] and sorted(plane.revoked) == sorted(plane.issued)


def test_nothing_is_sent_to_a_node_that_has_not_ended_the_connection_before():
    def serve(connection, _target):
        heard.append(connection.recv(9))
        go.wait(20)

    heard, go = [], threading.Event()
    with relayed_to(serve, limit=1, one_at_a_time=False, half_close=True) as running:
        with dial(running.address) as first:
            first.sendall(b"1")
            eventually(lambda: heard == [b"1"])
        with dial(running.address) as second:
            second.sendall(b"2")
            let_pass(1)
            assert heard == [b"1"]
            go.set()
            eventually(lambda: b"2" in heard)
        assert len(running.plane.issued) == 1


@pytest.mark.parametrize("way", ["tcp", "unix", "stdio"])
def test_a_half_close_is_passed_on_once_the_target_is_quiet_and_a_late_answer_arrives(tmp_path, way):
    def serve(connection, target):
        for _ in range(5):
            connection.sendall(b".")
            let_pass(0.5)
        quiet.append(time.monotonic())
        recording(bytearray())(connection, target)
        quiet.append(time.monotonic())
        let_pass(2.5)  # longer than anything that ends a connection
        connection.sendall(b"late answer")

    quiet, answer = [], b".....late answer"
    with Simulation(serve, kinder=True) as simulation:
        if way == "stdio":
            assert stdio(simulation, input=b"?").out == answer.decode()
        else:
            flags = ["--local-addr", "unix:%s" % (tmp_path / "s")] if way == "unix" else []
            with running_proxy(simulation, *flags) as (_, address), \
                    (dial(address) if way == "tcp" else dial_unix(address[5:])) as client:
                client.sendall(b"?")
                client.shutdown(socket.SHUT_WR)
                assert how_it_ends(client) == ("eof", answer)
    assert 1.4 < quiet[1] - quiet[0] < 10  # 2 s after the last dot


def test_a_terminal_that_stops_who_writes_in_the_background_does_not_stop_it(simulation, terminal):
    program = """
import os, subprocess, sys, termios
mode = termios.tcgetattr(0)
mode[3] |= termios.TOSTOP
termios.tcsetattr(0, termios.TCSANOW, mode)
child = subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp)
status = os.waitpid(child.pid, os.WUNTRACED)[1]
if os.WIFSTOPPED(status):
    child.kill()
    sys.exit(99)
sys.exit(os.WEXITSTATUS(status))
"""
    screen = terminal(200)
    with start(simulation, "--proxy", "--ttl-seconds", 2, within=[sys.executable, "-c", program],
               **screen.controlling()) as process:
        assert process.finish().returncode == 1, screen.read()  # not 99
    assert "127.0.0.1" in screen.read() and "the session expired" in screen.read()


@pytest.mark.skipif(not LINUX, reason="SIOCOUTQ")
def test_what_was_sent_is_under_way_until_the_node_has_acknowledged_it_and_its_session_not_stuck():
    """COMMAND's end waits for that, as long as it moves."""
    data = pattern(MIB)  # more than a target's kernel takes alone
    with relayed_to(silent, direct=True, NODE_END_SECONDS=0.3) as running:
        with dial(running.address) as client:
            client.sendall(data)
            eventually(lambda: running.count().up == len(data))
        eventually(lambda: running.count().ended == 1)
        let_pass(1)
        assert 0 <= running.forwarder.list_undelivered()[0] < len(data) and running.lines == []
        with running.target.connection() as target:
            assert how_it_ends(target) == ("eof", data)
        eventually(lambda: not running.forwarder.list_undelivered())


def test_a_signal_ends_stdio_behind_the_target_s_end_too(make_pipe):
    with Simulation(recording(bytearray(), 60, 0, b"hello", True), kinder=True) as simulation, \
            open("/dev/zero", "rb") as zeros, \
            start(simulation, "--stdio", stdin=zeros, stdout=make_pipe()[1]) as process:
        simulation.target.wait_for(lambda: simulation.target.accepted)
        let_pass(0.5)
        process.send_signal(signal.SIGTERM)
        ends_by(process, signal.SIGTERM, 10)


@pytest.mark.parametrize("flags", [["--proxy"], ["--stdio"]], ids=["proxy", "stdio"])
def test_a_node_whose_clock_is_ahead_does_not_get_the_target_blamed(make_pipe, flags):
    with Simulation(silent, early=0.7) as simulation:
        with start(simulation, "--ttl-seconds", 3, *flags, stdin=make_pipe()[0]) as process:
            if flags == ["--proxy"]:
                knock(proxy_address(process))
            result = process.finish()
    assert result.returncode == 1 and "the session expired" in error_of(result)
    assert "nothing listens" not in result.stderr


# ---- tests: real programs ------------------------------------------------------------------------

@pytest.fixture(params=[0, 0.02], ids=["no delay", "20 ms"])
def far(request, simulation):
    """The simulation with a Node that is so far away."""
    simulation.node.delay = request.param
    return simulation


def need(*names):
    """The programs' paths; the test is skipped where one is missing."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
                           + sorted(glob.glob("/usr/lib/postgresql/*/bin")))  # of Debian
    found = [shutil.which(name, path=path) for name in names]
    if None in found:
        pytest.skip("%s is not installed" % names[found.index(None)])
    return found


@contextlib.contextmanager
def serving(command, port, **popen):
    """Runs a server, and waits until it accepts; its address."""
    with Process(command, **popen) as server:
        server.wait_for(lambda: can_be_dialled("127.0.0.1:%d" % port) or server.poll() is not None, 30)
        assert server.poll() is None, server.describe()
        yield "127.0.0.1", port
        server.terminate()
        server.finish()


def database(user_name, programs, install_flags, server_flags):
    """A fixture: the address of a database server, whose DIRECTORY belongs to this user, or else to nobody
    (to us, unless we are root), as it does not run as root. Its superuser has no password."""
    @pytest.fixture(scope="module")
    def address():
        def command(program, flags):
            return [*as_user, program] + [
                flag.replace("DIRECTORY", directory).replace("PORT", str(port)) for flag in flags]

        (install, server), port, as_user = need(*programs), quiet_port(), []
        with tempfile.TemporaryDirectory(prefix="plexctl-test-") as directory:
            if ROOT:
                users = {user.pw_name: user for user in pwd.getpwall()}
                user = users.get(user_name) or users["nobody"]
                os.chown(directory, user.pw_uid, user.pw_gid)
                as_user = need("setpriv") + ["--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid,
                                             "--clear-groups"]
            run_program(*command(install, install_flags), cwd=directory)
            with serving(command(server, server_flags), port, cwd=directory) as found:
                yield found
    return address


postgres_server = database(
    "postgres", ["initdb", "postgres"],
    "-D DIRECTORY/data -A trust -U postgres --no-sync --locale=C -E UTF8".split(),
    "-D DIRECTORY/data -p PORT -k DIRECTORY -c listen_addresses=127.0.0.1 -c fsync=off".split())
AT_DATA = ["--no-defaults", "--datadir=DIRECTORY/data"]
mariadb_server = database(
    "mysql", ["mariadb-install-db", "mariadbd"],
    AT_DATA + ["--auth-root-authentication-method=normal", "--skip-test-db"],
    AT_DATA + ["--socket=DIRECTORY/socket", "--pid-file=DIRECTORY/pid", "--port=PORT",
               "--bind-address=127.0.0.1", "--skip-name-resolve"])


def run_program(*command, **popen):
    """A client program to its end, which has to be a success; its stdout in bytes."""
    result = run_words(command, encoding="latin-1", **popen)
    assert result.status == 0, (command, result.out[-2000:], result.err)
    return result.out.encode("latin-1")


@contextlib.contextmanager
def proxy_port(simulation, *flags, sessions=1):
    """The port of a running proxy, which issues at most so many sessions, and dials none that is busy."""
    with running_proxy(simulation, *flags) as (process, address):
        yield address.rsplit(":", 1)[1]
    assert "nothing came back" not in process.err
    assert 1 <= len(simulation.plane.issued) <= sessions
    assert all(wait.seconds < 1 for wait in simulation.node.waits), simulation.node.waits


@pytest.fixture
def postgres(far, postgres_server):
    """The simulation with that server behind the Node."""
    far.node.target_address = postgres_server
    return far


def psql_to(host, port, *more):
    return need("psql") + ["-XAtqn", "-h", host, "-p", str(port), "-U", "postgres", *more]


@pytest.mark.realworld
def test_psql(postgres):
    hashes = "".join(hashlib.md5(b"%d" % number).hexdigest() + "\n" for number in range(1, 100001))
    with proxy_port(postgres) as port:
        client = psql_to("127.0.0.1", port, "-v", "ON_ERROR_STOP=1")
        run_program(*client, "-c", "drop table if exists t", "-c", "create table t (v text)")
        run_program(*client, "-c", "copy t from stdin", input=hashes.encode())
        assert run_program(*client, "-c", "copy t to stdout") == hashes.encode()
        notices = "do $$ begin for i in 1..3 loop perform pg_sleep(0.1); end loop; end $$; select 'done'"
        assert run_program(*client, "-c", notices) == b"done\n"
    assert sum(postgres.node.connections.values()) == 4


@pytest.mark.realworld
@pytest.mark.parametrize("flags", [("-c", "4", "-t", "10"), ("-C", "-c", "4", "-j", "2", "-T", "5")],
                         ids=["4 clients", "a connection for each transaction"])
def test_pgbench(postgres, flags):
    client = need("pgbench") + ["-h", "127.0.0.1", "-U", "postgres"]
    run_program(*client, "-i", "-q", "-p", postgres.node.target_address[1], "postgres")
    with proxy_port(postgres, sessions=4) as port:
        told = run_program(*client, "-n", "-p", port, *flags, "postgres").decode()
    done, failed = [int(re.search(words + r": ([0-9]+)", told).group(1))
                    for words in ("actually processed", "failed transactions")]
    assert done >= 10 and failed == 0, told


@pytest.mark.realworld
def test_redis(far, tmp_path):
    server, client, benchmark = need("redis-server", "redis-cli", "redis-benchmark")
    value, port = pattern(1 << 20).hex().encode(), quiet_port()
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with serving(command, port) as far.node.target_address:
        with proxy_port(far) as local:
            assert run_program(client, "-p", local, "-x", "set", "big", input=value) == b"OK\n"
            assert run_program(client, "-p", local, "get", "big") == value + b"\n"
            pipelined = b"".join(b"RPUSH list %d\r\n" % number for number in range(50000))
            told = run_program(client, "-p", local, "--pipe", input=pipelined)
            assert b"errors: 0, replies: 50000" in told
        with proxy_port(far, sessions=1 + 4) as local:
            told = run_program(benchmark, "-p", local, "-c", "4", "-n", 400, "-q",
                               "-t", "set,get,incr").decode()
        assert re.findall(r"(\w+): [0-9.]+ requests per second", told) == ["SET", "GET", "INCR"]


def mariadb_to(host, port, *more):
    return need("mariadb") + ["--no-defaults", "-A", "-h", host, "-P", str(port), "-u", "root",
                              "--protocol=tcp", *more]


PSQL = (psql_to, "postgres_server", "select pg_sleep(30)", "canceling statement", ["-c", (
    "select count(*) from pg_stat_activity where state = 'active' and query like 'select pg_sleep%'")])
MARIADB = (mariadb_to, "mariadb_server", "select sleep(30)", "query killed", ["-N", "-B", "-e", (
    "select count(*) from information_schema.processlist where info = 'select sleep(30)'")])


@pytest.mark.realworld
@pytest.mark.parametrize("program, late", [(PSQL, 0), (PSQL, [0, 1]), (MARIADB, 0)],
                         ids=["psql", "psql, a further session is late", "mariadb"])
@pytest.mark.parametrize("way", ["proxy", "command"])
def test_ctrl_c_cancels_a_query_and_the_client_goes_on(far, terminal, request, way, program, late):
    """It opens a second connection for that, and waits for its end."""
    def expect(words, position=0):
        """Wait for words on the screen, behind a position; the position behind them."""
        eventually(lambda: words in screen.seen[position:] or process.poll() is not None, 20, screen.read)
        return screen.seen.index(words, position) + len(words)

    client, server, query, cancelled, count = program
    far.node.target_address, far.node.late = request.getfixturevalue(server), late
    screen, env, position = terminal(200), {"TERM": "dumb"}, 0
    with contextlib.ExitStack() as stack:
        if way == "command":
            process = start(far, "--", *client("{host}", "{port}"), env=env, **screen.controlling())
        else:
            command = client("127.0.0.1", stack.enter_context(proxy_port(far, sessions=2)))
            process = Process(command, env=clean_environment(env), **screen.controlling())
        stack.enter_context(process)
        for _ in range(2):
            screen.type(query.encode() + b";\n")
            eventually(lambda: run_program(*client(*far.node.target_address, *count)) == b"1\n", 20)
            screen.type(b"\x03")
            position = expect(cancelled.encode(), position)
            screen.type(b"select 6*7;\n")
            position = expect(b"42", position)
        screen.type(b"\\q\n")
        assert process.finish().returncode == 0
    assert "nothing came back" not in screen.read()
    assert len(far.plane.issued) <= 2


@pytest.mark.realworld
@pytest.mark.parametrize("flags", [(), ("-R",), ("-P", "3")], ids=["up", "down", "3 at once"])
def test_iperf3(far, flags):
    """One connection for control beside those of the data."""
    iperf3, = need("iperf3")
    port = quiet_port()
    with serving([iperf3, "-s", "-p", str(port), "-B", "127.0.0.1"], port) as far.node.target_address:
        with proxy_port(far, sessions=4) as local:
            told = json.loads(run_program(iperf3, "-c", "127.0.0.1", "-p", local, "-n", "64M", "-J",
                                          *flags).decode())
    assert "error" not in told and told["end"]["sum_sent"]["bytes"] >= 64 * MIB, told
    assert told["end"]["sum_received"]["bytes"] > MIB  # it does not wait for what is still on its way


@pytest.fixture
def ssh_options(far, tmp_path):
    """An sshd behind the Node; the options that its clients need."""
    server, keygen = need("sshd", "ssh-keygen")
    if ROOT and not os.path.isdir("/run/sshd"):
        pytest.skip("sshd needs /run/sshd")
    port = quiet_port()
    for name in ("host", "user"):
        run_program(keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    settings = ["Port %d" % port, "ListenAddress 127.0.0.1", "HostKey %s" % (tmp_path / "host"),
                "PidFile none", "AuthorizedKeysFile %s" % (tmp_path / "user.pub"), "StrictModes no",
                "UsePAM no", "Subsystem sftp internal-sftp"]
    (tmp_path / "sshd_config").write_text("\n".join(settings) + "\n")
    (tmp_path / "known_hosts").write_text("plexctl-target " + (tmp_path / "host.pub").read_text())
    with serving([server, "-D", "-e", "-f", str(tmp_path / "sshd_config")], port) as far.node.target_address:
        options = ["BatchMode=yes", "IdentitiesOnly=yes", "IdentityFile=%s" % (tmp_path / "user"),
                   "HostKeyAlias=plexctl-target", "StrictHostKeyChecking=yes", "User=" + getpass.getuser(),
                   "UserKnownHostsFile=%s" % (tmp_path / "known_hosts"), "LogLevel=ERROR"]
        yield ["-F", "/dev/null"] + [word for option in options for word in ("-o", option)]


def proxy_command(simulation):
    """The option of ssh that takes the way through plexctl --stdio."""
    command = plexctl_command(forward_args(simulation.plane, "--stdio"))
    return ["-o", "ProxyCommand=" + " ".join(map(shlex.quote, command))]


@pytest.mark.realworld
@pytest.mark.parametrize("way", ["proxy", "ProxyCommand"])
@pytest.mark.parametrize("program", ["ssh", "scp", "rsync", "git"])
def test_what_goes_through_ssh(far, ssh_options, tmp_path, way, program):
    def run(*words, **popen):
        env = dict(os.environ, HOME=str(tmp_path), **far.plane.environment())
        return run_program(*words, env=env, cwd=str(tmp_path), **popen)

    data = pattern(8 << 20)
    (tmp_path / "data").write_bytes(data)
    with contextlib.ExitStack() as stack:
        ssh = need("ssh") + ssh_options + (
            ["-o", "Port=" + stack.enter_context(proxy_port(far))] if way == "proxy" else proxy_command(far))
        shell = " ".join(map(shlex.quote, ssh))
        if program == "ssh":
            assert run(*ssh, "127.0.0.1", "cat", input=data) == data
            assert run(*ssh, "127.0.0.1", "echo hello; echo lost >&2") == b"hello\n"
        elif program == "git":
            url = "127.0.0.1:%s" % (tmp_path / "bare")
            git = need("git") + ["-c", "core.sshCommand=" + shell, "-c", "user.name=x",
                                 "-c", "user.email=x@example.com"]
            for words in (["init", "-q", "--bare", "bare"], ["init", "-q", "."], ["add", "data"],
                          ["commit", "-qm", "x"], ["push", "-q", url, "HEAD:refs/heads/main"],
                          ["clone", "-q", "-b", "main", url, "clone"]):
                run(*git, *words)
            assert (tmp_path / "clone" / "data").read_bytes() == data
        else:
            there = "127.0.0.1:%s" % (tmp_path / "copied")
            copy = need("scp") + ssh[1:] if program == "scp" else need("rsync") + ["-e", shell]
            run(*copy, "data", there)
            run(*copy, there, "back")
            assert (tmp_path / "back").read_bytes() == data
        assert sum(far.node.connections.values()) == 2
    if way == "ProxyCommand":
        far.plane.wait_for(lambda: len(far.plane.revoked) == 2)
        revoked_once(far.plane, 2)


@pytest.mark.realworld
@pytest.mark.parametrize("why, words", [("down", "--host"), ("revoked", "revoked")])
def test_ssh_shows_why_its_proxycommand_ended(far, ssh_options, why, words):
    if why == "down":
        far.node.target_address = "127.0.0.1", quiet_port()
    command = need("ssh") + ssh_options + proxy_command(far) + ["127.0.0.1", "echo ready; cat"]
    for _ in range(3):
        with Process(command, env=dict(os.environ, **far.plane.environment()), stdin=subprocess.PIPE) as ssh:
            if why == "revoked":
                ssh.wait_for_output("ready")
                far.plane.revoke(far.plane.issued[-1])
            result = ssh.finish()
        assert result.returncode == 255 and words in error_of(result)


@pytest.mark.realworld
def test_nc_that_ends_its_input_has_the_whole_answer(far):
    with proxy_port(far) as port:
        answer = run_program(*need("nc.openbsd"), "-N", "127.0.0.1", port, input=pattern(1 << 20))
    assert answer == pattern(1 << 20)


@pytest.fixture
def web_server(far, tmp_path):
    """An HTTP/1.1 server with keep-alive, for 2 s, behind the Node; the directory whose files it serves."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", 2

        def translate_path(self, path):
            return str(tmp_path / os.path.basename(path))

        def copyfile(self, source, outputfile):
            self.connection.settimeout(60)
            super().copyfile(source, outputfile)
            self.connection.settimeout(self.timeout)

        def log_message(self, *_):
            """Say nothing."""

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        far.node.target_address = server.server_address
        yield tmp_path
        server.shutdown()


@pytest.mark.realworld
def test_curl_as_command_goes_to_no_proxy(far, web_server):
    (web_server / "page").write_text("here")
    curl = need("curl") + ["-sS", "--fail", "http://{addr}/page"]
    result = run(far, "--", *curl, env={"http_proxy": "http://127.0.0.1:%d" % quiet_port()})
    assert (result.status, result.out) == (0, "here"), result.err


@pytest.mark.realworld
@pytest.mark.parametrize("files, size", [(4, 8), (8, 8), (1, int(os.environ.get("LARGE_MEBIBYTES", "256")))],
                         ids=["4 files", "8 files", "a large one"])
def test_curl_downloads_several_files_at_once_byte_for_byte(far, web_server, files, size):
    """curl keeps a connection whose file is there, so the fifth file waits for the server to close one."""
    here, there, piece = str(web_server / "to%d"), str(web_server / "from%d"), pattern(MIB - 8)
    for number in range(files):
        with open(there % number, "wb") as stream:
            for position in range(size):  # no two MiB are alike
                stream.write(struct.pack(">Q", size * number + position) + piece)
    with proxy_port(far, sessions=4) as port:
        words = [word for number in range(files) for word in (
            "-o", here % number, "http://127.0.0.1:%s/from%d" % (port, number))]
        run_program(*need("curl"), "-sS", "--parallel", "--fail", *words)
    assert all(filecmp.cmp(here % number, there % number, shallow=False) for number in range(files))


# ---- tests: README and packaging ------------------------------------------------------------------

def page(name="README.md"):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def readme(title=""):
    """The README; or what stands below a heading in it (`## Usage`), up to the next one."""
    text = page()
    if not title:
        return text
    below = text[text.index("\n%s\n" % title) + len(title) + 2:]
    return re.split(r"(?m)^#{2,%d} " % title.index(" "), below)[0]


def filled_in(text, plane):
    """A piece of documentation that names a server and a token, each once, with those of a control plane."""
    assert text.count("https://plexsphere.example.com") == text.count("psk_...") == 1
    return text.replace("https://plexsphere.example.com", plane.url).replace("psk_...", plane.bearer)


def code_blocks(text):
    """The indented blocks of a piece of Markdown."""
    blocks = re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", text + "\n")
    return [re.sub("(?m)^    ", "", block).strip("\n") for block in blocks]


@pytest.mark.reveals
@pytest.mark.parametrize("more", ["", " --local-addr 127.0.0.1:15432 --reveal-secrets"])
def test_the_published_examples_work_word_for_word(simulation, tmp_path, more):
    line = ('plexctl tcp-forward --server "${PLEXSPHERE_URL}"'
            ' --project-id 0190a8b8-a0c0-7a0a-8a0a-a0a0a0a0a0c0'
            ' --resource-id 0190a8b8-d3e3-7d3d-8d3d-d3d3d3d3d3d3 --host 10.0.0.5 --port 5432')
    environ = simulation.plane.environment(PLEXCTL_AUDIT_LOG=str(tmp_path / "audit.log"))
    script = 'plexctl() { "%s" -I "%s" "$@"; }\n%s%s\n' % (sys.executable, PLEXCTL, line, more)
    done = run_words(["bash", "-c", script], clean_environment(environ))
    session, = simulation.plane.sessions
    document = parse_document(done.out, "text")
    assert (done.status, document["session_id"]) == (0, session.id)
    if more:
        assert document["local_addr"] == "127.0.0.1:15432"
        warning, token = done.err.splitlines()
        assert "warning" in warning and token == "PLEXCTL_SESSION_TOKEN=" + session.token
    else:
        assert done.err == ""
    assert simulation.plane.revoked == []


def test_the_readme_has_the_headings_that_readers_know_and_every_page_names_only_what_there_is():
    assert re.findall("(?m)^## (.*)$", readme()) == [
        "Install", "Quick start", "Usage", "Recipes", "Credentials", "How it behaves", "Troubleshooting",
        "Security", "Comparison", "Performance", "Library use", "Contributing", "License"]
    for name in ["README.md", ".ci/README.md"] + glob.glob(os.path.join(HERE, ".github", "*.md")):
        assert set(re.findall(r"\btest_\w+", page(name))) - {"test_plexctl"} <= set(globals()), name
        for link in re.findall(r"\]\(([^)]+)\)", page(name)):
            path, _, anchor = link.partition("#")
            if not path.startswith("https://"):
                there = os.path.join(HERE, os.path.dirname(name), path) if path else os.path.join(HERE, name)
                assert os.path.exists(there), (name, link)
                titles = re.findall("(?m)^#+ (.*)$", page(there)) if anchor else []
                assert anchor in [""] + [title.lower().replace(" ", "-") for title in titles], (name, link)


def test_the_picture_of_the_terminal_is_what_a_run_prints(simulation, terminal):
    command, *shown = re.search("```console\n\\$ (.*?)\n```", readme(), re.DOTALL).group(1).split("\n")

    def alike(rows):  # but for ids, times, addresses and seconds
        changing = r"[0-9a-f-]{36}|20[0-9TZ:-]{18}|(?<![0-9.])[0-9.]+:[0-9]{5}|^[0-9]+m[0-9]+s"
        return [re.sub(changing, "#", row) for row in rows if row]
    args = shlex.split(command.replace("$PROJECT", PROJECT_ID).replace("$RESOURCE", RESOURCE_ID))
    screen, env = terminal(80), clean_environment(simulation.plane.environment())
    with Process(plexctl_command(args[1:]), env=env, **screen.controlling()) as process:
        eventually(lambda: b" open, " in screen.seen)
        with dial(re.search(r"LOCAL_ADDR +(\S+)", screen.read()).group(1)) as client:
            assert talk(client, bytes(1 << 20))
            eventually(lambda: b" 1.0 MiB down" in screen.seen)
            assert alike(rows_of(screen.read(), 80)) == alike(shown)
        process.send_signal(signal.SIGINT)
        process.finish()


@pytest.mark.once
def test_the_demonstration_shows_that_all_is_as_it_should_be():
    assert code_blocks(readme("## Contributing"))[0].splitlines()[0] == "python3 test_plexctl.py"
    with Process([sys.executable, os.path.join(HERE, "test_plexctl.py")], env=clean_environment()) as process:
        result = process.finish(60)
    del SEEN[:]  # it shows a session token, as it was asked to
    assert result.returncode == 0 and BEARER not in result.stdout + result.stderr, process.describe()
    assert result.stdout.endswith("\nall as it should be\n")


def test_the_table_of_options_is_that_of_the_help_and_no_other_flag_is_named():
    shown = run_words([sys.executable, "-I", PLEXCTL, "--help"], clean_environment()).out
    in_help = re.findall(r"(?m)^  (?:-\w, )?(--[a-z-]+)(?: ([A-Z]+))?(?=\s)((?:.*\n)(?: {4,}.*\n)*)", shown)
    table = {}
    for flags, default in re.findall(r"(?m)^\| (`-.*?) \|(.*?)\| .*\|$", readme("## Usage")):
        for flag, metavar in re.findall(r"(--[a-z-]+) ?([A-Z]*)", flags):
            table[flag] = metavar, default
    for flag, metavar, words in in_help:
        default = re.search(r"\(default ([^),]+)|(\w+) \(default\)", " ".join(words.split()))
        assert table[flag][0] == metavar, flag
        assert not default or (default.group(1) or default.group(2)) in table[flag][1], flag
    assert set(table) == {flag for flag, _, _ in in_help} and len(table) > 20
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", readme()))
    assert named - set(table) == {"--now", "--target"}  # of systemctl, of the simulator


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request):
    return need(request.param)[0]


@contextlib.contextmanager
def recipe(simulation, tmp_path, block, shell="bash", **popen):
    """A block of the README, as it stands, after the exports of the quick start; with plexctl.py in HOME.
    plexctl and python3 are ours; `ssh bastion` runs its command here, as sshd would."""
    python = shlex.quote(sys.executable)
    for name, line in (("plexctl", python + " -I ~/plexctl.py \"$@\""), ("python3", python + " \"$@\""),
                       ("ssh", "sh -c 'shift; exec sh -c \"$*\"' ssh \"$@\"")):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\nexec %s\n" % line)
        tool.chmod(0o755)
    shutil.copy(PLEXCTL, str(tmp_path))
    exports = filled_in(code_blocks(readme("## Quick start"))[0], simulation.plane)
    env = dict(HOME=str(tmp_path), PATH=os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    # a session of its own: a terminal's Ctrl-C would reach the shell as well
    with Process([shell, "-c", exports + "\n" + block], cwd=str(tmp_path), env=clean_environment(env),
                 start_new_session=True, **popen) as process:
        yield process


@contextlib.contextmanager
def proxy_recipe(simulation, tmp_path, block, shell="bash", lines=2, sessions=1):
    """A block that runs a proxy: what it prints; then SIGINT, as a terminal sends it to the shell as well."""
    with recipe(simulation, tmp_path, block, shell) as process:
        yield process.ready(lines)
        os.killpg(process.pid, signal.SIGINT)
        assert "ended by SIGINT" in process.finish().stderr, process.describe()
    assert sorted(simulation.plane.revoked) == sorted(simulation.plane.issued[-sessions:])


def run_recipe(simulation, tmp_path, block, shell="bash", status=0, **popen):
    """A block of the README that comes to an end; its stdout."""
    with recipe(simulation, tmp_path, block, shell, **popen) as process:
        result = process.finish(60)
    assert result.returncode == status, process.describe()
    assert "plexctl: error" not in result.stderr, result.stderr
    return result.stdout


@pytest.fixture
def address_in():
    """address_in(recipe) -> the local address that it listens on, which is one test's alone, also where
    several run at once; the test is skipped if somebody else has it."""
    def find(block):
        address = re.search(r"--local-addr (127[.]0[.]0[.]1:[0-9]+)", block).group(1)
        if can_be_dialled(address):
            pytest.skip(address + " is taken")
        return address

    with open(os.path.join(tempfile.gettempdir(), "plexctl-test-ports-%d" % os.getuid()), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield find


def recipe_blocks(name):
    """The blocks of a recipe: of what stands behind its name in bold, up to the next name."""
    return code_blocks(readme("## Recipes").split("\n**%s**" % name)[1].split("\n**")[0])


def test_every_recipe_is_run_by_a_test():
    names = {re.sub("[^a-z]+", "_", name.lower()) for name in re.findall(r"(?m)^\*\*(.*?)\*\*", readme())}
    prefix = "test_the_recipe_called_"
    assert {prefix + name for name in names} == {name for name in globals() if name.startswith(prefix)}


@pytest.mark.realworld
def test_the_recipe_called_psql(simulation, postgres, tmp_path, shell):
    need("psql")
    (tmp_path / "query").write_text("select 41 + 1 as answer;\n")
    quick = code_blocks(readme("## Quick start"))[1:]
    assert quick[0].count("5432 ") == 1 and "--min-sessions 2" in readme("## Recipes")
    for block in quick[0], quick[0].replace("5432 ", "5432 --min-sessions 2 "):
        with open(str(tmp_path / "query")) as query:
            assert "\n     42\n" in run_recipe(simulation, tmp_path, block, shell, stdin=query)
    with proxy_recipe(simulation, tmp_path, quick[1], shell, sessions=4):
        pass


@pytest.mark.realworld
def test_the_recipe_called_ssh(simulation, ssh_options, tmp_path):
    (tmp_path / "config").write_text(recipe_blocks("ssh")[0] + "\n")
    words = need("ssh") + ["-F", str(tmp_path / "config"), *ssh_options[2:], "behind-the-node", "echo hello"]
    line = " ".join(shlex.quote(word) for word in words)
    assert run_recipe(simulation, tmp_path, line) == "hello\n"
    simulation.plane.wait_for(lambda: simulation.plane.revoked)
    revoked_once(simulation.plane)


def test_the_recipe_called_browser(tmp_path, address_in, shell):
    def answer_http(connection, _target):
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello\n")

    block = recipe_blocks("Browser")[0]
    address = address_in(block)
    with Simulation(answer_http) as simulation, proxy_recipe(simulation, tmp_path, block, shell):
        assert exchange(address, b"GET / HTTP/1.0\r\n\r\n").endswith(b"hello\n")


def test_the_recipe_called_connection_pool(simulation, tmp_path, address_in, shell):
    block = recipe_blocks("Connection pool")[0]
    address = address_in(block)
    with proxy_recipe(simulation, tmp_path, block, shell, sessions=4), contextlib.ExitStack() as stack:
        simulation.plane.wait_for(lambda: len(simulation.plane.issued) == 4)
        for pooled in [stack.enter_context(dial(address)) for _ in range(4)]:
            assert talk(pooled, b"x")
        assert len(simulation.plane.issued) == 4


def test_the_recipe_called_systemd(simulation, tmp_path, address_in):
    unit = dict(line.split("=", 1) for line in page(".github/plexctl.service").splitlines() if "=" in line)
    address = address_in(unit["ExecStart"])
    assert unit["Environment"].startswith("PLEXSPHERE_URL=") and unit["Type"] == "notify"
    write_private(tmp_path / "token", simulation.plane.bearer)
    line = unit["ExecStart"].replace("/usr/bin/python3", "exec python3").replace(
        "/usr/local/lib/", "~/") + " < " + unit["StandardInput"].replace("file:/etc/plexctl/", "")
    with recipe(simulation, tmp_path, "unset PLEXSPHERE_TOKEN; " + line) as process:
        process.ready(2)
        assert visit(address)
        process.send_signal(signal.SIGTERM)
        ends_by(process, signal.SIGTERM)
    revoked_once(simulation.plane)


def test_the_recipe_called_ci(simulation, tmp_path, shell):
    block, = recipe_blocks("CI")
    shown = run_recipe(simulation, tmp_path, block, shell, status=3)
    assert re.match(r"testing 127[.]0[.]0[.]1:[0-9]+\n\Z", shown)
    revoked_once(simulation.plane)


@pytest.mark.realworld
def test_the_recipe_called_json_and_jq(simulation, tmp_path, shell):
    need("jq")
    block, = recipe_blocks("JSON and jq")
    assert run_recipe(simulation, tmp_path, block, shell) == simulation.plane.sessions[0].endpoint + "\n"
    proxy = block.replace("jq -r .listener_endpoint", "jq --unbuffered -r .local_addr")
    proxy = proxy.replace("json |", "json --proxy |")
    with proxy_recipe(simulation, tmp_path, proxy, shell, lines=1) as address:
        assert visit(address.strip())


def test_the_recipe_called_over_ssh_without_copying(simulation, tmp_path, shell):
    block, = recipe_blocks("Over ssh, without copying")
    document = parse_document(run_recipe(simulation, tmp_path, block, shell), "text")
    assert document["session_id"] == simulation.plane.issued[0]


def test_the_recipe_called_a_mounted_secret(simulation, tmp_path, shell):
    block, = recipe_blocks("A mounted secret")
    path = write_private(tmp_path / "secret", BEARER + "\n", 0o444)
    assert block.endswith(" < /run/secrets/plexsphere")
    block = "export PLEXSPHERE_TOKEN=another\n" + block.replace("/run/secrets/plexsphere", path)
    with proxy_recipe(simulation, tmp_path, block, shell):
        pass


def test_the_simulator_for_people_says_what_to_paste_and_what_is_wrong_and_logs_requests(tmp_path, shell):
    def forward(*more):
        words = [shlex.quote(sys.executable), "-I", shlex.quote(PLEXCTL), "tcp-forward", *more]
        return run_words([shell, "-c", exports + " ".join(words)], clean_environment({"HOME": str(tmp_path)}))

    serve = [sys.executable, os.path.join(HERE, "test_plexctl.py"), "serve"]
    for flag, value, said in (("--target", "127.0.0.1", "expected HOST:PORT"),
                              ("--target", "127.0.0.1:70000", "expected HOST:PORT"),
                              ("--target", "127.0.0.1:1", "cannot connect to 127.0.0.1:1"),
                              ("--late", "soon", "number of seconds")):
        result = run_words(serve + [flag, value], clean_environment())
        assert result.status == 2 and said in result.err.splitlines()[-1]
    with Process(serve, env=clean_environment()) as process:
        process.wait_for_output("Requests to the control plane:\n")
        assert "Press Ctrl-C to stop it" in process.out
        exports, paste = process.out[process.out.index("export "):].split("\n\n")[0].rsplit("\n", 1)
        assert paste == "python3 plexctl.py tcp-forward %s --proxy" % FLAGS_TO_PASTE
        exports += "\n"
        assert forward(FLAGS_TO_PASTE).status == 0
        process.wait_for_output("IssueSession: 201")
        wrong = FLAGS_TO_PASTE.replace("$RESOURCE", PROJECT_ID)
        one_error_line(forward(wrong), "404", "check --project-id, --resource-id and --server")
        elsewhere = forward(FLAGS_TO_PASTE.replace("5432", "5433"), "--stdio")
        assert elsewhere.status == 1 and "10.0.0.5:5433" in elsewhere.err
        process.wait_for_output("RevokeSession: 204")
        process.send_signal(signal.SIGINT)
        assert process.finish().returncode == 0
    del SEEN[:]  # it says the token, to be pasted


def test_the_library_example_works(simulation):
    code = filled_in(code_blocks(page(".github/LIBRARY.md"))[0], simulation.plane)
    with Process([sys.executable, "-u", "-c", code], cwd=HERE, env=clean_environment()) as process:
        said, address = process.ready().rsplit(" ", 1)
        assert said == "listening on"
        with dial(address.strip()) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            simulation.plane.revoke(simulation.plane.issued[0], "policy_violation")
            process.wait_for_output("over: the session was revoked (policy_violation)")
        assert process.finish().returncode == 0, process.describe()


def test_pydoc_shows_what_is_stable_and_nothing_of_the_environment():
    environ = clean_environment({"PLEXSPHERE_TOKEN": BEARER})
    shown = run_words([sys.executable, "-m", "pydoc", "plexctl"], environ, cwd=HERE)
    assert shown.status == 0 and BEARER not in shown.out + shown.err
    assert re.search("What IssueSession returns.*lifetime_seconds", shown.out, re.DOTALL)
    assert re.findall(r"(?m)^    class (\w+)", shown.out) == [name for name in sorted(plexctl.__all__)
                                                           if isinstance(getattr(plexctl, name), type)]
    assert set(plexctl.__all__) <= set(re.findall(r"\w+", page(".github/LIBRARY.md")))


def test_the_documentation_has_no_message_that_there_is_not():
    with open(PLEXCTL, encoding="utf-8") as file:
        said = re.sub(r'"\s+f?"', "", file.read())  # a string that goes on in the next line
    for text in readme("## Troubleshooting"), page(".github/TROUBLESHOOTING.md"):
        messages = [message for row in re.findall(r"(?m)^\| (`.*?) \| .* \|$", text)
                    for message in re.findall("`([^`]+)`", row)]
        assert len(messages) >= 8 and not [message for message in messages for part in message.split("...")
                                           if part.strip(" :;") not in said + " 5xx "]


def test_a_console_script_of_one_module_is_installed(tmp_path):
    """`pip install .` into a fresh environment, where an index can be reached for the build backend."""
    def run(*words):
        return run_words(words, dict(os.environ), cwd=str(tmp_path), timeout=300)

    if sys.version_info[:2] not in ((3, 6), (3, 11), (3, 13)):
        pytest.skip("on three versions only: it takes a while")
    checkout, environment = tmp_path / "checkout", str(tmp_path / "environment")
    (checkout / ".github").mkdir(parents=True)
    for name in ("plexctl.py", "pyproject.toml", "README.md", ".github/LICENSE"):
        shutil.copy(os.path.join(HERE, name), str(checkout / name))
    assert run(sys.executable, "-m", "venv", environment).status == 0
    python = os.path.join(environment, "bin", "python")
    pip = [python, "-m", "pip", "-q"]
    if sys.version_info < (3, 7):  # the one that comes with 3.6 knows no build backends
        assert run(*pip, "install", "-U", "pip<22").status == 0
    done = run(*pip, "install", checkout)
    if "No matching distribution found for flit" in done.err + done.out:
        pytest.skip("no package index")
    assert done.status == 0, done
    command = os.path.join(environment, "bin", "plexctl")
    for arguments, status, text in (([command, "--version"], 0, plexctl.__version__),
                                    ([command, "tcp-forward"], 2, "--project-id"),
                                    ([python, "-I", "-m", "plexctl", "tcp-forward"], 2, "--project-id")):
        done = run_words(arguments, clean_environment(), cwd=str(tmp_path))
        assert done.status == status and text in done.out + done.err
    files = run(*pip[:-1], "show", "-f", "plexctl").out
    assert "plexctl.py" in files and "test_plexctl.py" not in files and "LICENSE" in files
    assert re.search(r"(?m)^Requires: *$", files)
