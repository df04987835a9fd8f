#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""plexctl: reach one TCP port behind a plexsphere Node, for a limited time.

    plexctl tcp-forward --project-id UUID --resource-id UUID --host HOST --port PORT

asks the control plane for a one-time mediated session, and prints a local address and the listener
endpoint on the Node. With --proxy, --stdio or -- COMMAND it also carries connections, and revokes the
session at the end.

Exit codes: 0 success; 1 transport or API failure, no listener endpoint, forwarder error, session over;
2 usage; 3 credentials; 4 forbidden; 77 ReBAC denial; with -- COMMAND its status, 128 + n if signal n ended
it, 126 if it cannot be executed, 127 if there is none. A signal that ends plexctl does so once the session
is revoked, and the shell sees that signal.

One file, standard library only, Python 3.6 to 3.15. Read it from the top: a section uses those above it.

Sessions. The Node serves one connection of a session at a time, and ends both directions as soon as it reads
the end of either. So each open connection needs a session, which can be used again once the Node has ended
the connection before.

Secrets. The bearer token comes from a file, standard input or the environment. From there on it is a Secret,
which check_token and the section control plane alone reveal: to check it, to send it, and to remove it from
what the server says. COMMAND gets neither that variable nor that standard input, but runs as the same user
and could read the file, or our environment in /proc. The session token is shown with --reveal-secrets alone,
by Run.establish, after the section audit has recorded that.

Threads. The main thread waits for signals and calls Forwarder.tick, which issues further sessions. Each
session has a thread that accepts, dials and carries its connections; with --stdio a single thread carries the
only one. One thread writes to stderr. Short-lived ones do what may block, such as an HTTP exchange. The
comment of each lock names what it guards. Flags that none guards, such as ControlPlane._said_silent, may be
set by several threads: at worst something is said twice.
"""
import sys

if __name__ == "__main__":
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]  # the directory of the script: another user's argparse.py may lie in /tmp
    # until handle_signals() Ctrl-C ends the process: a KeyboardInterrupt amid an import can be lost
    import _signal  # type: ignore[import-not-found]

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

try:
    import logging

    _quiet = logging.NullHandler()
    logging.getLogger().addHandler(_quiet)
    import hashlib  # noqa: F401  # as urllib.request does: it logs a traceback for a missing digest (FIPS)

    logging.getLogger().removeHandler(_quiet)
    import argparse
    import contextlib
    import datetime
    import email.utils
    import errno
    import http.client
    import ipaddress
    import json
    import mmap
    import os
    import queue
    import re
    import select
    import shutil
    import signal
    import socket
    import socketserver
    import ssl
    import stat
    import struct
    import threading
    import time
    import traceback
    import urllib.error
    import urllib.request
    import zlib
    from typing import (
        IO, Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Set,
        Tuple, Type, Union)

    if os.name == "posix":
        import fcntl
        import pwd
        import resource
        import termios
except ImportError as error:
    sys.exit("plexctl: error: this Python lacks the module %s (%s); install its whole standard library "
             "(Debian, Ubuntu: apt install python3; built from source: with OpenSSL)"
             % (error.name, ascii(error.msg)[1:-1]))
except Exception as error:  # no descriptors or memory left, or a library that is damaged
    sys.exit("plexctl: error: cannot load Python's standard library: %s: %s"
             % (type(error).__name__, ascii(str(error))[1:-1]))

__version__ = "0.1.0"

Environ = Mapping[str, str]
Report = Callable[[str], None]  # takes a line for people, from any thread

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_CREDENTIALS = 3
EXIT_FORBIDDEN = 4
EXIT_REBAC_DENIED = 77
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNAL_BASE = 128

CONNECT_SECONDS = 10
EXCHANGE_SECONDS = 30  # of one request and its answer
LEAVE_SECONDS = 10  # to revoke sessions at the end
CLOSE_SECONDS = 2  # to end connections whose session is over
HURRY_SECONDS = 1.0  # to revoke sessions after a second signal; also to write the last messages
POLL_MIN_SECONDS = 0.5  # pauses between requests grow from this
POLL_MAX_SECONDS = 3.0  # to this
WARN_LEFT_SECONDS = (300, 60)  # of a session


# ---------------------------------------------------------------------------------------- errors


class PlexctlError(Exception):
    """Anything that ends the command with one line on stderr. `facts` replace attributes of the class."""

    exit_code = EXIT_FAILURE  # the process's exit status
    passing = False  # transient: the same may well succeed a little later
    retry_after_seconds: Optional[float] = None  # that a server has asked for
    may_exist = False  # a session may have been issued all the same
    is_told = False  # somebody has reported it already
    status = 0  # of HTTP, if a server has answered with an error
    code = ""  # of its problem details

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        vars(self).update(facts)


class UsageError(PlexctlError):
    """A flag, an environment variable or a URL that cannot be used."""

    exit_code = EXIT_USAGE


class CredentialsError(PlexctlError):
    """No credentials, or some that are not safe to use."""

    exit_code = EXIT_CREDENTIALS


class TransportError(PlexctlError):
    """The control plane gave no answer, or not one that can be used."""


class ApiError(PlexctlError):
    """The control plane answered with an error, or with another success than it should."""


class Cancelled(PlexctlError):
    """A request that was given up because the run is ending."""


class SessionOver(PlexctlError):
    """The session expired, was revoked, or is no longer active for another reason."""


class Interrupted(Exception):
    """A signal that asks for the end; raised only where the main thread waits."""

    def __init__(self, signum: int) -> None:
        name = next((each.name for each in signal.Signals if each == signum), f"signal {signum}")
        super().__init__("ended by " + name)
        self.signum = signum


# ---------------------------------------------------------------------------------------- system

ON_LINUX = sys.platform.startswith("linux")
DATAGRAM_SECONDS = 2
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)  # no peer's doing
CLOCK_BOOTTIME = 7  # of Linux; in the module time from 3.7 on
_CLOCK = CLOCK_BOOTTIME if ON_LINUX else getattr(time, "CLOCK_MONOTONIC", None)


def elapsed_seconds() -> float:
    """Read a clock that nobody sets and that goes on while the machine sleeps; its times are named ..._on."""
    return time.clock_gettime(_CLOCK) if _CLOCK is not None else time.monotonic()


def start_thread(function: Callable[..., object], *arguments: Any) -> bool:
    """Run it in a thread that does not keep the process alive; False if there are no more threads."""
    def run() -> None:
        if hasattr(signal, "SIGTTOU"):  # which stops all who write to a terminal with `stty tostop`
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        function(*arguments)

    try:
        threading.Thread(target=run, daemon=True).start()
        return True
    except (RuntimeError, MemoryError):
        return False


class Outcome:
    """Runs a function in a thread, from now on; holds what that returns or raises once it is `done`.

    If there are no more threads it runs here, or, without `or_here`, PlexctlError is the result.
    """

    def __init__(self, function: Callable[[], Any], or_here: bool = True) -> None:
        self.done = threading.Event()
        self.value: Any = None  # what it has returned; None before that
        self._error: Optional[BaseException] = None
        if start_thread(self._run, function):
            return
        if or_here:
            self._run(function)
        else:
            self._error = PlexctlError("cannot start a thread (ulimit -u)")
            self.done.set()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self.value = function()
        except BaseException as error:
            self._error = error
        self.done.set()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self.value


def send_record(path: str, data: bytes) -> None:
    """Send one datagram to a unix socket; OSError if it is not taken in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DATAGRAM_SECONDS)
        sock.connect(path)
        sock.sendall(data)


def wait_for(fd: int, mask: int, seconds: Optional[float] = None) -> int:
    """Wait until a descriptor is ready, for ever or for so long; return what poll(2) says, 0 for nothing."""
    poller = select.poll()
    poller.register(fd, mask)
    ready = poller.poll(None if seconds is None else max(0.0, seconds) * 1000)
    return ready[0][1] if ready else 0


def open_nowhere(flags: int) -> int:
    """Open a descriptor that gives nothing and keeps nothing; without /dev/null it is /, where both fail."""
    try:
        return os.open(os.devnull, flags)
    except OSError:
        return os.open(os.sep, os.O_RDONLY)


def end_by_signal(signum: int) -> None:
    """End the process as the signal would have: a shell sees 128 + n and stops its loops."""
    if os.name == "posix":  # on Windows os.kill() would make the number the exit status
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    os._exit(EXIT_SIGNAL_BASE + signum)  # no signal of its own ends process 1 of a container


# ---------------------------------------------------------------------------------------- values

PORT_MAX = 65535
HOST_MAX_CHARACTERS = 253  # RFC 1035, section 2.3.4, as text
SOCKET_PATH_MAX_BYTES = 100  # sun_path has 104 on macOS, 108 on Linux
UUID_PATTERN = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"  # RFC 9562, section 4
LABEL_PATTERN = "[0-9A-Za-z_](?:[0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?"  # of a DNS name; people use _
# the last label is no number, nor 0x...: connect() would take such a name for an address
HOST_NAME_PATTERN = rf"(?:{LABEL_PATTERN}\.)*(?!0[xX]|[0-9]+\.?\Z){LABEL_PATTERN}\.?"
# printable ASCII; scheme, host, port, path
URL_PATTERN = r"(?=[!-~]*\Z)(?i:(https?))://([^/?#@\\]+?)(:[0-9]{1,5})?(/[^?#\\]*)?"
TIME_PATTERN = (r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-5][0-9]|60)"
                r"(\.[0-9]{1,9})?(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))")


def escape(text: str, limit: int = 300) -> str:
    """Return `text` as printable ASCII, at most `limit` characters: it cannot control a terminal."""
    shown = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[:limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def matching(pattern: str, what: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return a parser of text that matches the whole pattern; its ValueError says what it must be."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError("must be " + what)
        return convert(text)
    return parse


parse_uuid = matching(UUID_PATTERN, "a UUID of 8-4-4-4-12 hexadecimal digits", str.lower)
parse_seconds = matching(r"[0-9]{1,9}(\.[0-9]{1,9})?", "a number of seconds, 0 or more", float)


def parse_int(text: str, low: int, high: int) -> int:
    """Parse plain ASCII digits, `low` to `high`."""
    if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return int(text)


def parse_target_host(text: str) -> str:
    """Check a target host as the Node will see it: printable, no white space."""
    if "/" in text:
        raise ValueError("must be a host name or address, not a URL")
    if not 1 <= len(text) <= HOST_MAX_CHARACTERS or not text.isprintable() or " " in text:
        raise ValueError("must be a host name or address without white space")
    if text.count(":") == 1:
        raise ValueError("must be a host name or address alone; the port goes in --port")
    return text


def parse_address(host: str) -> Union[ipaddress.IPv4Address, ipaddress.IPv6Address, None]:
    """Parse an IP address literal, an IPv4-mapped one as IPv4; return None for anything else."""
    # ipaddress takes ::1%lo, and up to 3.9.4 also 010.0.0.1, which is octal for connect()
    if re.search(r"[^0-9a-fA-F:.]|\b0[0-9]+\.|\.0[0-9]", host):
        return None
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return getattr(address, "ipv4_mapped", None) or address
    return None


def is_loopback(host: str) -> bool:
    """Tell whether `host` (a literal or a name) can only be this machine."""
    address = parse_address(host)
    return address.is_loopback if address else host.lower().rstrip(".") == "localhost"


def is_dialable(host: str, from_loopback: bool = False) -> bool:
    """Tell whether a listener endpoint may be at this address; a name is judged once it is looked up.

    - link-local: never, since clouds have their metadata service there
    - loopback, unspecified, multicast: only `from_loopback`, that is, if the control plane is on this machine
    """
    address = parse_address(host.partition("%")[0])  # getaddrinfo gives fe80::1%eth0
    if address is None:
        return True
    if address.is_link_local:
        return False
    return from_loopback or not (address.is_loopback or address.is_unspecified or address.is_multicast)


def join_host_port(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address (RFC 3986, section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host and host[0] != "[" else f"{host}:{port}"


class Endpoint(NamedTuple):
    """A host and a port that passed the strict parsers. `str()` gives host:port."""

    host: str
    port: int

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


def parse_endpoint(text: str, lowest_port: int = 1) -> Endpoint:
    """Parse host:port or [IPv6]:port; the host is an address literal or a DNS name, not 127.1 or 0."""
    left, _, port = text.rpartition(":")
    has_brackets = left.startswith("[") and left.endswith("]")
    host = left[1:-1] if has_brackets else left
    is_name = len(host) <= HOST_MAX_CHARACTERS and re.fullmatch(HOST_NAME_PATTERN, host)
    if len(port) > 5 or has_brackets != (":" in host) or not (is_name or parse_address(host)):
        raise ValueError("must be host:port, with brackets around an IPv6 address")
    return Endpoint(host, parse_int(port, lowest_port, PORT_MAX))


class LocalAddress(NamedTuple):
    """Where the operator's side listens: a literal address and a port, or a unix socket's path."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        return "unix:" + self.path if self.path else join_host_port(self.host, self.port)


def parse_local_address(text: str) -> LocalAddress:
    """Parse 127.0.0.1:0, [::1]:0 or unix:/path. `localhost` becomes 127.0.0.1, to be printed literally."""
    if text.startswith("unix:"):
        path = text[len("unix:"):]
        if path[:1] != "/" or not path.isprintable() or len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
            raise ValueError(f"must be unix: and an absolute path of at most {SOCKET_PATH_MAX_BYTES} bytes")
        return LocalAddress("", 0, path)
    with contextlib.suppress(ValueError):
        host, port = parse_endpoint(re.sub("(?i)^localhost:", "127.0.0.1:", text), lowest_port=0)
        if parse_address(host):
            return LocalAddress(host, port)
    raise ValueError("must be ADDRESS:PORT, such as 127.0.0.1:15432, or unix:/path; ADDRESS is an IP address "
                     "or localhost")


class Server(NamedTuple):
    """A control plane's URL; the host in lower case, no slash at the end of `prefix`."""

    scheme: str
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{join_host_port(self.host, self.port)}{self.prefix}"


def parse_server(text: str, allow_http: bool) -> Server:
    """Parse an absolute https URL; http only for loopback, or with `allow_http`."""
    found = re.fullmatch(URL_PATTERN, text)
    if not found:
        raise ValueError("must be an absolute https:// URL without user info, query, fragment or white space")
    scheme, host, port, prefix = found.groups("")
    is_plain = scheme.lower() == "http"
    try:
        endpoint = parse_endpoint(host.lower() + (port or (":80" if is_plain else ":443")))
    except ValueError:
        raise ValueError("has no valid host and port") from None
    if is_plain and not allow_http and not is_loopback(endpoint.host):
        raise ValueError("must be https:// (plain http is for loopback; --allow-http permits it)")
    return Server(scheme.lower(), endpoint.host, endpoint.port, prefix.rstrip("/"))


def parse_time(text: str) -> float:
    """Parse an RFC 3339 time into seconds since the epoch. A leap second counts as the one before it."""
    found = re.fullmatch(TIME_PATTERN, text)
    if not found:
        raise ValueError("is not an RFC 3339 time")
    *numbers, fraction, sign, zone_hours, zone_minutes = found.groups("0")
    year, month, day, hour, minute, second = map(int, numbers)
    moment = datetime.datetime(year, month, day, hour, minute, min(second, 59), tzinfo=datetime.timezone.utc)
    offset = int(zone_hours) * 3600 + int(zone_minutes) * 60
    return moment.timestamp() + float(fraction) + (offset if sign == "-" else -offset)


def parse_json(raw: bytes) -> Any:
    """Parse strict JSON (RFC 8259): UTF-8, no NaN, no duplicate keys, no lone surrogates."""
    def unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("duplicate key")
        return fields

    with contextlib.suppress(ValueError, RecursionError, MemoryError):
        # Python 3.6 needs 15 s for an int of 1 MiB; as a float it is infinite, which allow_nan=False refuses
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=float)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return document
    raise ValueError("not valid JSON")  # not above: JSONDecodeError as its context would hold the text


def show_count(count: int, noun: str) -> str:
    """Return 1 session, 2 sessions."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def show_bytes(count: int) -> str:
    """Format a byte count for people: 512 B, 1.5 KiB, 3.2 GiB."""
    power = min(4, max(0, count.bit_length() - 1) // 10)
    return f"{count / 1024 ** power:.1f} {' KMGT'[power]}iB" if power else f"{count} B"


def show_seconds(seconds: float) -> str:
    """Format a duration for people: 5s, 2m05s, 1h02m."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


ERROR_WORDS = (  # the first row that fits counts
    ((http.client.RemoteDisconnected, ssl.SSLEOFError, ssl.SSLZeroReturnError),
     "the server closed the connection"),
    (http.client.LineTooLong, "a header is too long"),
    (http.client.IncompleteRead, "the answer was cut off"),
    (http.client.BadStatusLine, "the answer is not HTTP"),
    (http.client.HTTPException, "the answer is not HTTP/1.1, or has too many headers"),  # no class of its own
    ((socket.timeout, TimeoutError), "timed out"))


def describe_error(error: BaseException) -> Tuple[str, bool]:
    """Return why something failed, and whether the same may succeed a little later.

    Most texts of exceptions are not used: they may hold a header or a body.
    """
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, PlexctlError):
        return str(error), error.passing
    for kinds, words in ERROR_WORDS:
        if isinstance(error, kinds):
            return words, True
    reason = getattr(error, "reason", None)  # of an SSLError
    if isinstance(error, ssl.CertificateError) or reason == "CERTIFICATE_VERIFY_FAILED":
        words = escape(getattr(error, "verify_message", str(error)))  # 3.6 has no verify_message
        advice = " (--ca-file names another CA)" if re.search("issuer|self.signed", words) else ""
        return "certificate not trusted: " + words + advice, False
    if isinstance(error, ssl.SSLError) and reason:
        return "TLS failed: " + escape(reason.replace("_", " ").lower()), False
    if isinstance(error, OSError) and error.strerror:
        return escape(error.strerror), True
    refusal = re.match("Tunnel connection failed: (.*)", str(error))  # http.client's words
    if refusal:
        words = escape(refusal.group(1))
        return "the proxy refused: " + words, not words.startswith("407")  # three bad log-ins lock an account
    return type(error).__name__, True


def show_error(error: BaseException) -> str:
    """Return why something failed, in words that hold no secret."""
    return describe_error(error)[0]


# ----------------------------------------------------------------------------------- credentials

CONFIG_SHAPE = ('{"default": "prod", "profiles": {"prod": '
                '{"server": "https://plexsphere.example.com", "token": "psk_..."}}}')
SECRET_FILE_MAX_BYTES = 64 * 1024
CA_FILE_MAX_BYTES = 16 * 1024 * 1024
# open() would wait for the writer of a FIFO; Windows has neither flag
OPEN_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
ALL_BITS, WRITE_BITS = 0o077, 0o022  # of the group and of others
TOKEN_FAULTS = (  # the first that matches at the beginning counts
    (r"\Z", "is empty"),
    # that of UTF-8, and those of UTF-16 as read_token_file decodes them
    ("\ufeff|\udcff\udcfe|\udcfe\udcff", "starts with a byte-order mark; save it as plain ASCII"),
    (r"(?i)bearer ", 'starts with "Bearer "; give the token alone'),
    (r".*[\r\n]", "contains a line break"),
    (r".*[ \t]", "contains a space"),
    (r".*[^!-~]", "contains a character that is not printable ASCII"),
    (r".{8193}", "is longer than 8192 characters"))


class Secret:
    """A string that does not show itself; `source`, for messages, says where it came from."""

    __slots__ = ("_value", "source")

    def __init__(self, value: str, source: str = "the caller") -> None:
        self._value = value
        self.source = source

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled or copied")


def check_token(token: Secret) -> Secret:
    """Return a bearer token without its line end; CredentialsError says what is wrong with the rest."""
    text = re.sub(r"\r?\n\Z", "", token.reveal())
    for pattern, fault in TOKEN_FAULTS:
        if re.match(pattern, text, re.DOTALL):
            raise CredentialsError(f"{token.source}: the token {fault}")
    return Secret(text, token.source)


def show_word(word: str) -> str:
    """Quote a word of the command line for a message; "" if it may be a token, and is no existing path."""
    may_be_token = len(word) > 20 or word.lower().startswith("psk")
    return "" if may_be_token and not os.path.isdir(os.path.dirname(word)) else f" '{escape(word)}'"


def find_file_fault(path: str, status: os.stat_result, forbidden_bits: int) -> str:
    """Say why a file is not safe: it must be ours or root's, without these permission bits. "" if it is."""
    if os.name != "posix":
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"is owned by uid {status.st_uid}, must be yours or root's"
    mode = stat.S_IMODE(status.st_mode)
    advice = ("chmod go-w " if forbidden_bits == WRITE_BITS else "chmod 600 ") + escape(path)
    return f"permissions {mode:04o} are too open; run {advice}" if mode & forbidden_bits else ""


def is_standard_input(path: str) -> bool:
    """Tell whether this names the file that is descriptor 0: "-", /dev/stdin, or what was redirected."""
    try:
        return path == "-" or os.path.samestat(os.stat(path), os.fstat(0))
    except (OSError, ValueError):
        return False


def read_own_file(path: str, source: str, forbidden_bits: int = ALL_BITS, limit: int = SECRET_FILE_MAX_BYTES,
                  kind: Type[PlexctlError] = CredentialsError, advice: str = "") -> bytes:
    """Read a file on which others have none of the `forbidden_bits`.

    It is judged once it is open, so that nothing can be swapped in between. Two names are special:

    - "-": descriptor 0 from where it stands, unchecked
    - a path that leads to what descriptor 0 is, such as /dev/stdin: descriptor 0, or --stdio or COMMAND could
      read it once more; a file is checked and read from its beginning, anything else unchecked

    Raises CredentialsError for a file that is not safe, `kind` for one that cannot be read.
    """
    at_stdin = is_standard_input(path)
    if at_stdin and sys.stdin is None:
        raise kind(f"{source}: standard input is closed")
    try:
        with open(0 if at_stdin else path, "rb", closefd=not at_stdin,
                  opener=lambda name, flags: os.open(name, flags | OPEN_AT_ONCE)) as file:
            status = os.fstat(file.fileno())
            is_file = stat.S_ISREG(status.st_mode)
            is_checked = path != "-" and (is_file or not at_stdin)  # else the shell has opened it
            if is_checked:
                if not is_file and not stat.S_ISFIFO(status.st_mode):
                    raise kind(f"{source}: must be a regular file or a pipe")
                fault = find_file_fault(path, status, forbidden_bits)
                if fault:
                    raise CredentialsError(f"{source}: {fault}{advice}")
                if is_file:  # descriptor 0 may stand elsewhere
                    file.seek(0)
            if os.name == "posix":  # wait for what a pipe's writer has yet to send
                os.set_blocking(file.fileno(), True)
            raw = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise kind(f"{source}: cannot be read: {show_error(error)}") from error
    if len(raw) > limit:
        raise kind(f"{source}: is larger than {limit} bytes")
    return raw


def find_own_file(variable: str, below_home: str, name: str, environ: Environ) -> str:
    """Return the path of our file in an XDG base directory (freedesktop.org); "" without a home directory."""
    base = environ.get(variable, "")
    if not os.path.isabs(base):
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), below_home)
    return os.path.join(base, "plexctl", name) if os.path.isabs(base) else ""


def is_object(value: Any, **types: type) -> bool:
    """Tell whether this is a JSON object with only these fields, each of its type."""
    return isinstance(value, dict) and all(
        name in types and isinstance(value[name], types[name]) for name in value)


class Source(NamedTuple):
    """A place that may have a server, or a token as it was found, or both."""

    name: str = ""  # of the server, for messages
    server: str = ""
    token: Optional[Secret] = None
    is_profile: bool = False  # its token goes to its own server only


def read_token_file(path: str) -> Secret:
    """Read --token-file; a message names it, unless it may be the token itself."""
    is_path = path.startswith(("/", ".", "~", "-")) or os.path.lexists(path)
    source = "--token-file" + (" " + escape(path) if is_path else show_word(path))
    raw = read_own_file(path, source, advice=" (a mounted secret: --token-file - < FILE)")
    return Secret(raw.decode("utf-8", "surrogateescape"), source)


def read_profile(name: str, environ: Environ) -> Source:
    """Read a profile of the config file, the default one for ""."""
    path = find_own_file("XDG_CONFIG_HOME", ".config", "config.json", environ)
    file = "config file " + escape(path)
    try:
        document = parse_json(read_own_file(path, file))
    except ValueError:
        document = None
    except CredentialsError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
        if name:
            raise CredentialsError(f"--profile: there is no {file}; expected {CONFIG_SHAPE}") from None
        return Source()
    profiles = document.get("profiles") if is_object(document, default=str, profiles=dict) else None
    if profiles is None or not all(is_object(entry, server=str, token=str) for entry in profiles.values()):
        raise CredentialsError(f"{file}: expected {CONFIG_SHAPE}")
    wanted = name or document.get("default")
    if not wanted:
        return Source()
    if wanted not in profiles:
        flag, available = "--profile" if name else '"default"', escape(", ".join(sorted(profiles)))
        raise CredentialsError(f"{flag}: no profile{show_word(wanted)} in {file}; "
                               f"available: {available or 'none'}")
    server, token = profiles[wanted].get("server", ""), profiles[wanted].get("token")
    return Source("server of the profile" if name else "server of the default profile", server,
                  None if token is None else Secret(token, f"token of a profile in {file}"), is_profile=True)


def check_server(text: str, source: str, allow_http: bool) -> Server:
    """Parse a server's URL; UsageError names the source."""
    try:
        return parse_server(text, allow_http)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def resolve_credentials(server_flag: Optional[str], profile_flag: Optional[str], token_file: Optional[str],
                        allow_http: bool, environ: Environ) -> Tuple[Server, Secret]:
    """Find server and bearer token, each in: its flag, --profile, the environment, the default profile.

    A token that stands in a profile goes to that profile's own server and to no other. ControlPlane checks
    what the token consists of.
    """
    variable = environ.get("PLEXSPHERE_TOKEN")
    sources = [
        Source("--server", server_flag or ""),
        read_profile(profile_flag, environ) if profile_flag else Source(),
        Source("PLEXSPHERE_URL", environ.get("PLEXSPHERE_URL", ""),
               Secret(variable, "PLEXSPHERE_TOKEN") if variable else None)]
    if not any(each.server for each in sources) or not (token_file or any(each.token for each in sources)):
        sources.append(read_profile("", environ))
    server_source = next((each for each in sources if each.server), Source())
    token_source = next((each for each in sources if each.token), Source())
    if not server_source.server:
        raise UsageError("no server: give --server, a profile, or PLEXSPHERE_URL")
    server = check_server(server_source.server, server_source.name, allow_http)
    if token_file:
        return server, read_token_file(token_file)
    if not token_source.token:
        raise CredentialsError("no credentials: give --token-file, a profile, or PLEXSPHERE_TOKEN")
    if token_source.is_profile:
        own = token_source.server and check_server(token_source.server, token_source.name, allow_http)
        if not own or own[:3] != server[:3]:  # the same scheme, host and port (RFC 6454, section 5)
            raise CredentialsError("the token of a profile goes only to that profile's own server, and "
                                   f"{server_source.name} names another one; give --token-file for that")
    return server, token_source.token


# --------------------------------------------------------------------------------- control plane
#
# ControlPlane.issue, get and revoke each _send a request, _judge the answer, and parse it. _send has a thread
# perform an Exchange with urllib's opener, and waits until that is done or its time is up.

ISSUE, GET, REVOKE = "IssueSession", "GetSession", "RevokeSession"
SUCCESS = range(200, 300)
EXPECTED = {ISSUE: {201}, GET: {200}, REVOKE: {*SUCCESS, 404, 409, 410}}  # one that is gone counts as revoked
PASSING = {ISSUE: {502, 503, 504}, GET: {502, 503, 504}, REVOKE: {429, *range(500, 600)}}  # worth another try
# after these there is no session; but a server may fail once it has issued one, or a gateway lose the answer
NONE_ISSUED = {*range(300, 500), 501, 503}  # 409 with exceptions, see issue()
ISSUE_ATTEMPTS = 3
JITTER_SECONDS = 0.2
RETRY_AFTER_MAX_SECONDS = 5
SILENT_SECONDS = 5  # after which a server that has not answered is mentioned
CANCEL_POLL_SECONDS = 0.1
BODY_MAX_BYTES = 1024 * 1024
FINDABLE_CHARACTERS = 8  # of a secret; a shorter one is in many texts by chance
# the scheme may be missing; (?!http:) refuses http:USER@HOST, which lacks the slashes
PROXY_PATTERN = r"(?:http://|(?!http:))(?:(?:[\w.~!$&'()*+,;=:-]|%[0-9A-F]{2})*@)?([^/@]+?)(:[0-9]+)?/?"


class SessionRequest(NamedTuple):
    """What an operator asks for (schema IssueSessionRequest, kind tcp)."""

    project_id: str
    resource_id: str
    host: str
    port: int
    ttl_seconds: int = 0  # 0: the server's default


class Session(NamedTuple):
    """What GetSession returns (schema Session), the fields that matter here."""

    session_id: str  # as the server wrote it when it issued the session
    status: str  # active, revoked, expired
    issued_at: float  # seconds since the epoch, by the server's clock; 0: not told
    listener_endpoint: Optional[Endpoint]  # None until the Node has reported it
    revoke_reason: str  # "" where there is none


class IssuedSession(NamedTuple):
    """What IssueSession returns (schema IssuedSession), checked."""

    session_id: str  # as the server wrote it
    token: Secret  # the one-time session token
    expires_at: str  # RFC 3339, as the server wrote it
    lifetime_seconds: float  # by the server's own clock
    issued_on: float  # elapsed_seconds() when it was asked for
    session: Session
    listener_endpoint: Optional[Endpoint]


def find_proxy(server: Server, environ: Environ) -> str:
    """Return the proxy's URL for an https server: HTTPS_PROXY unless NO_PROXY names the host; "" for none."""
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY") or ""
    exempt = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    is_exempt = urllib.request.proxy_bypass_environment(  # type: ignore[attr-defined]
        join_host_port(server.host, server.port), {"no": exempt})
    if not proxy or is_exempt or server.scheme == "http":  # of plain http it would see the bearer token
        return ""
    found = re.fullmatch(PROXY_PATTERN, proxy, re.ASCII | re.IGNORECASE)
    try:
        host, port = found.groups() if found else ("", "")
        parse_endpoint(host + (port or ":80"))
    except ValueError:  # urllib would take any other kind for plain CONNECT
        raise UsageError("HTTPS_PROXY: must be http://[USER:PASSWORD@]HOST:PORT, others are not supported; "
                         "percent-encode special characters in user name and password (%40 for @)") from None
    return proxy if "://" in proxy else "http://" + proxy


def create_tls_context(ca_file: Optional[str] = None) -> ssl.SSLContext:
    """Create a context that verifies certificates and host names, with TLS 1.2 at least."""
    ca_text, fault = None, "TLS cannot be set up (see SSL_CERT_FILE and SSLKEYLOGFILE)"
    if ca_file:
        source = "--ca-file " + escape(ca_file)
        fault = source + ": not a usable PEM bundle"
        # whoever can write it decides which server gets the bearer token; comments may be in UTF-8
        raw = read_own_file(ca_file, source, WRITE_BITS, CA_FILE_MAX_BYTES, UsageError)
        ca_text = raw.decode("ascii", "ignore")
        if "-----BEGIN CERTIFICATE-----" not in ca_text:  # no text at all would mean the system's trust
            raise UsageError(fault)
    try:
        context = ssl.create_default_context(cadata=ca_text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{fault}: {show_error(error)}") from error
    if hasattr(ssl, "TLSVersion"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


class Exchange:
    """The answer to one request, as far as it has come: `status`, `headers`, `body`, and `fault`.

    `perform` runs in a thread of its own, so that whoever waits for it can give up: a time-out of
    urllib's is for each recv, and the look-up of a name has none. Whoever gives up sets `fault`, then reads
    `sent`; the thread sets `sent`, then reads `fault`: so nothing is given up and sent unnoticed.
    """

    def __init__(self, operation: str, server_name: str, context: Optional[ssl.SSLContext]) -> None:
        self.operation = operation
        self.server_name = server_name
        self.context = context  # of TLS; None: plain http
        self.status = 0  # of HTTP; 0: none has come
        self.headers: Any = {}  # email.message.Message
        self.body = bytearray()
        self.fault = ""  # why there is no whole answer, or none is waited for
        self.passing = True  # another try may get one
        self.sent = False  # the server may have the request
        self.connection: Optional[PlaneConnection] = None

    def perform(self, request: urllib.request.Request, proxy: str) -> None:
        """Send the request, through a proxy or not, and read the answer."""
        try:
            # no other handlers: urllib's default ones carry the bearer token to wherever a redirect points
            # and to the proxy of plain http, open file: URLs, and raise for the status of an error
            opener = urllib.request.OpenerDirector()
            opener.add_handler(PlaneHandler(self))
            if proxy:
                opener.add_handler(urllib.request.ProxyHandler({"https": proxy}))
            with opener.open(request, timeout=CONNECT_SECONDS) as response:
                self.status, self.headers = response.status, response.headers
                self._read_body(response)
        except Exception as error:  # OSError, HTTPException, ValueError, RecursionError, MemoryError, ...
            if not self.fault:
                self.fault, self.passing = describe_error(error)  # the error itself may hold the request

    def _read_body(self, response: Any) -> None:
        """Read the body by read1(): read() takes a chunk of size -1 for no limit, and hides an early end."""
        length = response.length  # None: in chunks, or until the connection ends
        while len(self.body) != length and not self.fault:
            piece = response.read1(BODY_MAX_BYTES)
            if not piece:
                break
            self.body += piece
            if len(self.body) > BODY_MAX_BYTES:
                raise PlexctlError(f"the answer is larger than {BODY_MAX_BYTES} bytes", passing=True)
        if length not in (None, len(self.body)):
            raise http.client.IncompleteRead(b"")

    def give_up(self, why: str) -> None:
        """Make the thread end: at once if connected; amid the body, which urllib reads, at its next piece."""
        self.fault = why
        sock = self.connection and self.connection.sock
        if sock:
            with contextlib.suppress(OSError):  # it is not open any more
                # SSLSocket's own shutdown() turns TLS off first: the request could then go out in the clear
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


class PlaneHandler(urllib.request.AbstractHTTPHandler):
    """urllib's handler of http and https for one Exchange; it connects by a PlaneConnection."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(PlaneConnection, request, exchange=self._exchange)  # type: ignore[arg-type]

    https_open = http_open  # OpenerDirector finds these by their names
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class PlaneConnection(http.client.HTTPConnection):
    """http.client's connection for one Exchange, with TLS if that has a context; `host` is HOST:PORT."""

    def __init__(self, host: str, exchange: Exchange, **options: Any) -> None:
        super().__init__(host, **options)
        self._exchange = exchange
        exchange.connection = self

    def connect(self) -> None:
        """Connect, through a proxy if there is one; from then on the request counts as sent."""
        super().connect()
        exchange = self._exchange
        if exchange.context is not None:
            # the handshake is a step of its own, so that give_up() can shut this socket down as well
            self.sock = exchange.context.wrap_socket(self.sock, server_hostname=exchange.server_name,
                                                     do_handshake_on_connect=False)
            self.sock.do_handshake()
        exchange.sent = True  # before `fault` is read, see Exchange
        if exchange.fault:
            raise TimeoutError
        self.sock.settimeout(EXCHANGE_SECONDS)


def find_session_id(exchange: Exchange) -> str:
    """Return the id of the session that a success names, however malformed the rest is; "" if none."""
    raw = bytes(exchange.body) if exchange.status in SUCCESS else b""
    if raw.startswith(b"\x1f\x8b"):  # gzip, which nobody asked for
        with contextlib.suppress(zlib.error):
            raw = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(raw, BODY_MAX_BYTES)
    text = raw.replace(b"\0", b"").decode("latin-1")  # what is ASCII in UTF-8, UTF-16 and UTF-32
    pattern = rf'"%s"\s*:\s*"({UUID_PATTERN})"'
    found = re.search(pattern % "session_id", text) or re.search(pattern % "id", text)  # of the Session in it
    return found.group(1) if found else ""


def parse_http_date(text: Optional[str]) -> float:
    """Parse a Date header (RFC 9110, section 5.6.7) into seconds since the epoch; 0 if it is malformed."""
    try:
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0


def parse_retry_after(text: Optional[str]) -> Optional[float]:
    """Parse a Retry-After header (RFC 9110, section 10.2.3) into seconds, RETRY_AFTER_MAX_SECONDS at most."""
    if text and re.fullmatch("[0-9]+", text):
        return min(float(text), RETRY_AFTER_MAX_SECONDS)
    moment = parse_http_date(text)
    return max(0.0, min(moment - time.time(), RETRY_AFTER_MAX_SECONDS)) if moment else None


def parse_field(operation: str, fields: Dict[str, Any], name: str, parse: Callable[[Any], Any],
                kind: type = str, optional: bool = False) -> Any:
    """Return a field of an answer as parsed by `parse`, which raises ValueError; it must be of this kind."""
    value = fields.get(name)
    if optional and value is None:
        return None
    try:
        if not isinstance(value, kind):
            raise ValueError("must be present and of the right type")
        return parse(value)
    except ValueError as error:  # its text is ours; only that of an endpoint shows the value
        raise TransportError(f"{operation}: the answer's {name} {error}") from None


class ControlPlane:
    """IssueSession, GetSession and RevokeSession of one server; safe to use from several threads.

    Every call ends within its limit, and raises nothing but PlexctlError: UsageError for what was given here,
    TransportError for no or a malformed answer, ApiError for an error answer. `cancel` ends pauses and more
    attempts, and gives up a GetSession at once (Cancelled), but not the others, whose outcome matters.
    `say` takes a line per exchange, never a header or a body; `notice` one when the server is silent.
    """

    def __init__(self, server: Server, token: Secret, ca_file: Optional[str] = None,
                 environ: Optional[Environ] = None, cancel: Optional[threading.Event] = None,
                 say: Report = lambda line: None, notice: Report = lambda line: None) -> None:
        self.server = server
        self.cancel = cancel or threading.Event()
        self._token = check_token(token)
        self._session_tokens: Dict[str, Secret] = {}  # by session_id, until it is revoked
        self._say = say
        self._notice = notice
        self._said_silent = False
        self._proxy = find_proxy(server, os.environ if environ is None else environ)
        self._peer = str(server) + (" through HTTPS_PROXY" if self._proxy else "")
        self._context = create_tls_context(ca_file) if server.scheme == "https" else None

    def issue(self, request: SessionRequest,
              on_issued: Callable[[str], None] = lambda session_id: None) -> IssuedSession:
        """Issue a session, with the same idempotency key in each of at most ISSUE_ATTEMPTS attempts.

        `on_issued(session_id)` is called as soon as an id can be read, even from an answer that is
        malformed or no 201, and before it is judged: the caller can revoke the session whatever follows.
        A TransportError that it raises ends the call.
        """
        digits = os.urandom(16).hex()  # the module uuid runs other programs on 3.6
        body: Dict[str, Any] = {
            "resource_id": request.resource_id, "kind": "tcp",
            "target": {"tcp": {"host": request.host, "port": request.port}},
            "idempotency_key": f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"}
        if request.ttl_seconds:
            body["requested_ttl_seconds"] = request.ttl_seconds
        # may_exist: one of the attempts may have left a session; session_id: the last one that was told of
        asked_on, may_exist, session_id = elapsed_seconds(), False, ""
        for attempt in range(1, ISSUE_ATTEMPTS + 1):
            exchange = self._send(ISSUE, f"/v1/projects/{request.project_id}/sessions", body)
            try:
                found = find_session_id(exchange)  # also if it was cut off, or is no 201
                if found and found != session_id:
                    session_id = found
                    on_issued(session_id)
                self._judge(exchange)
                issued = self._parse_issued(exchange, asked_on)
                if issued.session_id != session_id:  # JSON can also write it with escapes
                    on_issued(issued.session_id)
                return issued
            except (TransportError, ApiError) as failure:
                error: PlexctlError = failure  # for what follows the try
            is_under_way = exchange.status == 409 and error.passing  # by an earlier attempt
            may_exist = may_exist or is_under_way or (exchange.sent and exchange.status not in NONE_ISSUED)
            if not error.passing or attempt == ISSUE_ATTEMPTS or self.cancel.is_set():
                break
            wait = error.retry_after_seconds
            if wait is None:
                wait = attempt * POLL_MIN_SECONDS + JITTER_SECONDS * (os.urandom(1)[0] / 255 - 0.5)
            self._say(f"{error}; trying again in {wait:.1f} s")
            if self.cancel.wait(wait):
                break
        error.may_exist = may_exist and not session_id  # one whose id is known is the caller's to revoke
        text = str(error) + (f" (after {attempt} attempts)" if attempt > 1 else "")
        if error.may_exist:
            text += "; a session may exist all the same, it will expire on its own"
        error.args = (text,)
        raise error

    def get(self, project_id: str, session_id: str, seconds: float = EXCHANGE_SECONDS) -> Session:
        """Return the session as the control plane sees it now."""
        exchange = self._send(GET, f"/v1/projects/{project_id}/sessions/{session_id}", None, seconds)
        self._judge(exchange)
        return self._parse_session(GET, self._parse_body(exchange), session_id)

    def revoke(self, project_id: str, session_id: str, seconds: float = EXCHANGE_SECONDS) -> None:
        """Revoke the session. One that is gone already (404, 409, 410) counts as revoked."""
        path = f"/v1/projects/{project_id}/sessions/{session_id}/revoke"
        self._judge(self._send(REVOKE, path, {"revoke_reason": "operator_request"}, seconds))
        self._session_tokens.pop(session_id, None)

    def _send(self, operation: str, path: str, body: Optional[Dict[str, Any]],
              seconds: float = EXCHANGE_SECONDS) -> Exchange:
        """Perform an exchange; give it up when its time is up, a GetSession also when the run is ending."""
        request = urllib.request.Request(str(self.server) + path, headers={
            "Accept": "application/json, application/problem+json", "User-Agent": "plexctl/" + __version__,
            "Authorization": "Bearer " + self._token.reveal()})
        if body:  # and then it is a POST
            request.data = json.dumps(body).encode("ascii")
            request.add_header("Content-Type", "application/json")
        exchange = Exchange(operation, self.server.host, self._context)
        began = elapsed_seconds()
        performed = Outcome(lambda: exchange.perform(request, self._proxy))
        while not performed.done.wait(CANCEL_POLL_SECONDS):
            waited = elapsed_seconds() - began
            if operation == GET and self.cancel.is_set():
                exchange.give_up("the run is ending")
                raise Cancelled(f"{operation}: given up, the run is ending")
            if waited >= seconds:
                exchange.give_up(f"timed out after {seconds:.3g} s")
                break
            if waited >= SILENT_SECONDS and not self._said_silent:  # once, until it answers
                self._said_silent = True
                self._notice(f"still waiting for {self._peer} to answer {operation}")
        if exchange.status:
            self._said_silent = False
            took = elapsed_seconds() - began
            self._say(f"{request.get_method()} {path}: {exchange.status}, {took:.3f} s")
        return exchange

    def _judge(self, exchange: Exchange) -> None:
        """Raise TransportError if there is no whole answer, ApiError for an unexpected status."""
        status = exchange.status
        if exchange.fault and (not status or status in SUCCESS):  # an error's status is enough
            tried = "no complete answer from" if exchange.sent else "cannot connect to"
            raise TransportError(f"{exchange.operation}: {tried} {self._peer}: {exchange.fault}",
                                 passing=exchange.passing)
        if status in EXPECTED[exchange.operation]:
            return
        problem: Dict[str, Any] = {}  # details (RFC 9457), if it has any
        with contextlib.suppress(TransportError):
            problem = self._parse_body(exchange)
        title, detail, code = (self._show(problem.get(name)) for name in ("title", "detail", "code"))
        text = f"{exchange.operation}: {status} {title or http.client.responses.get(status, '')}".rstrip()
        text += (f": {detail}" if detail else "") + (f" ({code})" if code else "")
        for name in ("reason", "relation_path", "correlation_id"):
            value = self._show(problem.get(name))
            text += f"; {name.replace('_', ' ')} {value}" if value else ""
        retry_after = parse_retry_after(exchange.headers.get("Retry-After"))
        is_rate_limit = status == 429 and retry_after is not None  # 429 without it is the limit of sessions
        is_under_way = status == 409 and code == "idempotent_replay"  # by the first request with this key
        code_of_403 = EXIT_REBAC_DENIED if code == "rebac_denied" else EXIT_FORBIDDEN
        raise ApiError(text + self._advise(exchange, code, is_rate_limit), status=status, code=code,
                       passing=status in PASSING[exchange.operation] or is_rate_limit or is_under_way,
                       retry_after_seconds=retry_after,
                       exit_code={401: EXIT_CREDENTIALS, 403: code_of_403}.get(status, EXIT_FAILURE))

    def _advise(self, exchange: Exchange, code: str, is_rate_limit: bool) -> str:
        """Say what an operator can do about an error answer."""
        status = exchange.status
        if status < 300:
            return "; the API does not answer like this, check --server"
        if status < 400:
            location = self._show(exchange.headers.get("Location"))
            return "; a redirect is never followed" + (f": {location}" if location else "")
        if status in (404, 405, 501):
            return "; check --project-id, --resource-id and --server"
        if is_rate_limit:
            return "; too many requests, try again later"
        if status == 429:
            return ("; sessions count until they expire or are revoked, also those of print mode; "
                    "--max-sessions limits those of --proxy")
        advice = "; the token is from " + self._token.source if status in (401, 403) else ""
        if status == 401 and code == "step_up_required":
            challenge = " ".join(exchange.headers.get_all("WWW-Authenticate", []))
            found = re.search(r'acr_values\s*=\s*("[^"]+"|[^\s",]+)', challenge)
            acr_values = " with acr_values " + self._show(found.group(1).strip('"')) if found else ""
            advice += f"; re-authenticate{acr_values} and try again"
        return advice

    def _parse_body(self, exchange: Exchange) -> Dict[str, Any]:
        """Return the JSON object of an answer; any other JSON counts as one without fields."""
        try:
            document = parse_json(bytes(exchange.body))
        except ValueError:
            kinds = [f"{name} {self._show(exchange.headers[name])}"
                     for name in ("Content-Type", "Content-Encoding") if name in exchange.headers]
            raise TransportError(f"{exchange.operation}: the answer is not the API's JSON "
                                 f"({', '.join(kinds) or 'no Content-Type'}); check --server") from None
        return document if isinstance(document, dict) else {}

    def _parse_issued(self, exchange: Exchange, asked_on: float) -> IssuedSession:
        fields = self._parse_body(exchange)
        session_id = parse_field(ISSUE, fields, "session_id", matching(UUID_PATTERN, "a UUID"))
        token = parse_field(ISSUE, fields, "token", matching("[!-~]{1,65536}", "printable ASCII", Secret))
        self._session_tokens[session_id] = token
        expires = parse_field(ISSUE, fields, "expires_at", parse_time)
        inner = parse_field(ISSUE, fields, "session", dict, kind=dict)
        session = self._parse_session(ISSUE, inner, session_id)
        issued_at = session.issued_at or parse_http_date(exchange.headers.get("Date")) or time.time()
        endpoint = parse_field(ISSUE, fields, "listener_endpoint", self._parse_endpoint, optional=True)
        return IssuedSession(session_id, token, fields["expires_at"], expires - issued_at, asked_on,
                             session, endpoint or session.listener_endpoint)

    def _parse_session(self, operation: str, fields: Dict[str, Any], session_id: str) -> Session:
        parse_field(operation, fields, "id", matching("(?i)" + session_id, "that of the session"))
        parse_field(operation, fields, "kind", matching("tcp", "tcp"))
        parse_status = matching("active|revoked|expired", "active, revoked or expired")
        status = parse_field(operation, fields, "status", parse_status)
        issued_at = parse_field(operation, fields, "issued_at", parse_time, optional=True)
        endpoint = parse_field(operation, fields, "listener_endpoint", self._parse_endpoint, optional=True)
        revoke_reason = self._show(fields.get("revoke_reason"))
        return Session(session_id, status, issued_at or 0.0, endpoint, revoke_reason)

    def _parse_endpoint(self, text: str) -> Endpoint:
        if self._conceal(text) != text:
            raise ValueError("contains a token")
        endpoint = parse_endpoint(text)
        if not is_dialable(endpoint.host, is_loopback(self.server.host)):
            raise ValueError(f"{endpoint} is refused: on this machine, link-local or multicast")
        return endpoint

    def _conceal(self, text: str) -> str:
        """Remove the tokens from a text: a server may repeat what it was sent, in upper or lower case."""
        for secret in [self._token, *self._session_tokens.copy().values()]:  # other threads change it
            if len(secret.reveal()) >= FINDABLE_CHARACTERS:
                text = re.sub(re.escape(secret.reveal()), "(secret)", text, flags=re.IGNORECASE)
        return text

    def _show(self, value: Any) -> str:
        """Format a string of the server's, or a list of strings, for people; "" for anything else."""
        words = value if isinstance(value, list) else [value]
        return escape(self._conceal(", ".join(word for word in words if isinstance(word, str))))


# ----------------------------------------------------------------------------------------- audit

SYSLOG_SOCKETS = ("/dev/log", "/var/run/syslog")  # Linux and others; macOS
SYSLOG_AUTHPRIV_INFO = 10 * 8 + 6  # RFC 3164, section 4.1.1: facility * 8 + severity


class AuditLog:
    """The record of --reveal-secrets; it fails closed.

    The file is opened before a session is issued, and `record` returns only once the whole line is written
    and synced. The handlers of the logger plexctl.audit, if it has any, and syslog get a copy.
    """

    def __init__(self, environ: Environ, report: Report) -> None:
        self._file: Any = None
        self._environ = environ
        self._report = report
        given = environ.get("PLEXCTL_AUDIT_LOG", "")
        path = given or find_own_file("XDG_STATE_HOME", ".local/state", "audit.log", environ)
        self._source = "audit log " + (escape(path) or "without a home directory")
        more_flags = getattr(os, "O_NOFOLLOW", 0) | OPEN_AT_ONCE
        umask = os.umask(0o077)  # from 3.7 on the mode of os.makedirs is that of the last directory alone
        try:
            if not given:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = open(path, "a+b", 0,
                              opener=lambda name, flags: os.open(name, flags | more_flags, 0o600))
            status = os.fstat(self._file.fileno())
            is_file = stat.S_ISREG(status.st_mode)  # a device might keep nothing
            fault = find_file_fault(path, status, WRITE_BITS) if is_file else "must be a regular file"
        except (OSError, ValueError) as error:
            fault = "cannot be opened: " + show_error(error)
        finally:
            os.umask(umask)
        if fault:
            self.close()
            raise PlexctlError(f"{self._source}: {fault} (PLEXCTL_AUDIT_LOG names another)")

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # what counts was synced; it was never opened
            self._file.close()

    def record(self, server: Server, request: SessionRequest, issued: IssuedSession) -> None:
        """Write one JSON object in one line with one write; raise unless it is verifiably there."""
        uid = os.getuid() if os.name == "posix" else None
        user = self._environ.get("USERNAME", "") if uid is None else str(uid)
        with contextlib.suppress(KeyError, NameError):  # it has no name; Windows has no pwd
            user = pwd.getpwuid(os.getuid()).pw_name
        message = json.dumps({
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": "session_token_revealed",
            "user": user, "uid": uid, "sudo_user": self._environ.get("SUDO_USER"),
            "hostname": socket.gethostname(), "pid": os.getpid(), "server": str(server),
            "project_id": request.project_id, "resource_id": request.resource_id,
            "session_id": issued.session_id, "target": join_host_port(request.host, request.port),
            "expires_at": issued.expires_at})
        logger = logging.getLogger("plexctl.audit")
        logger.propagate = False  # a handler of the root is no audit log, and may write to stderr
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
        try:
            if logger.disabled or not logger.isEnabledFor(logging.INFO):
                raise OSError(errno.EPERM, "logging is disabled")
            logger.info("%s", message)  # first: if another handler fails, nothing is revealed or recorded
            self._append(message + "\n")
        except OSError as error:
            raise PlexctlError(f"{self._source}: the record was not written: {show_error(error)}; "
                               "the token is not shown") from error
        # ctime(), since strftime() would take the locale's names of months
        line = f"<{SYSLOG_AUTHPRIV_INFO}>{time.ctime()[4:19]} plexctl[{os.getpid()}]: {message}"
        syslog = next(filter(os.path.exists, SYSLOG_SOCKETS), None)
        try:
            if syslog:
                send_record(syslog, line.encode("ascii"))
        except OSError as error:
            self._report("warning: syslog did not take the audit record, the file has it: "
                         + show_error(error))

    def _append(self, text: str) -> None:
        """Append a line to the file and sync it; OSError unless all its bytes are there."""
        line = text.encode("ascii")
        self._file.seek(max(0, self._file.seek(0, os.SEEK_END) - 1))
        if self._file.read(1) not in (b"", b"\n"):
            line = b"\n" + line  # behind what a full disk cut short
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "short write")
        os.fsync(self._file.fileno())
        if not os.fstat(self._file.fileno()).st_nlink:
            raise OSError(errno.ENOENT, "the file was removed")


# ----------------------------------------------------------------------------------------- relay

BUFFER_BYTES = 768 * 1024  # takes memory only as far as it is used
TICK_SECONDS = 0.2  # a thread that waits looks around this often
CLOSE_POLL_SECONDS = 0.05  # the same, once the client has ended its input
QUIET_SECONDS = 2.0  # of silence, see Relay
UNANSWERED_SECONDS = 120  # after which a path is dead
TCP_CLOSE = 7  # a state, linux/tcp_states.h
RESET_ON_CLOSE, END_ON_CLOSE = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)  # struct linger
LEG_OPTIONS: List[Tuple[int, str, Any]] = [
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),  # a request in two writes costs 44 ms without it
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1), (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15), (socket.IPPROTO_TCP, "TCP_KEEPCNT", 4),
    (socket.SOL_SOCKET, "SO_OOBINLINE", 1),  # urgent data stays in the stream
    # not even SIGKILL may let a stream that was cut off look complete
    (socket.SOL_SOCKET, "SO_LINGER", RESET_ON_CLOSE)]


def set_leg_options(sock: socket.socket) -> None:
    """Set what both legs of a connection need; sockets inherit it from the listener that accepts them."""
    for level, name, value in LEG_OPTIONS:
        if hasattr(socket, name):  # macOS lacks TCP_KEEPIDLE
            sock.setsockopt(level, getattr(socket, name), value)


def set_linger(sock: socket.socket, option: bytes) -> None:
    """Set whether close() resets the connection (RESET_ON_CLOSE) or ends it in order (END_ON_CLOSE)."""
    with contextlib.suppress(OSError):  # macOS, once both directions have ended
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)


def is_connected(sock: socket.socket) -> bool:
    """Return False after a reset, even if its error was read before. On Linux."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE  # tcpi_state


# Called before each wait with its length in seconds; returns that or less, or raises what ends the connection
Pace = Callable[[float], float]


class PeerReset(ConnectionError):
    """The other end of `leg` has reset the connection."""

    def __init__(self, leg: Any, error_number: Optional[int]) -> None:
        super().__init__(error_number, os.strerror(error_number or errno.ECONNRESET))
        self.leg = leg


class Leg:
    """One end of a connection: a non-blocking socket; TCP closes with a reset unless told otherwise."""

    def __init__(self, sock: socket.socket, address: Any = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.address = address  # of a client
        self.recv_into = sock.recv_into
        self.send = sock.send
        self.reads_at = self.writes_at = sock.fileno()  # for poll(2)
        self._is_linux_tcp = ON_LINUX and sock.family != socket.AF_UNIX

    def send_end(self) -> None:
        """Send the end of input (half-close)."""
        self.sock.shutdown(socket.SHUT_WR)

    def take_error(self) -> int:
        """Return the error number of a reset that no call has reported yet; 0 for none."""
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def count_unsent(self) -> int:
        """Return how many bytes the other end has not acknowledged (SIOCOUTQ, tcp(7))."""
        try:
            if not (self._is_linux_tcp and is_connected(self.sock)):  # SIOCOUTQ keeps its value after a reset
                return 0
            return int(struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0])
        except (OSError, ValueError):  # its thread has closed it
            return 0

    def is_dead(self) -> bool:
        """Return whether what was sent has had no answer for UNANSWERED_SECONDS.

        Linux itself gives up after 15 minutes, and sends no keepalive meanwhile. TCP_USER_TIMEOUT is
        no remedy: it also ends a connection whose reader pauses, though it answers every probe.
        """
        if not self._is_linux_tcp:
            return False
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)  # struct tcp_info, linux/tcp.h
        retransmits, probes, since_ack_ms = struct.unpack_from("=xxBB52xI", info)  # tcpi_last_ack_recv
        return bool(max(retransmits, probes) > 1 and since_ack_ms >= UNANSWERED_SECONDS * 1000)

    def close(self, reset: bool = True) -> None:
        """Close it, with a reset for the peer or in order."""
        if not reset:
            set_linger(self.sock, END_ON_CLOSE)
        self.sock.close()


class StandardStreams:
    """Descriptors 0 and 1 as the client's leg: pipes, files, a terminal.

    Their file status flags stay as they are, since they may be somebody's terminal: a blocking descriptor
    gets no more than it takes at once. A write that fails raises PlexctlError, which ends the connection.
    """

    reads_at, writes_at = 0, 1

    def __init__(self) -> None:
        self._at_once = 128 if os.isatty(1) else select.PIPE_BUF  # poll(2) promises room for so many bytes

    def recv_into(self, buffer: memoryview) -> int:
        """Read standard input; return 0 at its end."""
        try:
            return os.readv(0, [buffer])
        except IsADirectoryError:  # it was closed at the start, see open_nowhere
            return 0

    def send(self, piece: memoryview) -> int:
        """Write to standard output as much as it takes."""
        try:
            if not wait_for(1, select.POLLOUT, 0):
                raise BlockingIOError
            return os.write(1, piece[:self._at_once])
        except BlockingIOError:
            raise
        except OSError as error:
            raise PlexctlError(f"cannot write to standard output: {show_error(error)}") from error

    # What nobody can know here

    def take_error(self) -> int:
        return 0

    def count_unsent(self) -> int:
        return 0

    def is_dead(self) -> bool:
        return False

    def send_end(self) -> None:
        self._let_go(1)

    def close(self, reset: bool = True) -> None:
        """Let go of both descriptors; there is no reset."""
        self._let_go(1)
        self._let_go(0)

    def _let_go(self, descriptor: int) -> None:
        nowhere = open_nowhere(os.O_RDWR)
        os.dup2(nowhere, descriptor)  # the number stays taken, or the next file would get it
        os.close(nowhere)


class StandardSocket(StandardStreams):
    """The same where descriptor 1 is a socket (inetd, socat), with errors and resets like a Leg's."""

    def __init__(self) -> None:
        super().__init__()
        # whatever its family is: nothing here depends on that
        self._sock = socket.fromfd(1, socket.AF_UNIX, socket.SOCK_STREAM)
        set_linger(self._sock, RESET_ON_CLOSE)

    def send(self, piece: memoryview) -> int:
        return self._sock.send(piece, socket.MSG_DONTWAIT)

    def take_error(self) -> int:
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def send_end(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self, reset: bool = True) -> None:
        set_linger(self._sock, RESET_ON_CLOSE if reset else END_ON_CLOSE)
        self._sock.close()
        super().close()


Buffers = Tuple[memoryview, memoryview]


def create_buffers() -> Buffers:
    """Create what a Relay reads into, one buffer for each direction."""
    return memoryview(mmap.mmap(-1, BUFFER_BYTES)), memoryview(mmap.mmap(-1, BUFFER_BYTES))


Wait = Tuple[int, int]  # a descriptor and an event, of poll(2)
NO_WAIT: Wait = (-1, 0)


class Flow:
    """One direction of a connection: what `source` sends goes to `sink`.

    It reads only when all that it has read before was handed on or dropped: so nothing is left once
    `source_ended`.
    """

    def __init__(self, source: Any, sink: Any, buffer: memoryview) -> None:
        self.source = source
        self.sink = sink
        self.moved = 0  # bytes that were handed on
        self.rest = buffer[:0]  # read, and not handed on yet
        self.dropped = 0  # bytes that were read, and never handed on
        self.source_ended = False
        self.end_was_sent = False  # to the sink, after the source had ended
        self.is_dropping = False  # what it reads: a write has failed, the sink has closed the connection
        self.sink_reset = 0  # or has reset it: the errno
        self._buffer = buffer
        self._for_data: Wait = (source.reads_at, select.POLLIN)
        self._for_room: Wait = (sink.writes_at, select.POLLOUT)
        self.waits_for = self._for_data

    def move(self) -> None:
        """Read once, unless something is left, and hand it on; PeerReset by the source."""
        if not self.rest:
            try:
                count = self.source.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    raise
                raise PeerReset(self.source, error.errno) from error
            if not count:
                self.source_ended, self.waits_for = True, NO_WAIT
                return
            self.rest = self._buffer[:count]
        if not self.is_dropping:
            self._hand_on()
        if self.is_dropping:
            self.dropped += len(self.rest)
            self.rest = self.rest[:0]
        self.waits_for = self._for_room if self.rest else self._for_data

    def _hand_on(self) -> None:
        try:
            sent = self.sink.send(self.rest)
            self.moved += sent
            self.rest = self.rest[sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            self.note_sink_error(error.errno or errno.ECONNRESET)

    def count_undelivered(self) -> int:
        """Return how many bytes were read and not handed on."""
        return len(self.rest) + self.dropped

    def note_sink_error(self, number: int) -> None:
        """Hand on nothing more.

        EPIPE is no reset: the sink had ended its input, and has closed the connection before it had read
        everything. That counts as an end.
        """
        self.is_dropping = True
        if number != errno.EPIPE:
            self.sink_reset = number

    def check_reset(self) -> None:
        """Raise PeerReset if the sink has reset the connection."""
        if self.sink_reset:
            raise PeerReset(self.sink, self.sink_reset)

    def send_end(self) -> None:
        """Tell the sink, once, that the source has ended its input (half-close)."""
        if not self.end_was_sent:
            self.end_was_sent = True
            with contextlib.suppress(OSError):  # its peer is gone
                self.sink.send_end()


# how a connection has ended, Relay.ending
OPEN = ""  # it has not
NODE_ENDED = "ended by the Node"  # before it was told of an end by the client
BOTH_ENDED = "ended by both"  # after that
CLIENT_CLOSED = "closed by the client"  # the Node has yet to end it, and may not have everything
CLIENT_RESET = "reset by the client"  # the same
NODE_RESET = "reset by the Node"
BROKEN = "broken"  # for both: by `pace`, a dead path, want of memory or a defect
BY_NODE, BY_CLIENT = (NODE_ENDED, NODE_RESET), (CLIENT_CLOSED, CLIENT_RESET)


class Relay:
    """Carries one connection between a client and the Node (`remote`), in the thread that calls its methods.

    What one side sends is handed on at once; while the other side takes nothing, no more is read. A side has
    ended its input once it sends nothing more, and has closed the connection once it takes nothing either.
    `carry` lasts until the connection is over for the client. Once either has ended its input, there follow

    - `_await_answer` if it was the client. The Node ends both directions as soon as it reads the end of
      either, and would cut the answer off. So it is told only when nothing has moved for QUIET_SECONDS.
    - `_end_client` once the Node has ended the connection. The client may go on until nothing has moved for
      QUIET_SECONDS.
    - `_end_remote` once the client has closed the connection, as `has_closed` or a write tells.

    A reset by one side becomes a reset for the other. Any other error resets both.

    Then `await_end` waits until the connection is over for the Node as well, and `close_remote` closes it.

    `before_end` is called before the client sees an end that it has not caused. `pace` is called at least
    every TICK_SECONDS.
    """

    def __init__(self, client: Any, remote: Leg, buffers: Buffers, has_closed: Callable[[], bool],
                 before_end: Callable[[], object], pace: Pace) -> None:
        self.up = Flow(client, remote, buffers[0])
        self.down = Flow(remote, client, buffers[1])
        self.remote = remote
        self.ending = OPEN
        self.error: Optional[Exception] = None  # the reset, or what has broken it
        self._client = client
        self._has_closed = has_closed
        self._before_end = before_end
        self._pace = pace
        self._poller: Any = None  # made by _register
        self._registered = (NO_WAIT, NO_WAIT)  # what each flow waits for in the poller

    def carry(self) -> None:
        """Return once the connection is over for the client. Whatever fails ends this connection alone."""
        up, down = self.up, self.down
        try:
            while not (up.source_ended or down.source_ended):
                self._move()
            if not down.source_ended:
                self._await_answer()
            if down.source_ended:
                self._end_client()
            else:
                self._end_remote()
        except PeerReset as error:
            self.error, self.ending = error, CLIENT_RESET if error.leg is self._client else NODE_RESET
        except Exception as error:
            self.error, self.ending = error, BROKEN
        if self.ending in (NODE_RESET, BROKEN) and not down.end_was_sent:
            with contextlib.suppress(Exception):
                self._before_end()
        # What the client has sent after the Node's end may be lost. A reset tells it so if it still sends; if
        # it has ended, it may still read the answer, which a reset would destroy.
        is_complete = down.end_was_sent and (up.source_ended or not up.count_undelivered())
        self._client.close(reset=not is_complete)

    def await_end(self, seconds: float) -> bool:
        """If it was ended BY_CLIENT, wait until it is over for the Node too; False if that takes longer.

        - CLIENT_CLOSED: until the Node has ended it, or its path is dead; while the Node lacks something the
          time begins anew
        - CLIENT_RESET: until the Node has everything, since our own reset would destroy the rest

        What the Node still sends is dropped: it may be blocked in that write, and would see no end before.
        `pace` may end the wait, which is no end of the connection.
        """
        if self.ending not in BY_CLIENT:
            return True
        self.down.is_dropping = True
        deadline = elapsed_seconds() + seconds
        try:
            while True:
                has_everything = not self.remote.count_unsent()
                if self.ending == CLIENT_RESET:
                    is_over = has_everything
                else:
                    is_over = self.down.source_ended or self.remote.is_dead()
                    if not has_everything:
                        deadline = elapsed_seconds() + seconds
                if is_over or elapsed_seconds() >= deadline:
                    return is_over or self.down.source_ended  # a Node that has ended it is not stuck
                pause = self._pace(CLOSE_POLL_SECONDS)
                if self.down.source_ended:
                    time.sleep(pause)
                elif wait_for(self.remote.reads_at, select.POLLIN, pause):
                    self.down.move()
        except PeerReset:
            return True  # by the Node
        except (OSError, PlexctlError):  # no memory, or by `pace`
            return False

    def close_remote(self) -> None:
        """Close the Node's side, with a reset where something is missing. A second call does nothing."""
        self.remote.close(reset=self.error is not None or not self.up.source_ended)

    # The steps of carry

    def _await_answer(self) -> None:
        """Pass the client's end of input on once the target is quiet; return once either side closes."""
        def is_closed() -> bool:
            return self.down.source_ended or self.down.is_dropping or self._has_closed()

        if self._move_until_quiet(self.remote, is_closed):
            self.up.send_end()
            while not is_closed():
                self._move(CLOSE_POLL_SECONDS)

    def _end_client(self) -> None:
        """The Node has ended the connection: pass that on, and let the client finish."""
        self.up.check_reset()  # what looks like an end may be a reset that a write has met first
        client_was_first = self.up.end_was_sent or self.down.is_dropping  # it takes nothing: it has closed it
        self.ending = BOTH_ENDED if client_was_first else NODE_ENDED
        if self.ending == NODE_ENDED:
            self._before_end()
        self.down.send_end()
        # not longer: a client may keep its end open for ever, and the session is to carry the next one
        self._move_until_quiet(self._client, lambda: self.up.source_ended)

    def _end_remote(self) -> None:
        """The client has closed the connection: pass that on, unless it has reset it."""
        self._check_client_reset()
        self.ending = CLIENT_CLOSED
        self.up.send_end()

    # What they share

    def _move_until_quiet(self, receiver: Any, is_over: Callable[[], bool]) -> bool:
        """Hand on what comes until nothing has moved for QUIET_SECONDS; False if it `is_over` before that.

        What was sent to `receiver`, a leg, and is still on its way counts as moving.
        """
        counted, moved_on = -1, elapsed_seconds()
        while not is_over():
            if elapsed_seconds() - moved_on >= QUIET_SECONDS:
                return True
            self._move(CLOSE_POLL_SECONDS)
            moved = self.up.moved + self.down.moved
            if moved != counted or self.up.rest or self.down.rest or receiver.count_unsent():
                counted, moved_on = moved, elapsed_seconds()
        return False

    def _move(self, seconds: float = TICK_SECONDS) -> None:
        """Wait for a direction that can move, so long at most, and move each that can once.

        Raise what ends the connection for both. A reset by the Node is raised by the read that meets it, so
        that all before it is handed on; a write that meets it only notes it.
        """
        up, down = self.up, self.down
        if self._registered != (up.waits_for, down.waits_for):
            self._register()
        ready = self._poller.poll(self._pace(seconds) * 1000)
        if not ready and (self._client.is_dead() or self.remote.is_dead()):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        (for_up, _), (for_down, _) = self._registered
        for descriptor, _ in ready:
            if descriptor == for_up:
                up.move()
            if descriptor == for_down:  # if both wait for it, one may be too early, which does no harm
                down.move()
        if not ready or self.down.is_dropping:  # not always: that is a system call
            self._check_client_reset()

    def _register(self) -> None:
        self._poller, self._registered = select.poll(), (self.up.waits_for, self.down.waits_for)
        masks: Dict[int, int] = {}
        for descriptor, mask in self._registered:
            if mask:
                masks[descriptor] = masks.get(descriptor, 0) | mask
                self._poller.register(descriptor, masks[descriptor])

    def _check_client_reset(self) -> None:
        """Raise a reset by the client, whether a write has met it or no call has yet."""
        error = 0 if self.down.is_dropping else self._client.take_error()  # the first error says what it was
        if error:
            self.down.note_sink_error(error)
        self.down.check_reset()


# -------------------------------------------------------------------------------------- sessions

ASK_SECONDS = 2  # between two GetSessions about one session
ASK_LIMIT_SECONDS = 5  # that somebody waits for the answer
RECHECK_SECONDS = 60  # the reconcile period of a Node
AHEAD_SECONDS = 1.0  # that a Node may close before the expiry, since its clock is ahead
GONE_SECONDS = 30  # of refused dials, until a listener counts as gone
REPLACE_SECONDS = 60  # a session that has lasted so long is replaced at the first refused dial


class SessionRevoked(SessionOver):
    """The session was taken away or does not exist any more; it is never replaced."""


class ListenerGone(SessionOver):
    """The Node has closed the session's listener, although the session is active."""


class EndpointMissing(PlexctlError):
    """The Node did not report a listener in time."""


OWED, UNDER_WAY, SETTLED = "owed", "under way", "settled"


class Debt:
    """A session that was issued. Its revocation is OWED, UNDER_WAY, or SETTLED: done or given up."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id  # as the server wrote it
        self.expires_at = ""  # the same; "" if that is unknown
        self.state = OWED


class Ledger:
    """Issues sessions, and owes each of them one revocation, from the moment its id is known.

    It is revoked by `give_back`, or at the end of the run by `leave`, unless `is_kept` was set before.
    Safe to use from several threads. `report` takes lines for people, `notice` those that may be left out,
    `say` what only -v shows.
    """

    def __init__(self, plane: ControlPlane, project_id: str, report: Report,
                 say: Report = lambda line: None, notice: Optional[Report] = None) -> None:
        self.plane = plane
        self.project_id = project_id
        self.report = report
        self.say = say
        self.notice = notice or report
        self.is_kept = False  # what is owed is left to the operator
        self._changed = threading.Condition()  # guards what follows
        self._debts: Dict[str, Debt] = {}  # by session_id in lower case
        self._issuing = 0
        self._is_closed = False
        self._unknown: Dict[str, PlexctlError] = {}  # by text; each may have left a session
        self._told: Set[str] = set()

    def tell_once(self, line: str, subject: str = "") -> bool:
        """Report a line once per run, or once per subject; return whether it was reported now."""
        with self._changed:
            is_new = (subject or line) not in self._told
            self._told.add(subject or line)
        if is_new:
            self.notice(line)
        return is_new

    def warn_once(self, text: str, subject: str = "") -> bool:
        """Warn once per subject, which is the text without its details in parentheses."""
        return self.tell_once("warning: " + text, subject or text.partition(" (")[0])

    def issue(self, request: SessionRequest) -> IssuedSession:
        """Issue a session, see ControlPlane.issue; Cancelled once `leave` was called."""
        unwanted: Set[str] = set()  # the keys of the sessions that the answers name, but for the one returned

        def owe(session_id: str) -> None:
            key = session_id.lower()
            with self._changed:
                if key in self._debts and key not in unwanted:
                    raise TransportError(f"{ISSUE}: the answer's session_id is that of an earlier session")
                self._debts.setdefault(key, Debt(session_id))
                unwanted.add(key)

        with self._changed:
            if self._is_closed:
                raise Cancelled("interrupted")
            self._issuing += 1
        try:
            issued = self.plane.issue(request, owe)
            with self._changed:
                if self._is_closed:  # `leave` may have stopped waiting for it
                    raise Cancelled("interrupted")
                key = issued.session_id.lower()
                unwanted.discard(key)
                debt = self._debts[key]
                debt.session_id, debt.expires_at = issued.session_id, issued.expires_at
            return issued
        except PlexctlError as error:
            if error.may_exist:
                with self._changed:
                    self._unknown.setdefault(str(error), error)
            raise
        finally:
            with self._changed:
                due = self._claim(unwanted)
                self._issuing -= 1
                self._changed.notify_all()
            for debt in due:
                self._revoke(debt)

    def has_issued(self) -> bool:
        with self._changed:
            return bool(self._debts)

    def give_back(self, session_id: str) -> None:
        """Revoke a session now, unless that has begun. Never raises."""
        with self._changed:
            due = self._claim([session_id.lower()])
        for debt in due:
            self._revoke(debt)

    def leave(self, seconds: float = LEAVE_SECONDS) -> None:
        """Issue nothing more, and revoke what is owed; `issue` does so with what comes from now on."""
        deadline = elapsed_seconds() + seconds
        with self._changed:
            self._is_closed = True
            due = [] if self.is_kept else self._claim(self._debts)
        self.plane.cancel.set()
        for debt in due:
            if not start_thread(self._revoke, debt):
                self._revoke(debt)
        with self._changed:
            self._changed.wait_for(lambda: not (self._issuing or self._list(UNDER_WAY)),
                                   deadline - elapsed_seconds())

    def list_kept(self) -> List[str]:
        """Return what `leave` has left to the operator, in words."""
        with self._changed:
            return [f"session {each.session_id} is kept until {each.expires_at or 'it expires'}"
                    for each in self._list(OWED)]

    def settle(self, raised: Optional[BaseException] = None) -> List[str]:
        """Give up what `leave` could not revoke in time; return that, except what the error `raised` says.

        A revocation that is still under way reports nothing from now on.
        """
        with self._changed:
            lines = []
            for debt in self._list(UNDER_WAY):
                debt.state = SETTLED
                lines.append(f"session {debt.session_id} is not revoked, it will expire on its own")
            lines += [f"session unknown: {each}" for each in self._unknown.values()
                      if each is not raised and not each.is_told]
            if self._issuing:
                lines.append("a session may have been issued, it will expire on its own")
            return lines

    def _list(self, state: str) -> List[Debt]:
        return [each for each in self._debts.values() if each.state == state]

    def _claim(self, keys: Iterable[str]) -> List[Debt]:
        """With the lock held: return those of these that are owed, for the caller to revoke."""
        due = [self._debts[key] for key in keys if key in self._debts and self._debts[key].state == OWED]
        for debt in due:
            debt.state = UNDER_WAY
        return due

    def _revoke(self, debt: Debt) -> None:
        """Revoke a session that was claimed; say that it was, or why it was not."""
        deadline, session_id = elapsed_seconds() + LEAVE_SECONDS, debt.session_id
        while True:
            try:
                self.plane.revoke(self.project_id, session_id, max(0.5, deadline - elapsed_seconds()))
                self.say(f"session {session_id} released")
                break
            except Exception as error:
                wait = getattr(error, "retry_after_seconds", None) or POLL_MIN_SECONDS
                if not getattr(error, "passing", False) or elapsed_seconds() + wait > deadline:
                    with self._changed:
                        is_told = debt.state == SETTLED  # by `settle`
                    if not is_told:
                        self.report(f"warning: session {session_id} is not revoked, it will expire on its "
                                    f"own: {show_error(error)}")
                    break
                time.sleep(wait)
        with self._changed:  # only now, since `leave` waits for this
            debt.state = SETTLED
            self._changed.notify_all()


def connect(route: Tuple[int, Any], pace: Pace) -> Leg:
    """Connect to (family, address); OSError if that fails, or not in time."""
    leg = Leg(socket.socket(route[0], socket.SOCK_STREAM))
    try:
        set_leg_options(leg.sock)
        error, deadline = leg.sock.connect_ex(route[1]), elapsed_seconds() + CONNECT_SECONDS
        while error == errno.EINPROGRESS:
            if elapsed_seconds() >= deadline:
                error = errno.ETIMEDOUT
            elif wait_for(leg.writes_at, select.POLLOUT, pace(TICK_SECONDS)):
                error = leg.take_error()
        if error:
            raise OSError(error, os.strerror(error))
        return leg
    except BaseException:
        leg.close()
        raise


class MediatedSession:
    """One session, from its issue to the reason of its end.

    `open` issues it and waits for its listener, `dial` connects to that. Call `watch` often meanwhile: it
    warns before the expiry, and asks GetSession once a minute.
    """

    def __init__(self, ledger: Ledger, wait_seconds: float = 90.0, renew: bool = False) -> None:
        self.issued: Any = None  # IssuedSession, once it is there
        self.session_id = ""  # as the server wrote it; "" before the session is issued
        self.why: Optional[PlexctlError] = None  # what has ended the session
        self.endpoint: Optional[Endpoint] = None  # that the Node has reported last
        self.expires_on = float("inf")
        self.ready_on = 0.0  # when the Node had reported the listener; 0: not yet
        self._ledger = ledger
        self._wait_seconds = wait_seconds
        self._renew = renew  # it will be replaced
        self._route: Any = None  # family and address of the endpoint
        self._endpoint_asked_on = 0.0  # when the newest question was asked that has told of an endpoint
        self._refused_since = 0.0  # when the first of the last dials was refused; 0: the last one was not
        self._lock = threading.Lock()  # guards changes of `why`, and of what follows; the rest may be stale
        self._asked_on = 0.0  # when GetSession was asked last
        self._question: Optional[Outcome] = None  # the last one

    def open(self, request: SessionRequest) -> None:
        """Issue the session, and wait until the Node has reported its listener; PlexctlError."""
        issued = self.issued = self._ledger.issue(request)
        self.session_id = issued.session_id
        self.expires_on = issued.issued_on + issued.lifetime_seconds
        if issued.session.status != "active" or issued.lifetime_seconds <= 0:
            raise SessionOver("the session was over when it arrived")
        if issued.listener_endpoint:
            self._set_endpoint(issued.listener_endpoint)
        else:
            self._await_endpoint()
        self._asked_on = self.ready_on = elapsed_seconds()
        self._ledger.say(f"session {self.session_id}: listener endpoint {self.endpoint}, "
                         f"expires at {issued.expires_at}")

    def end(self, why: PlexctlError) -> None:
        with self._lock:
            self.why = self.why or why  # the first reason counts

    def is_over(self) -> bool:
        """Return whether it is over; note it if its time is up."""
        if elapsed_seconds() >= self.expires_on:
            self.end(SessionOver("the session expired"))
        return self.why is not None

    def check(self) -> None:
        """Raise why it is over, if it is."""
        self.is_over()
        if self.why is not None:
            raise self.why

    def watch(self) -> None:
        """Ask GetSession if that is due, and warn before the session expires; nothing before it is ready."""
        if not self.ready_on or self.is_over():
            return
        now = elapsed_seconds()
        if now - self._asked_on >= RECHECK_SECONDS:
            self.ask()
        left, lifetime = self.expires_on - now, self.issued.lifetime_seconds
        passed = [seconds for seconds in WARN_LEFT_SECONDS if left <= seconds < lifetime]
        if passed and not self._renew:
            self._ledger.warn_once(f"{show_seconds(left + 0.5)} of the session are left",
                                   f"{min(passed)} s left")

    def ask(self, afresh: bool = False) -> None:
        """Have a thread ask GetSession, unless one is asking, or has within ASK_SECONDS; `afresh`: anyway."""
        with self._lock:
            last, now = self._question, elapsed_seconds()
            is_due = last is None or (last.done.is_set() and now - self._asked_on >= ASK_SECONDS)
            if self.why is None and (is_due or afresh):
                self._asked_on = now
                self._question = Outcome(self._ask, or_here=False)

    def await_answer(self, pace: Pace = lambda seconds: seconds) -> float:
        """Wait for the answer to the last question, for ASK_LIMIT_SECONDS.

        Return when it was asked; 0.0 if there is no answer.
        """
        question, deadline = self._question, elapsed_seconds() + ASK_LIMIT_SECONDS
        while question is not None and elapsed_seconds() < deadline:
            if question.done.wait(pace(TICK_SECONDS)):
                return question.value or 0.0
        return 0.0

    def _ask(self) -> float:
        """Ask GetSession, and warn if that fails; return when it was asked, 0.0 if there is no answer."""
        asked_on = elapsed_seconds()
        try:
            self._update(EXCHANGE_SECONDS)
            return asked_on
        except PlexctlError as error:
            if error.status in (404, 410) and error.code:  # without one it is a gateway's
                self.end(SessionRevoked("the session is gone"))
            elif not isinstance(error, Cancelled):
                self._ledger.warn_once(show_error(error), f"{GET} {error.status}")
            return 0.0

    def dial(self, pace: Pace = lambda seconds: seconds) -> Leg:
        """Connect to the listener; PlexctlError says why that fails. A new endpoint is tried once."""
        for _ in range(2):
            self.check()
            route = self._route
            try:
                leg = connect(route, pace)
                self._refused_since = 0.0
                return leg
            except OSError as error:
                failure = error
            self._ask_about_failure(isinstance(failure, ConnectionRefusedError), pace)
            if self._route == route:
                break
        raise self.why or PlexctlError(
            f"cannot connect to the listener endpoint {self.endpoint}: {show_error(failure)}")

    def _ask_about_failure(self, is_refused: bool, pace: Pace) -> None:
        """A dial has failed: ask GetSession, and end the session if its listener is gone.

        That is so if the session is active, and has refused all dials for GONE_SECONDS. But a Node closes a
        listener that has lasted for long, and with `renew` the next session need not wait.
        """
        now = elapsed_seconds()
        may_be_replaced = self._renew and now - self.ready_on >= REPLACE_SECONDS
        is_first = is_refused and not self._refused_since
        if is_first:
            self._refused_since = now
        self.ask(afresh=is_first and may_be_replaced)
        # an answer to a question from before may bring a new endpoint, but knows of no revocation since then
        knows_state = self.await_answer(pace) >= now
        if is_refused and knows_state and self._refused_since:  # 0 again after a new endpoint
            patience = 0 if may_be_replaced else GONE_SECONDS
            if now - self._refused_since >= patience:
                self.end(ListenerGone("the Node has closed the session's listener"))

    def _await_endpoint(self) -> None:
        """Ask GetSession until the Node has reported the listener; PlexctlError if it does not in time."""
        pause, deadline = POLL_MIN_SECONDS, elapsed_seconds() + self._wait_seconds
        limit = show_seconds(self._wait_seconds)
        failure: Optional[PlexctlError] = None
        has_answer = False
        if self._wait_seconds:
            self._ledger.tell_once(f"waiting for the Node to report its listener (up to {limit})")
        while elapsed_seconds() < deadline:
            try:
                self._update(min(EXCHANGE_SECONDS, max(1.0, deadline - elapsed_seconds())))
                has_answer = True
            except PlexctlError as error:
                if not error.passing:
                    raise
                failure = error
                # what was answered before counts, unless the name that it gave cannot be looked up for now
                has_answer = has_answer and isinstance(error, (TransportError, ApiError))
            self.check()
            if self.endpoint is not None:
                return
            if self._ledger.plane.cancel.wait(min(pause, deadline - elapsed_seconds())):
                raise Cancelled("interrupted")
            pause = min(pause * 1.5, POLL_MAX_SECONDS)
        if failure is not None and not has_answer:
            raise failure
        raise EndpointMissing(
            f"the Node reported no listener endpoint within {limit} (--wait-seconds); check that the Node is "
            "online and has fewer than 10 sessions (those of print mode count until they expire)")

    def _update(self, seconds: float) -> None:
        """Ask GetSession, and do what its answer asks for; PlexctlError."""
        asked_on = elapsed_seconds()
        session = self._ledger.plane.get(self._ledger.project_id, self.session_id, seconds)
        reason = f" ({session.revoke_reason})" if session.revoke_reason else ""
        if session.status == "revoked" and session.revoke_reason not in ("ttl_expired", "idle_timeout"):
            self.end(SessionRevoked("the session was revoked" + reason))
        elif session.status != "active":
            self.end(SessionOver("the session expired" + reason))
        elif self.ready_on and elapsed_seconds() >= self.expires_on - AHEAD_SECONDS:
            # it may be over by the Node's clock, and something may have failed for that just now
            self.end(SessionOver("the session expired"))
        elif asked_on >= self._endpoint_asked_on:  # an older answer may have an older endpoint
            self._endpoint_asked_on = asked_on
            if session.listener_endpoint and session.listener_endpoint != self.endpoint:
                if self.ready_on:
                    self._ledger.say(
                        f"the Node reports a new listener endpoint: {session.listener_endpoint}")
                self._set_endpoint(session.listener_endpoint)

    def _set_endpoint(self, endpoint: Endpoint) -> None:
        """Look the endpoint's name up, and check the address that it leads to."""
        try:
            found = socket.getaddrinfo(endpoint.host, endpoint.port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise PlexctlError(f"listener endpoint {endpoint}: {show_error(error)}",
                               passing=getattr(error, "errno", 0) == socket.EAI_AGAIN) from error
        family, _, _, _, address = found[0]
        if not is_dialable(str(address[0]), is_loopback(self._ledger.plane.server.host)):
            raise PlexctlError(f"listener endpoint {endpoint}: leads to {address[0]}, which is refused")
        self.endpoint, self._route, self._refused_since = endpoint, (family, address), 0.0


# -------------------------------------------------------------------------------------- listener

BACKLOG_CONNECTIONS = 4096  # the default of 5 makes bursts wait a second
TCP_SYN_SENT, TCP_LISTEN = 2, 10
SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, NETLINK_SOCK_DIAG = 20, 1, 4
NOBODY = 0xFFFFFFFF  # no uid: (uid_t) -1
OVERFLOW_UID = 65534  # in a user namespace, any uid that it does not know
LOOPBACK_INDEX = 1  # of the device lo, in every network namespace


def find_socket(family: int, local: Tuple[Any, ...], remote: Tuple[Any, ...]) -> Tuple[int, int, int]:
    """Ask the kernel for a loopback socket by its two addresses; return its state, uid and inode.

    The uid is NOBODY where there is none. OSError if the kernel does not answer. sock_diag(7), inet_diag: one
    netlink request, about 20 microseconds.
    """
    ports = struct.pack(">HH", local[1], remote[1])
    # nlmsghdr, inet_diag_req_v2, and in it inet_diag_sockid
    question = struct.pack(
        "=IHHIIBBBBI4s16s16sIII", 72, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0, family, socket.IPPROTO_TCP,
        0, 0, 0xFFFFFFFF, ports, socket.inet_pton(family, local[0]), socket.inet_pton(family, remote[0]),
        LOOPBACK_INDEX,  # finds those that are bound to the device, too
        0xFFFFFFFF, 0xFFFFFFFF)
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG) as netlink:
        netlink.connect((0, 0))  # to the kernel: nobody else can answer
        netlink.send(question)
        answer = netlink.recv(4096)
    if struct.unpack_from("=H", answer, 4)[0] != SOCK_DIAG_BY_FAMILY or len(answer) < 88:
        error = -struct.unpack_from("=i", answer, 16)[0]
        if error != errno.ENOENT:  # there is no such socket
            raise OSError(error, os.strerror(error))
        return 0, NOBODY, 0
    # inet_diag_msg behind the nlmsghdr: family, state, timer, retrans, ports, ..., uid, inode
    state, found_ports, uid, inode = struct.unpack_from("=xBxx4s56xII", answer, 16)
    return (state, uid, inode) if found_ports == ports else (0, NOBODY, 0)


def find_owner(family: int, client: Tuple[Any, ...], local: Tuple[Any, ...]) -> Tuple[int, bool]:
    """Return the uid that holds the client's socket (NOBODY: unknown), and whether it was closed.

    OSError if the kernel does not answer.
    """
    state, uid, inode = find_socket(family, client, local)
    # where the kernel finds no connection, it answers with a socket that listens on the client's port
    is_another = state in (TCP_LISTEN, TCP_SYN_SENT)
    is_orphan = not (uid or inode)  # what older kernels say of a closed socket
    if is_another or is_orphan:
        return NOBODY, True
    return uid, not inode


class Listener(socketserver.TCPServer):
    """Listens on the local address, and knows who may connect. The kernel's backlog is its queue.

    - unix: its mode lets nobody else in, and poll(2) tells when a client has closed
    - loopback on Linux: the kernel tells whose a connection is, and whether that has closed it
    - any other address: nobody knows either

    socketserver calls server_bind and server_activate when it is made (PlexctlError). `take`, `put_back` and
    `reject` are for one thread at a time: a Forwarder calls them with its lock held.
    """

    request_queue_size = BACKLOG_CONNECTIONS
    allow_reuse_address = True

    def __init__(self, local: LocalAddress, allow_other_users: bool,
                 warn_once: Callable[[str], object]) -> None:
        self.local = local  # with the port that it has got
        self.takes_all_for_closed = False  # see assume_closed
        self.unidentified = 0  # connections not served, since they were closed before their owner was known
        self._allows_other_users = allow_other_users
        self._warn_once = warn_once
        self._returned: List[Leg] = []  # clients that were put back
        self._bound_file: Optional[os.stat_result] = None  # of a unix socket
        self._knows_owners = False  # the kernel tells; also with allow_other_users, for `has_closed`
        self._checks_owners = False  # and others are not served
        self.address_family = (socket.AF_UNIX if local.path else
                               socket.AF_INET6 if ":" in local.host else socket.AF_INET)
        try:
            super().__init__(local.path or (local.host, local.port), None)  # type: ignore[arg-type]
        except (OSError, OverflowError) as error:
            reason = show_error(error)
            if local.path and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                reason = "a file exists there (a socket left by a killed run? remove it)"
            raise PlexctlError(f"--local-addr {escape(str(local))}: cannot listen: {reason}") from error

    def server_bind(self) -> None:
        """Bind it; a unix socket is 0600."""
        self.socket.setblocking(False)
        if self.local.path:
            mask = os.umask(0o177)
            try:
                super().server_bind()
            finally:
                os.umask(mask)
            self._bound_file = os.lstat(self.local.path)
        else:
            set_leg_options(self.socket)
            super().server_bind()
            self.local = LocalAddress(self.local.host, self.server_address[1])

    def server_activate(self) -> None:
        """Listen, and find out whether the kernel can tell who connects; warn if other users can."""
        super().server_activate()
        if self.local.path:
            return
        if not is_loopback(self.local.host):
            if not self._allows_other_users:
                self._warn_once(f"{self.local} is not a loopback address: any user, here and elsewhere, can "
                                "use the port")
            return
        try:
            nobody = "::" if ":" in self.local.host else "0.0.0.0"  # noqa: S104
            uid = find_socket(self.address_family, self.local[:2], (nobody, 0))[1]  # of our own listener
            self._knows_owners = uid == os.geteuid()
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) in EXHAUSTED:
                raise
        # OVERFLOW_UID would be ours and any stranger's
        self._checks_owners = (self._knows_owners and not self._allows_other_users
                               and os.geteuid() != OVERFLOW_UID)
        if not self._checks_owners and not self._allows_other_users:
            self._warn_once("this host cannot tell whose a connection is: any local user can use the port")

    def server_close(self) -> None:
        """Close it, which resets who waits; remove a unix socket, if it is still ours."""
        super().server_close()
        mine, self._bound_file = self._bound_file, None
        with contextlib.suppress(OSError):  # it is gone, or its directory is not ours any more
            if mine and os.path.samestat(mine, os.lstat(self.local.path)):
                os.unlink(self.local.path)

    def wait(self) -> bool:
        """Wait a little for a client; return whether one is here."""
        with contextlib.suppress(ValueError):  # another thread has closed the listener
            return bool(self._returned or wait_for(self.fileno(), select.POLLIN, TICK_SECONDS))
        return False

    def take(self) -> Optional[Leg]:
        """Accept a client that is here; None if none is, or it may not be served.

        OSError if there are no descriptors or memory. Not handle_request(): that makes a selector each time.
        """
        if self._returned:
            return self._returned.pop(0)
        try:
            request, address = self.socket.accept()
        except OSError as error:  # none, or it is gone again
            if error.errno in EXHAUSTED:
                raise
            return None
        try:
            client = Leg(request, address)
            if self._may_be_served(client):
                return client
        except Exception as error:
            self._warn_once(f"a connection was rejected, its owner could not be checked: {show_error(error)}")
        request.close()  # with a reset
        return None

    def put_back(self, client: Leg) -> None:
        """Have a client that was taken be the next one."""
        self._returned.insert(0, client)

    def reject(self) -> None:
        while self._returned:
            self._returned.pop().close()
        for _ in range(self.count_waiting()):
            with contextlib.suppress(OSError):  # it has gone by itself, or there are no descriptors
                self.socket.accept()[0].close()

    def count_waiting(self) -> int:
        """Return how many connections wait; any number counts as 1 where the kernel does not tell."""
        count = len(self._returned)
        if self.fileno() >= 0 and wait_for(self.fileno(), select.POLLIN, 0):
            backlog = 1
            if ON_LINUX and not self.local.path:
                info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
                backlog = struct.unpack_from("=I", info, 24)[0]  # tcpi_unacked: of a listener, its backlog
            count += max(1, backlog)
        return count

    def has_closed(self, client: Leg) -> bool:
        """Return whether a client has closed its socket; where the kernel does not tell see assume_closed."""
        if self._knows_owners:
            with contextlib.suppress(OSError):
                return find_owner(self.address_family, client.address, self.local)[1]
            return False
        descriptor = client.sock.fileno()  # its thread may close it meanwhile
        # POLLHUP, POLLERR: a reset, a closed unix socket
        return self.takes_all_for_closed or descriptor < 0 or bool(wait_for(descriptor, 0, 0))

    def assume_closed(self) -> None:
        """COMMAND has ended, and with it its sockets: take all for closed where nobody knows."""
        self.takes_all_for_closed = not (self.local.path or self._knows_owners)

    def _may_be_served(self, client: Leg) -> bool:
        """Return whether a client may be served: its user is ours or root, and it has not left."""
        if not self._checks_owners:
            with contextlib.suppress(OSError):  # nothing to read, or a reset
                if client.sock.recv(1, socket.MSG_PEEK):
                    return True  # what it has sent is delivered, also if it has left
            return not self.has_closed(client)
        uid, _ = find_owner(self.address_family, client.address, self.local)
        # is_connected last: after a reset another user may get that address, and be the one who was found
        if uid == NOBODY or not is_connected(client.sock):
            self.unidentified += 1
            return False
        if uid not in (0, os.geteuid()):
            self._warn_once(f"rejected connections of uid {uid} (--allow-other-users lets other users in)")
            return False
        return True


# ------------------------------------------------------------------------------------- forwarder

PAUSE_SECONDS = 0.5  # after an accept() that failed
TURN_SECONDS = 0.001  # a thread passes the turn on when its connection is older
REFUSE_SECONDS = 0.05  # after a client was refused, so that another session takes the next one
GRACE_SECONDS = 0.3  # a connection waits so long for a session to become free, before one is issued for it
IDLE_SECONDS = 60  # after which a session that nobody needs is given back
NODE_END_SECONDS = 2  # that a Node may take to end a connection, until its session counts as stuck
STUCK_SECONDS = 10  # the same from then on, until the session is given back
REFUSED_PAUSE_SECONDS = 60  # after a session was refused, until one is asked for again
FAILED_PAUSE_SECONDS = 5  # the same, after a failure that may pass


class Counts(NamedTuple):
    """Totals: connections `open`, `waiting` and `ended`; ready `sessions`; bytes `up` and `down`."""

    open: int = 0
    waiting: int = 0
    ended: int = 0
    sessions: int = 0
    up: int = 0
    down: int = 0


# what a Carrier does, and what follows
OPENING = "opening"  # it issues its session, and waits for the listener; then FREE
FREE = "free"  # waits for a client; then BUSY, or REVOKING if it is not needed any more
BUSY = "busy"  # dials, carries, and waits for the Node to end what it has carried; then FREE or STUCK
STUCK = "stuck"  # the Node does not end it; then REVOKING
REVOKING = "revoking"  # the end: the session is over, stuck, or not needed any more
READY = (FREE, BUSY)
LIVE = (OPENING, FREE, BUSY)  # connections may yet come to it


class Supply:
    """Decides how many sessions there are to be, `limit` at most.

    - one for each connection, once they have waited for GRACE_SECONDS while no session was free
    - the `minimum` in any case, if that is more than 1; a single one is issued when a connection comes
    - one fewer each time that more than the minimum have been free for IDLE_SECONDS

    It keeps these times, and so has to be asked at each tick, with the states of all carriers.
    """

    def __init__(self, limit: int, minimum: int) -> None:
        self.limit = limit
        self.minimum = minimum
        self.is_overdue = False  # connections have waited long enough
        self._waiting_since = elapsed_seconds()  # since when connections wait, and no session is free
        self._spare_since = elapsed_seconds()  # since when more sessions are free than the minimum
        self._allowed, self._allowed_on, self._step_seconds = limit, 0.0, 1.0  # see hold_back

    def hold_back(self, number: int, since: float, step_seconds: float) -> None:
        """Allow no more than so many sessions after a failure, and one more with each step from then on."""
        self._allowed, self._allowed_on, self._step_seconds = number, since, step_seconds

    def count_allowed(self, now: float) -> int:
        return min(self.limit, self._allowed + int((now - self._allowed_on) / self._step_seconds))

    def count_missing(self, now: float, waiting: int, states: List[str]) -> int:
        """Return how many sessions to issue now, if so many connections are `waiting`."""
        live = count_live(states)
        if FREE in states or not waiting:
            self._waiting_since = now
        self.is_overdue = waiting > 0 and (not live or now - self._waiting_since >= GRACE_SECONDS)
        if REVOKING in states and not live:
            return 0  # a server that still counts that one might refuse another, and so end the run
        missing = waiting - states.count(OPENING) if self.is_overdue else 0
        if self.minimum > 1:
            missing = max(missing, self.minimum - live)
        return max(0, min(missing, self.count_allowed(now) - len(states)))  # the server counts all of them

    def has_spare(self, now: float, states: List[str]) -> bool:
        """Return whether to give a session back that is free, since nobody needs it."""
        if states.count(FREE) <= self.minimum:
            self._spare_since = now
        has_spare = now - self._spare_since >= IDLE_SECONDS
        if has_spare:
            self._spare_since = now
        return has_spare


def count_live(states: List[str]) -> int:
    """Return how many of these carriers' states are LIVE."""
    return sum(state in LIVE for state in states)


class Carrier:
    """One session of a Forwarder and its thread, which executes `run`.

    It issues the session, and takes clients as long as that lasts: accepts one, dials, carries the connection
    to its end, and is free again when the Node has ended that as well. At last it revokes the session.

    Only the thread that has the turn waits for a client and takes it. It passes the turn on when that
    connection has lasted for TURN_SECONDS (_pace), when the client is refused, and at its own end.
    """

    def __init__(self, forwarder: "Forwarder") -> None:
        self.session = MediatedSession(forwarder.ledger, forwarder.wait_seconds, forwarder.renew)
        self.taken_on = 0.0  # when it took the last client
        # forwarder.lock guards changes of these
        self.state = OPENING
        self.client: Optional[Leg] = None  # from its accept() to its end
        self.relay: Optional[Relay] = None  # from the dial until the Node has ended the connection, too
        self._forwarder = forwarder
        self._has_turn = False  # from the wait for a client until its connection is TURN_SECONDS old

    def run(self) -> None:
        """Do all that the class says; never raises."""
        session, forwarder = self.session, self._forwarder
        try:
            buffers = create_buffers()
            session.open(forwarder.next_request())
            forwarder.note_ready(self)
            while self.state == FREE and not self.must_leave():
                client = self._take()
                if client is not None:
                    self._serve(client, buffers)
        except PlexctlError as error:
            session.end(error)
        except Exception as error:  # no memory or descriptors, or a defect
            session.end(PlexctlError(f"a session was given up after {show_error(error)}"))
        finally:
            self._pass_turn_on()
            if self.client is not None:  # an error came between
                self.client.close()
                forwarder.note_client_end(self, 0, 0)
            forwarder.dismiss(self)

    def must_leave(self) -> bool:
        return self._forwarder.is_closing.is_set() or self.session.is_over()

    def _take(self) -> Optional[Leg]:
        """Take the client that is next, if one comes in time, and keep the turn: `_pace` passes it on."""
        forwarder = self._forwarder
        self._has_turn = self._has_turn or forwarder.turn.acquire(timeout=TICK_SECONDS)
        if not self._has_turn:
            return None
        client: Optional[Leg] = None
        try:
            if forwarder.listener.wait():
                with forwarder.lock:
                    if self.state == FREE and not forwarder.is_closing.is_set():
                        client = forwarder.listener.take()
                    if client is not None:
                        self.client, self.state, self.taken_on = client, BUSY, elapsed_seconds()
        except OSError as error:
            forwarder.warn_of_exhaustion(error)
            forwarder.is_closing.wait(PAUSE_SECONDS)
        return client

    def _pass_turn_on(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._forwarder.turn.release()

    def _pace(self, seconds: float) -> float:
        """Return how long a wait may last, see Pace; pass the turn on once the connection has lasted.

        If it were passed on at once, 8 short connections at once would take one and a half times as long:
        threads that run side by side mostly wait for Python's own lock.
        """
        # must_leave without its clock, which costs too much here; tick() looks at that
        if self._forwarder.is_closing.is_set() or self.session.why is not None:
            raise self.session.why or Cancelled("interrupted")
        if self._has_turn:
            left = self.taken_on + TURN_SECONDS - elapsed_seconds()
            if left > 0:
                return min(left, seconds)
            self._pass_turn_on()
        return seconds

    def _serve(self, client: Leg, buffers: Buffers) -> None:
        """Dial for a client and carry the connection, or refuse it."""
        try:
            remote = self.session.dial(self._pace)
        except PlexctlError as error:
            self._refuse(client, error)
        else:
            self._carry(client, remote, buffers)
        with self._forwarder.lock:
            if self.state == BUSY:
                self.state = FREE

    def _carry(self, client: Leg, remote: Leg, buffers: Buffers) -> None:
        """Carry a connection until the Node has ended it as well, or the session is stuck."""
        forwarder = self._forwarder
        name = "a local process" if forwarder.local.path else join_host_port(*client.address[:2])
        forwarder.ledger.say(f"connection from {name} to {self.session.endpoint}")
        relay = Relay(client, remote, buffers, lambda: forwarder.listener.has_closed(client),
                      lambda: forwarder.ask_about_end(self, relay), self._pace)
        try:
            with forwarder.lock:
                self.relay = relay
            relay.carry()
            forwarder.note_client_end(self, relay.up.moved, relay.down.moved)
            self._tell_end(relay)
            if not relay.await_end(NODE_END_SECONDS) and not self.must_leave():
                self._await_stuck(relay)
        finally:
            relay.close_remote()
            with forwarder.lock:
                self.relay = None

    def _refuse(self, client: Leg, error: PlexctlError) -> None:
        """Leave a client to another session, if this one is over and there may be another; else reset it."""
        forwarder = self._forwarder
        self._pass_turn_on()  # another session may do better
        if self.session.why and forwarder.requeue(self):
            return
        client.close()
        if not isinstance(error, (SessionOver, Cancelled)):
            forwarder.ledger.warn_once(f"a connection was not served: {error}", "not served")
        forwarder.note_client_end(self, 0, 0)
        if self.session.why is None and forwarder.count().sessions > 1:
            forwarder.is_closing.wait(REFUSE_SECONDS)  # or this one, which is quick, would take most clients

    def _tell_end(self, relay: Relay) -> None:
        forwarder = self._forwarder
        error = None if forwarder.is_closing.is_set() or self.session.why else relay.error
        reason = f" ({show_error(error)})" if error else ""
        forwarder.ledger.say(f"connection closed{reason}: {show_bytes(relay.up.moved)} up, "
                             f"{show_bytes(relay.down.moved)} down")
        if error and (not isinstance(error, OSError) or error.errno in EXHAUSTED):  # not a peer's doing
            forwarder.ledger.warn_once(f"a connection ended: {show_error(error)}")

    def _await_stuck(self, relay: Relay) -> None:
        """The Node does not end a connection whose client is gone: the session is not used again.

        The Node may still pass on what it has, for STUCK_SECONDS; the revocation that follows cuts it off.
        """
        forwarder, deadline = self._forwarder, elapsed_seconds() + STUCK_SECONDS
        with forwarder.lock:
            self.state, forwarder.has_been_stuck = STUCK, True
        forwarder.ledger.warn_once("the Node has not ended a connection whose client is gone; its session is "
                                   "not used any more")
        relay.await_end(STUCK_SECONDS)
        if relay.ending == CLIENT_RESET:  # nobody sees when the Node has passed on what came before that
            relay.close_remote()
            forwarder.is_closing.wait(deadline - elapsed_seconds())


def is_refusal(why: PlexctlError) -> bool:
    """Return whether a server has refused a session, for a reason that does not pass at once."""
    return 0 < why.status < 500 and not why.passing


def describe_unreachable(request: SessionRequest) -> str:
    """Return what it means that the Node has ended a connection without a byte from the target."""
    return ("the Node ended the connection and nothing came back: nothing listens at "
            f"{join_host_port(request.host, request.port)}, or the Node cannot reach it "
            "(--host and --port are as the Node sees them)")


class Forwarder:
    """Forwards a local address to mediated sessions, which are issued as connections need them.

    The address is bound when the object is made (PlexctlError). `establish` issues the first sessions and
    waits for one of them. From then on `tick` has to be called several times a second, until `over` says
    what has ended all of them. `stop` ends every connection. Each session's thread revokes its own;
    Ledger.leave revokes the rest.

    There are at most `limit` sessions at once, each with a Carrier. Where none is free `tick` issues some for
    those who wait; a `minimum` above 1 is kept ready. With `renew` one that has run out is replaced.

    Locks are taken in this order: the turn, the Forwarder's, a MediatedSession's, those of others.
    """

    def __init__(self, local: LocalAddress, ledger: Ledger, request: SessionRequest, limit: int = 4,
                 minimum: int = 1, renew: bool = False, wait_seconds: float = 90.0,
                 allow_other_users: bool = False) -> None:
        self.over: Optional[PlexctlError] = None  # why the run is over
        self.first: Optional[MediatedSession] = None  # that was ready
        self.ledger = ledger
        self.listener = Listener(local, allow_other_users, ledger.warn_once)
        self.local = self.listener.local
        self.renew = renew
        self.wait_seconds = wait_seconds
        self.turn = threading.Lock()
        self.is_closing = threading.Event()  # nothing is carried any more: `over`, or `stop` was called
        # reentrant; guards what follows, `over`, `first`, and the state, client and relay of the carriers
        self.lock = threading.Condition()
        self.has_been_stuck = False  # a session has, which is not the end of the run
        self._request = request
        self._supply = Supply(limit, minimum)
        self._carriers: List[Carrier] = []
        self._ended = Counts()
        self._first_failure: Optional[PlexctlError] = None  # of a session, before any is ready
        self._answered_on = 0.0  # when a connection that had an answer has ended last
        self._explanation: Optional[Outcome] = None  # see _explain

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # For the carriers

    def next_request(self) -> SessionRequest:
        """Return what to ask for: without `renew`, no more time than the first session has left."""
        if self.renew or self.first is None:
            return self._request
        left = max(1, int(self.first.expires_on - elapsed_seconds()))
        return self._request._replace(ttl_seconds=min(self._request.ttl_seconds or left, left))

    def note_ready(self, carrier: Carrier) -> None:
        """Note that a session's Node has reported its listener."""
        with self.lock:
            self.first, carrier.state = self.first or carrier.session, FREE
            self.lock.notify_all()

    def requeue(self, carrier: Carrier) -> bool:
        """Leave a carrier's client to another session; False if there will be none."""
        with self.lock:
            may_be_served = self.renew or self._count_live() > 1  # the carrier itself is still BUSY
            if carrier.client is None or not may_be_served or self.is_closing.is_set():
                return False
            self.listener.put_back(carrier.client)
            carrier.client = None
            return True

    def note_client_end(self, carrier: Carrier, up: int, down: int) -> None:
        """Count a connection that has ended, with the bytes that it has carried."""
        with self.lock:
            carrier.client = None
            if down:
                self._answered_on = elapsed_seconds()
            ended = self._ended
            self._ended = ended._replace(ended=ended.ended + 1, up=ended.up + up, down=ended.down + down)

    def ask_about_end(self, carrier: Carrier, relay: Relay) -> None:
        """Have it found out, beside the work, why a connection is ending: is its session over?"""
        if self.is_closing.is_set():
            return
        carrier.session.ask()
        with self.lock:
            if relay.ending in BY_NODE and self._seems_unreachable(carrier):
                self._explanation = Outcome(lambda: self._explain(carrier.session), or_here=False)

    def dismiss(self, carrier: Carrier) -> None:
        """Do what follows from the end of a session, and revoke it."""
        session = carrier.session
        with self.lock:
            why, is_leaving = session.why, self.is_closing.is_set()
            carrier.state = REVOKING
            self.lock.notify_all()
            if why is not None and not is_leaving:
                self._judge_end(session, why)
        # --keep-session keeps those that the run's end has found in use, or has kept from being opened
        is_kept = self.ledger.is_kept and is_leaving and (why is None or isinstance(why, Cancelled))
        if not is_kept:
            self.ledger.give_back(session.session_id)
        with self.lock:
            self._carriers.remove(carrier)
            self.lock.notify_all()

    def warn_of_exhaustion(self, error: BaseException) -> None:
        self.ledger.warn_once(f"cannot accept connections for now: {show_error(error)}")

    # For whoever runs it

    def establish(self) -> MediatedSession:
        """Issue the first sessions, and return the first whose Node has reported its listener."""
        with self.lock:
            self._start(self._supply.minimum)
            self.lock.wait_for(lambda: self.first or self.is_closing.is_set())
            if self.first is None:
                raise self.over or Cancelled("interrupted")
            return self.first

    def tick(self) -> None:
        """See to it that there are as many sessions as are needed, and keep the time."""
        now = elapsed_seconds()
        with self.lock:
            if self._is_time_up(now):
                self._end_run(SessionOver("the session expired"))
            try:
                for each in self._carriers:
                    each.session.watch()
                may_serve = self._count_live() or self._supply.count_allowed(now)
                if self.over or not may_serve:
                    self.listener.reject()
                elif self.first is not None:
                    self._issue_missing(now)
                    self._give_spare_back(now)
            except (OSError, MemoryError) as error:  # which ends nothing that works
                self.warn_of_exhaustion(error)

    def count(self) -> Counts:
        with self.lock:
            relays = self._list_open()
            return self._ended._replace(
                open=len(relays), waiting=self.listener.count_waiting(),
                sessions=sum(each.state in READY for each in self._carriers),
                up=self._ended.up + sum(relay.up.moved for relay in relays),
                down=self._ended.down + sum(relay.down.moved for relay in relays))

    def seconds_left(self) -> float:
        """Return how long it is until the first of the sessions expires; 0.0 if there is none."""
        with self.lock:
            ends = [each.session.expires_on for each in self._carriers if each.state in READY]
            return max(0.0, min(ends, default=0.0) - elapsed_seconds())

    def list_undelivered(self) -> List[int]:
        """Return [] if the Node has all that clients had sent before they closed.

        Else it is another list whenever something has moved: the length of the backlog, and how many bytes
        the Node has of each such connection.
        """
        with self.lock:
            # a client is in the backlog, then a carrier's, and once it is closed a relay has what it sent
            waiting = self.listener.count_waiting()
            numbers = [waiting] if waiting else []
            for each in self._carriers:
                is_closed = each.client is not None and self.listener.has_closed(each.client)
                if is_closed or (each.relay and each.relay.ending in BY_CLIENT):
                    relay = each.relay
                    numbers.append(relay.up.moved - relay.remote.count_unsent() if relay else 0)
            return numbers

    def stop(self, seconds: float = CLOSE_SECONDS) -> None:
        """Stop listening and end every connection, with a reset unless it was over."""
        deadline = elapsed_seconds() + seconds
        with self.lock:
            self.is_closing.set()
            self.lock.notify_all()
            self.ledger.plane.cancel.set()
            with contextlib.suppress(OSError, MemoryError):
                self.listener.reject()
            self.listener.server_close()
            # the port is in use as long as a thread waits for a client
            self.lock.wait_for(lambda: not any(each.state in READY for each in self._carriers),
                               deadline - elapsed_seconds())
        if self._explanation is not None:
            self._explanation.done.wait(deadline - elapsed_seconds())

    def _explain(self, session: MediatedSession) -> None:
        """Say that the target cannot be reached, unless the session is over."""
        session.await_answer()
        if session.why is None and self.over is None:
            self.ledger.warn_once(describe_unreachable(self._request))

    # With the lock held

    def _seems_unreachable(self, carrier: Carrier) -> bool:
        """Return whether no connection has had an answer since this one began, and nobody explains that yet.

        One that has had none beside others is no fault of the target: psql's cancel request gets none.
        """
        has_answer = (self._answered_on >= carrier.taken_on
                      or any(each.down.moved for each in self._list_open()))
        is_explaining = self._explanation is not None and not self._explanation.done.is_set()
        return not (has_answer or is_explaining)

    def _issue_missing(self, now: float) -> None:
        """Issue what is missing; warn if connections wait although there may be no further session."""
        states, waiting = self._list_states(), self.listener.count_waiting()
        missing = self._supply.count_missing(now, waiting, states)
        if self._supply.is_overdue and states.count(BUSY) >= self._supply.limit:
            wait = "connections wait" if waiting > 1 else "connection waits"
            self.ledger.warn_once(
                f"{waiting} {wait} until one closes: each needs a session (--max-sessions is "
                f"{self._supply.limit}; a connection pool must not be larger)", "limit")
        if not self._is_time_up(now + 1):  # 1 s is the shortest TTL
            self._start(missing)

    def _give_spare_back(self, now: float) -> None:
        """End the free session that was used least lately, if nobody needs it."""
        if self._supply.has_spare(now, self._list_states()):
            free = [each for each in self._carriers if each.state == FREE]
            min(free, key=lambda each: each.taken_on).state = REVOKING

    def _start(self, number: int) -> None:
        """Start the threads of so many sessions, unless the run is ending."""
        if self.is_closing.is_set():
            return
        carriers = [Carrier(self) for _ in range(number)]
        self._carriers += carriers
        for carrier in carriers:
            if not start_thread(carrier.run):
                carrier.session.end(PlexctlError("cannot start a thread for a session (ulimit -u)"))
                self.dismiss(carrier)  # without an exchange: it has no session yet

    def _list_open(self) -> List[Relay]:
        """Return the relays of those connections whose clients have not ended them."""
        return [each.relay for each in self._carriers if each.client and each.relay]

    def _list_states(self) -> List[str]:
        return [each.state for each in self._carriers]

    def _count_live(self) -> int:
        return count_live(self._list_states())

    def _is_time_up(self, now: float) -> bool:
        """Return whether the time of the first session is up, which without `renew` is that of the run."""
        return not self.renew and self.first is not None and now >= self.first.expires_on

    def _judge_end(self, session: MediatedSession, why: PlexctlError) -> None:
        """Do what a session's end, or that it could not be had, means for the run."""
        others, now = self._count_live(), elapsed_seconds()  # without this one, which is REVOKING by now
        if isinstance(why, SessionRevoked) or self._is_time_up(now):
            self._end_run(why)
        elif self.first is None:
            # none has been ready yet: what has failed first counts, if none is left
            self._first_failure = self._first_failure or why
            if not others:
                self._end_run(self._first_failure)
        elif session.ready_on:
            self._replace(session, why, others)
        else:
            self._do_without(why, others)

    def _replace(self, session: MediatedSession, why: PlexctlError, others: int) -> None:
        """A session has ended that was ready: the next connection gets a new one."""
        if not (others or self.renew):
            self._end_run(why)
            return
        self.ledger.tell_once(f"{why}; the next connection gets a new one" if self.renew else str(why))
        if isinstance(why, ListenerGone) and elapsed_seconds() - session.ready_on < REPLACE_SECONDS:
            # a Node that refuses everybody must not cost a session per attempt
            self._supply.hold_back(others, session.ready_on, REPLACE_SECONDS)

    def _do_without(self, why: PlexctlError, others: int) -> None:
        """A further session could not be had: as many as there are must do for a while."""
        # one that is stuck is not the end of the run, and the server may count it until it is revoked
        is_final = is_refusal(why) and STUCK not in self._list_states()
        if not others and (is_final or not (self.renew or self.has_been_stuck)):
            self._end_run(why)
            return
        has_no_room = others and (is_refusal(why) or isinstance(why, EndpointMissing))
        seconds = REFUSED_PAUSE_SECONDS if has_no_room else FAILED_PAUSE_SECONDS
        # one that was ready and is being given back may be replaced; this one does not count
        number = sum(each.state != REVOKING or each.session.ready_on > 0 for each in self._carriers)
        self._supply.hold_back(number, elapsed_seconds(), seconds)
        why.is_told = self.ledger.warn_once(f"no further session for now: {why}", type(why).__name__)

    def _end_run(self, why: PlexctlError) -> None:
        self.over = self.over or why
        self.is_closing.set()
        self.lock.notify_all()


# ---------------------------------------------------------------------------------------- output

COLUMNS = ("local_addr", "listener_endpoint", "target", "session_id", "expires_at")


def format_text(document: Dict[str, Any], width: int) -> str:
    """Format a header line and a row; a line per column where these are wider than a terminal (0: none)."""
    values = dict(document, target=join_host_port(**document["target"]))
    cells = [(name.upper(), escape(values[name], limit=3000)) for name in COLUMNS]  # a host has up to 2530
    header = "  ".join(name.ljust(len(cell)) for name, cell in cells).rstrip()
    row = "  ".join(cell.ljust(len(name)) for name, cell in cells).rstrip()
    if 0 < width < len(row):
        return "".join(f"{name:19}{cell}\n" for name, cell in cells)
    return f"{header}\n{row}\n"


def format_yaml(document: Dict[str, Any], indent: str = "") -> str:
    """Format YAML; strings are quoted as in JSON, which YAML 1.2 reads the same way."""
    text = ""
    for key, value in document.items():
        if isinstance(value, dict):
            text += f"{indent}{key}:\n{format_yaml(value, indent + '  ')}"
        else:
            text += f"{indent}{key}: {json.dumps(value)}\n"
    return text


def terminal_width(stream: Any) -> int:
    """Return the width of a terminal in columns, 80 if it does not say; 0 for anything else."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 0


def write_all(stream: Optional[IO[str]], text: str, name: str) -> None:
    """Write ASCII text, PlexctlError unless all is taken. Nothing is left in a buffer to fail at exit."""
    try:
        if stream is None:
            raise OSError(errno.EBADF, "it is closed")
        try:
            fd = stream.fileno()
        except (OSError, AttributeError):  # not a file: a test's or a library user's
            stream.write(text)
            stream.flush()
            return
        stream.flush()
        raw = text.encode("ascii", "backslashreplace")
        while raw:
            try:
                raw = raw[os.write(fd, raw):]
            except BlockingIOError:
                wait_for(fd, select.POLLOUT)
    except (OSError, ValueError) as error:
        raise PlexctlError(f"cannot write to {name}: {show_error(error)}") from error


class Messages:
    """Lines for stderr, from any thread, and the live line.

    One thread writes all of them, in order: a stderr that takes nothing (a full pipe, a stopped
    terminal) delays nothing else.
    """

    def __init__(self, stream: Any, options: Any) -> None:
        # one for our lines alone: COMMAND writes to it as well, and that of --stdio may be ssh's, in raw mode
        self.has_terminal = (options.mode in ("print", "--proxy") and not options.quiet
                             and terminal_width(stream) > 0)
        self._stream = stream
        self._is_quiet = options.quiet
        self._is_verbose = options.verbose
        self._is_silent = options.mode == "--stdio" and not options.verbose
        self._queue: Any = queue.Queue()  # lines, the live line (without a line end), events; None: the end
        if not start_thread(self._write):
            raise PlexctlError("cannot start a thread (ulimit -u)")

    def report_error(self, error: PlexctlError) -> None:
        self._queue.put(f"plexctl: error: {error}\n")

    def report(self, line: str) -> None:
        if not self._is_quiet:
            self._queue.put(f"plexctl: {line}\n")

    def notice(self, line: str) -> None:
        """Write a line that --stdio leaves out without -v."""
        if not self._is_silent:
            self.report(line)

    def say(self, line: str) -> None:
        """Write a line that only -v shows."""
        if self._is_verbose:
            self.report(line)

    def show(self, line: str) -> None:
        """Draw the live line, cut to the terminal, if we are in the foreground and nothing else waits."""
        if not self.has_terminal or not self._queue.empty():
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no job control, as on Windows
            if os.tcgetpgrp(self._stream.fileno()) != os.getpgrp():  # `plexctl ... &`
                return
        width = max(0, terminal_width(self._stream) - 3)  # the echo of Ctrl-C stands behind it
        while len(line) > width:
            line = line.rpartition(", ")[0] or line[:width]
        self._queue.put(line)

    def flush(self) -> None:
        """Wipe the live line, and wait until everything is written, for HURRY_SECONDS at most."""
        written = threading.Event()
        self._queue.put("")
        self._queue.put(written)
        written.wait(HURRY_SECONDS)

    def close(self) -> None:
        """Write what there is, and end the thread; what is reported later is lost."""
        self.flush()
        self._queue.put(None)

    def _write(self) -> None:
        shown = 0  # characters of the live line that stand there
        for text in iter(self._queue.get, None):
            if isinstance(text, threading.Event):
                text.set()
                continue
            wipe = ""
            if shown:  # on several rows, if the terminal has become narrower
                wipe = "\x1b[1A" * ((shown - 1) // max(1, terminal_width(self._stream))) + "\r\x1b[J"
            shown = 0 if text.endswith("\n") else len(text)
            with contextlib.suppress(Exception):  # closed or full: there is nowhere to say so
                write_all(self._stream, wipe + text, "standard error")


# ---------------------------------------------------------------------------------- command line

SUBCOMMAND = "tcp-forward"
USAGE = """plexctl tcp-forward --project-id UUID --resource-id UUID
               --host HOST --port PORT [options]
               [--proxy | --stdio | -- COMMAND [ARG ...]]"""
SHORT_USAGE = "usage: " + " ".join(USAGE.split())
ABOUT = """\
Ask a plexsphere control plane for a one-time mediated session to a TCP target
behind a Node, and print its listener endpoint, to connect to until it expires.
With --proxy, --stdio or -- COMMAND listen locally and forward connections, and
revoke the session at the end."""
EXAMPLES = """\
examples, with the four required options for $TARGET (write them out: zsh and
fish do not split a variable):
  plexctl tcp-forward $TARGET
  plexctl tcp-forward $TARGET --proxy --local-addr 127.0.0.1:15432
  plexctl tcp-forward $TARGET -- psql -h {host} -p {port} -U postgres
  ssh -o ProxyCommand="plexctl tcp-forward $TARGET --stdio" behind-the-node

In COMMAND's arguments {host}, {port} and {addr} are replaced; its environment
has PLEXCTL_LOCAL_HOST, _PORT and _ADDR. plexctl exits with its status.

exit codes: 0 success, 1 failure, 2 usage error, 3 credentials, 4 forbidden,
77 ReBAC denial, 126 COMMAND cannot be executed, 127 COMMAND not found"""
REQUIRED = ("--project-id", "--resource-id", "--host", "--port")
FLAGS: Dict[str, List[Tuple[str, Any, str]]] = {  # by group: flag, parser of its value (None: a switch), help
    "target": [
        ("--project-id UUID", parse_uuid, "owning Project (required)"),
        ("--resource-id UUID", parse_uuid, "target Resource (required)"),
        ("--host HOST", parse_target_host, "target host, as the Node sees it (required)"),
        ("--port PORT", lambda text: parse_int(text, 1, PORT_MAX), "target port, 1 to 65535 (required)"),
        ("--ttl-seconds N", lambda text: parse_int(text, 0, 10 ** 9),
         "requested lifetime; 0 (default): the server's default")],
    "forwarding": [
        ("--proxy", None, "listen locally and forward until the session expires or you press Ctrl-C"),
        ("--stdio", None, "forward one connection over stdin and stdout (for ssh's ProxyCommand)"),
        ("--local-addr ADDR", parse_local_address,
         "where to listen: ADDRESS:PORT or unix:/path (default 127.0.0.1:0, a free port)"),
        ("--wait-seconds N", parse_seconds, "how long to wait for the Node's listener (default 90)"),
        ("--max-sessions N", lambda text: parse_int(text, 1, 32),
         "maximum number of sessions, 1 to 32 (default 4); each open connection uses one"),
        ("--min-sessions N", lambda text: parse_int(text, 1, 32), "sessions to keep ready (default 1)"),
        ("--renew", None, "issue a new session when one has expired, instead of ending"),
        ("--keep-session", None, "do not revoke sessions on exit"),
        ("--allow-other-users", None, "let other local users use the local port")],
    "global options": [
        ("--server URL", str, "control plane (or PLEXSPHERE_URL, or a profile)"),
        ("--profile NAME", str, "profile of ~/.config/plexctl/config.json"),
        ("--token-file PATH", str,
         "bearer token file, mode 0600; - is stdin (or PLEXSPHERE_TOKEN, or a profile)"),
        ("--ca-file PATH", str, "CA bundle to use instead of the system's"),
        ("--allow-http", None, "allow a plain-http server that is not loopback"),
        ("--output FORMAT", matching("text|json|yaml", "text, json or yaml"), "text (default), json or yaml"),
        ("--reveal-secrets", None, "print the session token to stderr, and record that"),
        ("-v --verbose", None, "log requests and connections to stderr"),
        ("-q --quiet", None, "print errors only on stderr"),
        ("--yes", None, "ignored"),
        ("--version", None, "print the version"),
        ("-h --help", None, "print this help")]}
FLAG_ROWS = [row for rows in FLAGS.values() for row in rows]
FLAG_NAMES = [word for flag, _, _ in FLAG_ROWS for word in flag.split() if word[0] == "-"]
VALUE_PARSERS = {flag.split()[0]: parse for flag, parse, _ in FLAG_ROWS if parse is not None}


class Parser(argparse.ArgumentParser):
    """argparse's parser, which raises UsageError, and does not show a value: it may be a secret."""

    def error(self, message: str) -> NoReturn:
        flag = message.partition(":")[0].replace("argument ", "")
        # no other error is left to argparse: values are parsed later, and unknown words are returned
        fault = ("needs a value; is a variable empty?" if "expected one argument" in message else
                 "must be true or false, or left out")
        raise UsageError(f"{flag}: {fault}")


def attribute_of(flag: str) -> str:
    """Return the name of the attribute in which argparse keeps a flag's value."""
    return flag[2:].replace("-", "_")


def create_parser() -> Parser:
    """Create one parser for all flags: those of the command may come before it as well."""
    parser = Parser("plexctl", USAGE, ABOUT, EXAMPLES, add_help=False, allow_abbrev=False,
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=80))
    parser.color = False  # type: ignore[attr-defined]  # 3.14 would colour the help
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, parse, text in rows:
            *names, last = flag.split()
            if parse is not None:
                group.add_argument(*names, metavar=last, action="append", help=text)
            else:
                group.add_argument(*names, last, action="store_true", help=text)
                for value in ("true", "false"):
                    group.add_argument(f"{last}={value}", action="store_" + value, dest=attribute_of(last),
                                       help=argparse.SUPPRESS)
    parser.set_defaults(ttl_seconds=["0"], wait_seconds=["90"], output=["text"])
    return parser


def parse_arguments(argv: Sequence[str]) -> Tuple[str, Any]:
    """Return what -h or --version prints, or the options."""
    end = argv.index("--") if "--" in argv else len(argv)
    words: List[str] = []
    parser = create_parser()
    try:
        for word in argv[:end]:  # what argparse makes of -vq, -v= and -vx differs from version to version
            if re.match("-[hvq]+[^hvq]", word):
                raise UsageError(describe_unknown(word))
            is_group = re.fullmatch("-[hvq]+", word)
            words += ["-" + letter for letter in word[1:]] if is_group else [word]
        options, others = parser.parse_known_args(words)
        has_command = SUBCOMMAND in others
        if has_command:
            others.remove(SUBCOMMAND)
        if others and others[0][:1] != "-":  # before -h, which may be that of `psql -h HOST`
            word = show_word(others[0])
            if has_command:
                raise UsageError(f"unexpected argument{word}; put -- before the command to run")
            raise UsageError(f"unknown command{word}{suggest(others[0], [SUBCOMMAND]) or ';'} {SHORT_USAGE}")
        if options.help:
            return parser.format_help(), None
        if options.version:
            return f"plexctl {__version__}\n", None
        if others:
            raise UsageError(describe_unknown(others[0].partition("=")[0]))
        if not has_command:
            raise UsageError(f"no command; {SHORT_USAGE}")
        convert_values(options)
        options.command = list(argv[end + 1:])
        if end < len(argv) and not any(options.command[:1]):
            raise UsageError("a command is required after --")
        check_together(options)
        return "", options
    except UsageError as error:
        raise UsageError(f"{error} (see plexctl --help)") from None


def convert_values(options: argparse.Namespace) -> None:
    """Parse all values of each flag, and keep the last; UsageError shows none, since it may be a secret."""
    missing = [flag for flag in REQUIRED if getattr(options, attribute_of(flag)) is None]
    if missing:
        raise UsageError(f"missing arguments: {', '.join(missing)}")
    for flag, parse in VALUE_PARSERS.items():
        for value in getattr(options, attribute_of(flag)) or []:
            # the next flag, as --host=-v; argparse makes --port=-- an empty list, up to 3.12
            if not value or re.match("-[^0-9]", value):
                raise UsageError(f"{flag}: needs a value; is a variable empty?")
            try:
                setattr(options, attribute_of(flag), parse(value))
            except ValueError as error:
                raise UsageError(f"{flag}: {error}") from None


def describe_unknown(flag: str) -> str:
    """Describe an unknown flag, without what may be a secret."""
    first = flag.split()[0]
    if first != flag:
        name = f" ({first} ...)" if first in FLAG_NAMES else ""
        return (f"several words in one argument{name}: $TARGET must not be quoted, and zsh and fish do not "
                "split it")
    if len(flag) < 3 or flag[:2] != "--":
        return "unknown flag " + escape(flag[:2]) + ("...; short flags take no value" if flag[2:] else "")
    return f"unknown flag {escape(flag, 40)}{suggest(flag, FLAG_NAMES)}"


def suggest(word: str, known: Sequence[str]) -> str:
    """Return which of the known words was probably meant."""
    import difflib
    longer = [each for each in known if each.startswith(word)]
    alike = longer or difflib.get_close_matches(word, known, 1, 0.8)
    return f"; did you mean {' or '.join(alike)}?" if alike else ""


def check_together(options: argparse.Namespace) -> None:
    """Check flags that exclude or need one another; set `mode` and defaults that depend on others."""
    def given(*flags: str) -> List[str]:
        return [flag for flag in flags if getattr(options, attribute_of(flag))]

    command, local = options.command, options.local_addr
    modes = given("--proxy", "--stdio")
    if command:
        modes.append("-- COMMAND")
    if len(modes) > 1:
        raise UsageError(f"{modes[0]} and {modes[1]} cannot be used together")
    if modes and os.name != "posix":
        raise UsageError(f"{modes[0]} needs Linux or macOS; on Windows, use WSL")
    options.mode = modes[0] if modes else "print"
    listening_flags = given("--max-sessions", "--min-sessions", "--renew", "--allow-other-users")
    if local and (local.path or options.stdio):
        listening_flags.append("--local-addr unix:" if local.path else "--local-addr")
    if listening_flags and options.mode in ("print", "--stdio"):
        raise UsageError(f"{listening_flags[0]} needs --proxy or -- COMMAND")
    if options.keep_session and not modes:
        raise UsageError("--keep-session needs --proxy, --stdio or -- COMMAND")
    for flag in given("--token-file", "--ca-file"):
        if options.stdio and is_standard_input(getattr(options, attribute_of(flag))):
            raise UsageError(f"{flag} - and --stdio cannot be used together: both read standard input")
    if local and local.path and any("{port}" in word for word in command):
        raise UsageError("--local-addr unix: has no {port} for COMMAND, but {host} and {addr}")
    options.max_sessions = options.max_sessions or 4
    options.min_sessions = options.min_sessions or 1
    if options.min_sessions > options.max_sessions:
        raise UsageError(f"--min-sessions must not be more than --max-sessions ({options.max_sessions})")
    if options.server:
        check_server(options.server, "--server", options.allow_http)
    options.local_addr = local or LocalAddress("127.0.0.1", 0)


# ----------------------------------------------------------------------------------------- modes

WAIT_SECONDS = 0.05  # between two looks of the main thread: a signal's handler cannot wake it
REDRAW_SECONDS = 1.0  # of the live line
STATUS_SECONDS = 60
HANGUP = getattr(signal, "SIGHUP", 0)  # Windows has none


class Foreground:
    """The main thread, which waits for signals and for other threads, and calls `tick` meanwhile.

    While COMMAND runs, SIGINT and SIGQUIT are its own; SIGHUP, SIGUSR1 and SIGUSR2 are passed on as often as
    they come; all others are passed on, and ask for the end.
    """

    def __init__(self) -> None:
        self.tick: Callable[[], None] = lambda: None
        self.signals: List[int] = []  # until `wait` raises them as Interrupted
        self.ignored: Tuple[int, ...] = ()
        self.passed_on: Tuple[int, ...] = ()  # to COMMAND; they do not ask for the end
        self._asked = 0  # signals that asked for the end

    def handle(self, signum: int, frame: object) -> None:
        """Hear a signal; the third that asks for the end ends the process at once."""
        if signum not in self.ignored:
            self.signals.append(signum)
            self._asked += signum not in self.passed_on
            if self._asked > 2:
                end_by_signal(signum)

    def wait(self, seconds: float, done: Optional[threading.Event] = None) -> bool:
        """Wait so long, or until `done` is set; return whether it is. Interrupted for a signal."""
        done, deadline = done or threading.Event(), elapsed_seconds() + seconds
        while not done.is_set():
            if self.signals:
                raise Interrupted(self.signals.pop(0))
            left = deadline - elapsed_seconds()
            if left <= 0:
                return False
            done.wait(min(WAIT_SECONDS, left))
            self.tick()
        return True

    def call(self, function: Callable[[], Any]) -> Any:
        """Run it in a thread, so that a signal ends the wait; return or raise what it does."""
        self.wait(0)  # a signal that is here already: then nothing is begun
        outcome = Outcome(function)
        self.wait(float("inf"), outcome.done)
        return outcome.result()


def find_command(name: str, environ: Environ) -> str:
    """Find the program that COMMAND names; exit 127 or 126 like a shell, before anything is issued."""
    import subprocess  # noqa: F401  # start_command needs it: a Python that lacks it costs no session
    path = environ.get("PATH", os.defpath)
    found = shutil.which(name, path=path)
    if found and os.path.isfile(found):
        return found
    if shutil.which(name, os.F_OK, path) or (os.path.dirname(name) and os.path.exists(name)):
        raise PlexctlError(f"{escape(name)}: cannot be executed", exit_code=EXIT_NOT_EXECUTABLE)
    raise PlexctlError(f"{escape(name)}: command not found", exit_code=EXIT_NOT_FOUND)


def set_core_limit(soft: Optional[int]) -> Optional[int]:
    """Set the soft limit of core files; return the one before, None if it stays as it is."""
    if soft is None:
        return None
    try:
        before, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
        return before
    except (NameError, OSError, ValueError):  # Windows; the hard limit is 0
        return None


class Run(Foreground):
    """One invocation: the options, and what every mode of it needs."""

    def __init__(self, options: Any, environ: Environ, messages: Messages, core_limit: Optional[int]) -> None:
        super().__init__()
        self.options = options
        self.environ = environ
        self.messages = messages
        self.core_limit = core_limit  # that COMMAND is to have; None: the one that there is
        self.audit: Optional[AuditLog] = None
        self.has_told = False  # what is wrong with the end of --stdio's connection
        self.began = elapsed_seconds()
        self.request = SessionRequest(options.project_id, options.resource_id, options.host,
                                      options.port, options.ttl_seconds)
        self.target = escape(join_host_port(options.host, options.port), 60)  # for people

    def execute(self) -> int:
        """Return the exit code. PlexctlError and Interrupted leave no session behind either."""
        options, messages = self.options, self.messages
        program = find_command(options.command[0], self.environ) if options.command else ""
        # in threads, since the token and --ca-file may come from a pipe
        server, token = self.call(lambda: resolve_credentials(
            options.server, options.profile, options.token_file, options.allow_http, self.environ))
        plane = self.call(lambda: ControlPlane(
            server, token, options.ca_file, self.environ, say=messages.say, notice=messages.notice))
        self.ledger = Ledger(plane, options.project_id, messages.report, messages.say, messages.notice)
        try:
            if options.mode == "print":
                return self.print_coordinates()
            return self.carry_stdio() if options.mode == "--stdio" else self.forward(program)
        finally:
            self.finish(self.ledger.leave, LEAVE_SECONDS, "releasing the session")
            if options.keep_session:
                for words in self.ledger.list_kept():
                    messages.report(words)
            for words in self.ledger.settle(sys.exc_info()[1]):
                messages.report("warning: " + words)
            if self.audit is not None:  # not before: an interrupted record may still be on its way
                self.audit.close()

    def finish(self, function: Callable[[], None], seconds: float, slow: str = "") -> None:
        """Run what must still be done, for `seconds` at most; a further signal leaves HURRY_SECONDS.

        A hangup does not: ssh sends one as soon as it has seen the end of --stdio.
        `slow` is reported on a terminal if it takes longer than a second.
        """
        outcome, began = Outcome(function), elapsed_seconds()
        deadline = began + seconds
        while not outcome.done.wait(WAIT_SECONDS) and elapsed_seconds() < deadline:
            if any(signum != HANGUP for signum in self.signals):
                deadline = min(deadline, elapsed_seconds() + HURRY_SECONDS)
            if slow and self.messages.has_terminal and elapsed_seconds() - began > 1:
                self.messages.report(slow)
                slow = ""

    def establish(self, issue: Callable[[], MediatedSession]) -> MediatedSession:
        """Return the first session; reveal its token if that is wanted."""
        if self.options.reveal_secrets:
            self.audit = AuditLog(self.environ, self.messages.report)
        self.wait(0)  # a signal that is here already: then nothing is issued
        opened = Outcome(issue)
        while not self.wait(REDRAW_SECONDS, opened.done):
            who = "Node" if self.ledger.has_issued() else "control plane"
            self.messages.show(f"waiting for the {who}: {show_seconds(elapsed_seconds() - self.began)}")
        session: MediatedSession = opened.result()
        audit, issued = self.audit, session.issued
        if audit is not None:
            self.call(lambda: audit.record(self.ledger.plane.server, self.request, issued))
            text = ("plexctl: warning: the next line is the session token, a secret\n"
                    f"PLEXCTL_SESSION_TOKEN={issued.token.reveal()}\n")
            self.messages.flush()
            self.call(lambda: write_all(sys.stderr, text, "standard error"))
        if self.options.keep_session:
            self.ledger.is_kept = True
        return session

    def issue_one(self) -> MediatedSession:
        session = MediatedSession(self.ledger, self.options.wait_seconds)
        session.open(self.request)
        return session

    def print_document(self, local: LocalAddress, session: MediatedSession) -> None:
        """Write the document to stdout; PlexctlError unless all of it was taken."""
        document = {"session_id": session.session_id, "kind": "tcp", "local_addr": str(local),
                    "listener_endpoint": str(session.endpoint),
                    "target": {"host": self.request.host, "port": self.request.port},
                    "expires_at": session.issued.expires_at}
        if self.options.output == "json":
            text = json.dumps(document) + "\n"
        elif self.options.output == "yaml":
            text = format_yaml(document)
        else:
            text = format_text(document, terminal_width(sys.stdout))
        self.messages.flush()
        self.call(lambda: write_all(sys.stdout, text, "standard output"))

    def print_coordinates(self) -> int:
        """Print mode: bind nothing for longer than a moment; dial and revoke nothing."""
        local = self.options.local_addr
        if not local.port:
            try:
                with socket.socket(socket.AF_INET6 if ":" in local.host else socket.AF_INET) as sock:
                    sock.bind((local.host, 0))
                    local = LocalAddress(local.host, sock.getsockname()[1])
            except OSError as error:
                raise PlexctlError(f"--local-addr {local}: cannot be bound: {show_error(error)}") from error
        session = self.establish(self.issue_one)
        self.print_document(local, session)
        self.ledger.is_kept = True
        if self.messages.has_terminal:
            self.messages.report(f"nothing listens on {local}: connect to {session.endpoint}, or use --proxy "
                                 f"to listen; the session stays until {session.issued.expires_at}")
        return EXIT_OK

    def carry_stdio(self) -> int:
        """--stdio: carry one connection over descriptors 0 and 1."""
        session, cancel = self.establish(self.issue_one), self.ledger.plane.cancel

        def pace(seconds: float) -> float:
            session.watch()
            session.check()
            if cancel.is_set():
                raise Cancelled("interrupted")
            return seconds

        def carry() -> None:
            relay.carry()
            relay.await_end(STUCK_SECONDS if relay.ending == CLIENT_CLOSED else NODE_END_SECONDS)
            relay.close_remote()
            self.check_end(session, relay)

        remote = self.call(lambda: session.dial(pace))
        client = StandardSocket() if stat.S_ISSOCK(os.fstat(1).st_mode) else StandardStreams()
        relay = Relay(client, remote, create_buffers(), lambda: bool(wait_for(client.writes_at, 0, 0)),
                      lambda: self.explain_end(session, relay), pace)
        carried = Outcome(carry, or_here=False)
        try:
            self.wait(float("inf"), carried.done)
        except Interrupted:
            # ssh hangs up as soon as it has seen the end: so once that is under way, what has ended the
            # connection decides the status. Where that was the client, the signal does: nobody sees the end.
            signal_decides = relay.ending in (OPEN, CLIENT_CLOSED)
            if signal_decides or not carried.done.wait(ASK_LIMIT_SECONDS):
                raise
        finally:
            cancel.set()  # after a signal the thread must not go on, where this is a library
            carried.done.wait(HURRY_SECONDS)
            counts = Counts(ended=1, up=relay.up.moved, down=relay.down.moved)
            self.messages.say(self.describe_total(counts, "connection closed"))
        carried.result()  # raises what is wrong with the end
        return EXIT_OK

    def explain_end(self, session: MediatedSession, relay: Relay) -> None:
        """Report what is wrong with the end, before the client sees that: ssh hangs up then."""
        if session.why is None:
            session.ask(afresh=True)  # an answer to an earlier question says nothing of the end
            session.await_answer()
        try:
            self.check_end(session, relay)
        except PlexctlError as error:
            if not self.ledger.plane.cancel.is_set():  # else we have ended it
                self.has_told = True
                self.messages.report_error(error)
                self.messages.flush()

    def check_end(self, session: MediatedSession, relay: Relay) -> None:
        """Raise what is wrong with the end of the connection, unless something came and it was taken."""
        error, down = session.why or relay.error, relay.down
        if isinstance(error, PlexctlError):
            raise error
        got_nothing = not (down.moved or down.count_undelivered())
        if relay.ending in BY_NODE and got_nothing:
            raise PlexctlError(describe_unreachable(self.request))
        if error is not None:
            raise PlexctlError(f"the connection ended: {show_error(error)}")
        took_nothing_or_not_all = not down.moved or down.count_undelivered()
        if relay.ending == CLIENT_CLOSED and took_nothing_or_not_all:
            raise PlexctlError("cannot write to standard output: nobody reads it")

    def forward(self, program: str) -> int:
        """--proxy and -- COMMAND. The address is bound first: one in use costs no session."""
        options, messages, reason = self.options, self.messages, ""
        with Forwarder(options.local_addr, self.ledger, self.request, options.max_sessions,
                       options.min_sessions, options.renew, options.wait_seconds,
                       options.allow_other_users) as forwarder:
            session = self.establish(forwarder.establish)
            self.tick = forwarder.tick  # in every wait from now on
            self.tell_systemd("READY=1")
            try:
                if program:
                    status = self.run_command(program, forwarder)
                    reason = "COMMAND ended"
                    return status
                self.print_document(forwarder.local, session)
                if messages.has_terminal:
                    messages.report(f"forwarding {forwarder.local} to {self.target}; press Ctrl-C to stop")
                self.watch(forwarder)
            except Interrupted as interrupted:  # an error is told by itself
                reason = str(interrupted)
                raise
            finally:
                self.tell_systemd("STOPPING=1")
                self.finish(forwarder.stop, CLOSE_SECONDS + 1)
                total = self.describe_total(forwarder.count(), reason)
                if forwarder.listener.unidentified:
                    total += f"; {forwarder.listener.unidentified} closed before the owner could be checked"
                messages.report(total)

    def watch(self, forwarder: Forwarder) -> NoReturn:
        """Look after the forwarder until something ends it, and raise that."""
        told, tell_on = "", 0.0
        while forwarder.over is None:
            counts, left = forwarder.count(), forwarder.seconds_left()
            until = f"{show_seconds(left)} left, " if left else ""  # first what matters most: the end is cut
            words = (f"{until}{counts.open} open, {counts.waiting} waiting, {counts.ended} ended, "
                     f"{show_count(counts.sessions, 'session')}, {show_bytes(counts.up)} up, "
                     f"{show_bytes(counts.down)} down, {forwarder.local} -> {self.target}")
            self.messages.show(words)
            if words != told and elapsed_seconds() >= tell_on:
                told, tell_on = words, elapsed_seconds() + STATUS_SECONDS
                self.tell_systemd("STATUS=" + words)
            self.wait(REDRAW_SECONDS, forwarder.is_closing)
        self.wait(0)  # a signal that came before that decides
        raise forwarder.over

    def describe_total(self, counts: Counts, reason: str) -> str:
        return (f"{show_count(counts.ended, 'connection')}, {show_bytes(counts.up)} up, "
                f"{show_bytes(counts.down)} down, {show_seconds(elapsed_seconds() - self.began)}"
                + (f": {reason}" if reason else ""))

    def tell_systemd(self, state: str) -> None:
        """Notify systemd (sd_notify(3), Type=notify); warn if that fails."""
        path = self.environ.get("NOTIFY_SOCKET", "")
        try:
            if path[:1] in ("/", "@"):
                send_record("\0" + path[1:] if path[0] == "@" else path, state.encode())
        except (OSError, ValueError) as error:
            self.ledger.tell_once(f"warning: NOTIFY_SOCKET: systemd was not told: {show_error(error)}")

    def run_command(self, program: str, forwarder: Forwarder) -> int:
        """-- COMMAND: Ctrl-C and Ctrl-\\ of the terminal are its own, other signals are handed on."""
        self.messages.flush()  # before anything that COMMAND says
        self.wait(0)
        self.ignored = (signal.SIGINT, signal.SIGQUIT)
        self.passed_on = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        try:
            child = self.start_command(program, forwarder.local)
            self.wait_for_command(child, forwarder)
        finally:
            # what came while it ended was for COMMAND, too
            self.signals[:] = [each for each in self.signals if each not in self.passed_on]
            self.ignored = self.passed_on = ()
        self.deliver(forwarder)
        status = int(child.returncode)
        return status if status >= 0 else EXIT_SIGNAL_BASE - status

    def start_command(self, program: str, local: LocalAddress) -> Any:
        """Start COMMAND, with its placeholders and environment filled in."""
        import subprocess
        host, port = (local.path, "") if local.path else (local.host, str(local.port))
        values = {"{host}": host, "{port}": port, "{addr}": str(local)}
        arguments = [re.sub(r"\{(?:host|port|addr)\}", lambda found: values[found.group()], word)
                     for word in self.options.command]
        environ = dict(self.environ, PLEXCTL_LOCAL_HOST=host, PLEXCTL_LOCAL_PORT=port,
                       PLEXCTL_LOCAL_ADDR=str(local))
        environ.pop("PLEXSPHERE_TOKEN", None)
        if not local.path and is_loopback(local.host):
            exempt = environ.get("no_proxy") or environ.get("NO_PROXY")  # or curl would go to a proxy with it
            environ["no_proxy"] = environ["NO_PROXY"] = f"{exempt},{local.host}" if exempt else local.host
        # COMMAND could read the token there, again or, of /dev/stdin, for the first time
        stdin = subprocess.DEVNULL if is_standard_input(self.options.token_file or "") else None
        our_limit = set_core_limit(self.core_limit)
        try:
            return subprocess.Popen(arguments, executable=program, env=environ, stdin=stdin)
        except (OSError, ValueError) as error:
            raise PlexctlError(f"{escape(arguments[0])}: cannot be executed: {show_error(error)}",
                               exit_code=EXIT_NOT_EXECUTABLE) from error
        finally:
            set_core_limit(our_limit)

    def wait_for_command(self, child: Any, forwarder: Forwarder) -> None:
        """Wait for COMMAND's end; the second signal that asks for it is raised as Interrupted."""
        is_terminated = False
        while child.poll() is None:
            try:
                self.wait(WAIT_SECONDS)
            except Interrupted as interrupted:
                with contextlib.suppress(OSError):  # it ended just now, or is another user's by now
                    child.send_signal(interrupted.signum)
                if interrupted.signum not in self.passed_on:
                    if is_terminated:
                        raise
                    is_terminated = True
            if forwarder.over is not None:  # its tick resets whoever connects, and the port stays ours
                self.ledger.tell_once(f"warning: {forwarder.over}; connections are refused from now on; "
                                      "COMMAND is still running", "over")

    def deliver(self, forwarder: Forwarder) -> None:
        """Wait until what clients had sent before they closed has arrived, as long as it moves."""
        forwarder.listener.assume_closed()
        time.sleep(WAIT_SECONDS)  # a busy kernel may have a last connection on its way to the backlog
        undelivered, moved_on = forwarder.list_undelivered(), elapsed_seconds()
        while undelivered and forwarder.over is None and elapsed_seconds() - moved_on < LEAVE_SECONDS:
            self.wait(WAIT_SECONDS)
            before, undelivered = undelivered, forwarder.list_undelivered()
            # where nobody knows who has closed, those who have not could send for ever
            if undelivered != before and not forwarder.listener.takes_all_for_closed:
                moved_on = elapsed_seconds()
        if undelivered or forwarder.over is not None:
            reason = f": {forwarder.over}" if forwarder.over else ""
            self.ledger.warn_once("COMMAND has ended, and what it sent may not have arrived" + reason, "over")


# ------------------------------------------------------------------------------------------ main

__all__ = [  # what is stable for those who vendor this file
    "ApiError", "ControlPlane", "CredentialsError", "Endpoint", "Forwarder", "IssuedSession", "Ledger",
    "LocalAddress", "MediatedSession", "PlexctlError", "Secret", "Server", "Session", "SessionOver",
    "SessionRequest", "TransportError", "UsageError", "main", "parse_local_address", "parse_server"]
NOT_HANDLED = (  # faults, and what ends no process
    "SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS", "SIGTSTP", "SIGTTIN", "SIGTTOU",
    "SIGCONT", "SIGCHLD", "SIGURG", "SIGWINCH", "SIGINFO")


def handle_signals(handle: Callable[[int, Any], None]) -> Dict[int, Any]:
    """Have every signal handled that would end the process, unless somebody else does; return the old ones.

    SIGCHLD, where it is ignored, gets its default action, or COMMAND has no status.
    """
    before: Dict[int, Any] = {}
    others = {getattr(signal, name, None) for name in NOT_HANDLED}
    for signum in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):  # SIGKILL, the C library's own; not the main thread
            current = signal.getsignal(signum)
            if signum not in others and current in (signal.SIG_DFL, signal.default_int_handler):
                before[signum] = signal.signal(signum, handle)
            elif signum == getattr(signal, "SIGCHLD", None) and current == signal.SIG_IGN:
                before[signum] = signal.signal(signum, signal.SIG_DFL)
    return before


def as_error(error: Exception) -> PlexctlError:
    """Return what ended the run as an error with one line and an exit code."""
    if isinstance(error, PlexctlError):
        return error
    if isinstance(error, ImportError):  # of a module that the standard library loads late
        return PlexctlError(f"this Python lacks a part of its standard library: {escape(str(error))}")
    if isinstance(error, (OSError, MemoryError)):
        return PlexctlError(f"the system refuses: {show_error(error)}")
    # a defect; its text may hold what it was given
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_globals is globals()]
    return PlexctlError(f"internal error in line {lines[-1]}, please report it: {show_error(error)}")


def perform(argv: Sequence[str], environ: Environ, ends_process: bool = False) -> int:
    """Run the command; return its exit code, or -n if signal n is to end the process."""
    # a core would hold the tokens; 1 byte, since 0 would not stop a core_pattern that is a pipe (core(5))
    core_limit = set_core_limit(1) if ends_process else None
    try:
        prints, options = parse_arguments(argv)
        if prints:
            write_all(sys.stdout, prints, "standard output")
            return EXIT_OK
        messages = Messages(sys.stderr, options)
        invocation = Run(options, environ, messages, core_limit)
        handlers = handle_signals(invocation.handle)
    except Exception as raised:
        error = as_error(raised)
        with contextlib.suppress(PlexctlError):
            write_all(sys.stderr, f"plexctl: error: {error}\n", "standard error")
        return error.exit_code
    try:
        return invocation.execute()
    except Interrupted as interrupted:
        return -interrupted.signum
    except Exception as raised:
        error = as_error(raised)
        if not invocation.has_told:
            messages.report_error(error)
        return error.exit_code
    finally:
        messages.close()
        if not ends_process:  # a process keeps its handlers: a late signal must not change its status
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


def main(argv: Optional[Sequence[str]] = None, environ: Optional[Environ] = None) -> int:
    """Run the command; return the exit code, 128 + n if signal n ended it. Never raises."""
    status = perform(sys.argv[1:] if argv is None else argv, os.environ if environ is None else environ)
    return status if status >= 0 else EXIT_SIGNAL_BASE - status


def run() -> None:
    """Run the command as a process.

    os._exit, since Python's own exit could still change the status: a flush that fails (120), a thread
    that was given up on and wakes up. Everything is written and closed by then.
    """
    for descriptor in range(3):  # what is closed must not become another file's
        try:
            os.fstat(descriptor)
        except OSError:
            open_nowhere(os.O_RDONLY)  # the lowest free number; writing to it fails
    try:
        status = perform(sys.argv[1:], os.environ, ends_process=True)
        if status < 0:
            end_by_signal(-status)
        os._exit(status)
    except KeyboardInterrupt:  # before the handlers were there, where this is imported to be run
        end_by_signal(signal.SIGINT)


if __name__ == "__main__":
    run()
