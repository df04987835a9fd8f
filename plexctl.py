#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""plexctl: one TCP port of one machine behind a plexsphere Node, for as long as it is needed.

    plexctl tcp-forward --project-id UUID --resource-id UUID --host HOST --port PORT

asks the control plane for a one-time mediated session and prints the local address and the
listener endpoint on the Node. With --proxy, --stdio or -- COMMAND it also carries the bytes,
and revokes the session at the end.

Exit codes: 0 done; 1 transport or API failure, no listener endpoint, forwarder error, session
over; 2 usage; 3 credentials; 4 forbidden; 77 ReBAC denial; with -- COMMAND the status of COMMAND;
a signal that ends the process: that same signal, after the session is revoked.

One file, standard library only, Python 3.6 to 3.15. Read it from the top: a section uses only
those above it.

Threads: the main one waits for signals; what may block for long, the document's writing too, runs in a
daemon thread that it waits for, and another one writes messages. Each HTTP exchange has one more, given
up on at its deadline, since a name look-up has no time-out. One accepts connections (Forwarder), puts
them into a queue, and looks after it ten times a second (Sessions.tick). One worker a session takes them
from there and carries one after another, what the client sends itself and what the Node sends in its
partner (Relay), and revokes the session if that ends before the run does; at the end of the run each
revocation has a thread. What they share is in Sessions, under its one lock.

The credential: the bearer token is read in the section credentials and revealed in the section
control plane alone. Everything else holds it as a Secret; COMMAND does not get it, and no core
file is left. The session token is revealed by Run.establish alone; the section audit records
that it was, never the token.
"""
import sys

if __name__ == "__main__":
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]  # the directory of the script: another user's argparse.py may lie in /tmp
    # until the handlers stand Ctrl-C ends the process: a KeyboardInterrupt amid an import can be lost
    import _signal  # type: ignore[import-not-found]

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

try:
    import logging

    # hashlib, which urllib loads, logs a traceback for each digest that this Python lacks (FIPS);
    # with a handler that does nothing it stays off stderr
    _quiet = logging.NullHandler()
    logging.getLogger().addHandler(_quiet)
    import hashlib

    logging.getLogger().removeHandler(_quiet)
    import argparse
    import collections
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
    import subprocess
    import threading
    import time
    import urllib.error
    import urllib.request
    import zlib
    from typing import (
        IO, Any, Callable, Dict, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Type,
        Union)

    if os.name == "posix":
        import pwd
        import resource
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
EXCHANGE_SECONDS = 30
SILENT_SECONDS = 5  # after which a server that has not answered is mentioned
LEAVE_SECONDS = 10
SYSLOG_SECONDS = 2
CLOSE_SECONDS = 2
HURRY_SECONDS = 1.0  # what a second signal leaves of the time to revoke, and messages get to be written
ISSUE_ATTEMPTS = 3
RETRY_AFTER_MAX_SECONDS = 5
POLL_MIN_SECONDS = 0.5
POLL_MAX_SECONDS = 3.0
WARN_LEFT_SECONDS = (300, 60)
BODY_MAX_BYTES = 1024 * 1024
SECRET_FILE_MAX_BYTES = 64 * 1024
CA_FILE_MAX_BYTES = 16 * 1024 * 1024
TOKEN_MAX_CHARACTERS = 8192
SHOWN_MAX_CHARACTERS = 300
DOCUMENT_MAX_CHARACTERS = 3000  # of a path or a host, each of whose characters may need ten


# ---------------------------------------------------------------------------------------- errors


class PlexctlError(Exception):
    """Anything that ends the command with one line on stderr.

    `exit_code` is the process's exit status; `passing`: the same may well succeed a little later;
    `may_exist`: a session may have been issued all the same.
    """

    exit_code = EXIT_FAILURE
    passing = False
    may_exist = False

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
    """The control plane answered with an error: HTTP's status, the problem's code, Retry-After if any."""

    status = 0
    code = ""
    retry_after_seconds: Optional[float] = None


class Cancelled(PlexctlError):
    """A request that was given up because the run is ending."""


class SessionOver(PlexctlError):
    """The session expired, was revoked, or is no longer active for another reason."""


class Interrupted(Exception):
    """The first SIGINT, SIGTERM or SIGHUP; raised where the main thread waits, nowhere else."""

    def __init__(self, signum: int) -> None:
        super().__init__("ended by " + signal.Signals(signum).name)
        self.signum = signum


# ---------------------------------------------------------------------------------------- system

ON_LINUX = sys.platform.startswith("linux")
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)  # no peer's doing
READABLE, WRITABLE = 1, 4  # POLLIN and POLLOUT
# CLOCK_BOOTTIME counts suspend on Linux (7; Python names it from 3.7 on); on macOS
# CLOCK_MONOTONIC does. On Windows time.monotonic() does.
_CLOCK = 7 if ON_LINUX else getattr(time, "CLOCK_MONOTONIC", None)


def elapsed_seconds() -> float:
    """Read a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(_CLOCK) if _CLOCK is not None else time.monotonic()


def start_thread(function: Callable[..., object], *arguments: Any) -> bool:
    """Run it in a daemon thread; return False if no thread can be started."""
    try:
        threading.Thread(target=function, args=arguments, daemon=True).start()
        return True
    except (RuntimeError, MemoryError):
        return False


def send_record(path: str, data: bytes, seconds: float) -> None:
    """Send one datagram to a unix socket; OSError if it is not taken in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(seconds)
        sock.connect(path)
        sock.sendall(data)


def wait_for(fd: int, mask: int, seconds: Optional[float] = None) -> bool:
    """Wait until a descriptor is ready (mask 0: until its other end is gone); return whether it is."""
    seconds = None if seconds is None else max(0.0, seconds)
    if ON_LINUX:  # where poll() takes terminals as well, and any number
        poller = select.poll()
        poller.register(fd, mask)
        return bool(poller.poll(None if seconds is None else seconds * 1000))
    return any(select.select([fd] * (mask == READABLE), [fd] * (mask == WRITABLE), [], seconds))


def open_nowhere(flags: int) -> int:
    """A descriptor that takes or gives nothing, also where there is no /dev/null."""
    try:
        return os.open(os.devnull, flags)
    except OSError:
        return os.open(os.sep, os.O_RDONLY)


def end_by_signal(signum: int) -> None:
    """Ends the process as the signal would have: a shell sees 128 + n and stops its loops.

    But without a core file, which would hold the tokens: a limit of 1 byte is the one that the
    kernel honours for a core_pattern that is a pipe as well (core(5)).
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (NameError, OSError, ValueError):  # Windows has no resource
        pass
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def load_modules() -> None:
    """Does nothing any more; to be removed with its calls in Run."""


# ---------------------------------------------------------------------------------------- values

PORT_MAX = 65535
HOST_MAX_CHARACTERS = 253  # RFC 1035, section 2.3.4, as text
SOCKET_PATH_MAX_BYTES = 100  # sun_path has 104 on macOS, 108 on Linux
UUID_PATTERN = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"  # RFC 9562, section 4
LABEL_PATTERN = "[0-9A-Za-z_](?:[0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?"  # of a DNS name; people use _
URL_PATTERN = r"(?=[!-~]*\Z)(?i:(https?))://([^/?#@\\]+?)(:[0-9]{1,5})?(/[^?#\\]*)?"
TIME_PATTERN = r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-5][0-9]|60)" \
    r"(\.[0-9]{1,9})?(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


def escape(text: str, limit: int = SHOWN_MAX_CHARACTERS) -> str:
    """Return `text` as printable ASCII, at most `limit` characters: it cannot control a terminal."""
    shown = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[:limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def matching(pattern: str, what: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return a parser for text that matches the whole pattern; its ValueError says what it must be."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError("must be " + what)
        return convert(text)
    return parse


def one_of(*words: str) -> Callable[[str], Any]:
    """Return a parser that accepts only these words (of letters, digits and hyphens)."""
    return matching("|".join(words), "one of " + ", ".join(words))


UUID_WORDS = "a UUID of 8-4-4-4-12 hexadecimal digits"
parse_uuid = matching(UUID_PATTERN, UUID_WORDS, str.lower)
parse_session_id = matching(UUID_PATTERN, UUID_WORDS)  # which goes back as the server wrote it
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


def parse_address(host: str) -> Optional[Address]:
    """Parse an IP address literal, an IPv4-mapped one as IPv4; return None for anything else.

    Up to 3.9.4 ipaddress takes the leading zeros of 010.0.0.1, which connect() reads as octal.
    """
    if not re.fullmatch("[0-9a-fA-F:.]+", host) or re.search(r"\b0[0-9]+\.|\.0[0-9]", host):
        return None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_host_name(text: str) -> bool:
    """Tell whether this is a DNS name. With a number as the last label, connect() takes it for an address."""
    labels = (text[:-1] if text.endswith(".") else text).split(".")
    return (len(text) <= HOST_MAX_CHARACTERS and all(re.fullmatch(LABEL_PATTERN, each) for each in labels)
            and not re.fullmatch("0[xX].*|[0-9]+", labels[-1]))


def is_loopback(host: str) -> bool:
    """Tell whether `host` (a literal or a name) can only be this machine."""
    address = parse_address(host)
    return address.is_loopback if address else host.lower().rstrip(".") == "localhost"


def is_dialable(host: str, from_loopback: bool = False) -> bool:
    """Tell whether a listener endpoint may be at this address; a name is judged once it is looked up.

    Not on this machine and no multicast, unless `from_loopback`: the control plane is here, and so
    may be the Node. Never link-local: clouds have their metadata service there, and a control
    plane behind `ssh -L` is on loopback, too.
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


class Record:
    """Named fields in the order of the annotations; to be removed with Counts, its last user."""

    def __init__(self, *values: Any) -> None:
        vars(self).update(zip(type(self).__annotations__, values))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)


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
    if len(port) > 5 or has_brackets != (":" in host) or not (is_host_name(host) or parse_address(host)):
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
    scheme, _, path = text.partition(":")
    if scheme == "unix":
        if path[:1] != "/" or not path.isprintable() or len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
            raise ValueError(f"must be unix: and an absolute path of at most {SOCKET_PATH_MAX_BYTES} bytes")
        return LocalAddress("", 0, path)
    try:
        endpoint = parse_endpoint(text, lowest_port=0)
    except ValueError:
        endpoint = Endpoint("", 0)
    host = "127.0.0.1" if endpoint.host.lower() == "localhost" else endpoint.host
    if parse_address(host) is None:
        raise ValueError("must be ADDRESS:PORT, [ADDRESS]:PORT or unix:/path; a literal address, "
                         f"port 0 to {PORT_MAX}")
    return LocalAddress(host, endpoint.port)


class Server(NamedTuple):
    """A control plane's URL; the host in lower case, no slash at the end of `prefix`."""

    scheme: str
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{join_host_port(self.host, self.port)}{self.prefix}"

    def same_origin(self, other: "Server") -> bool:
        """Tell whether scheme, host and port are the same (RFC 6454, section 5)."""
        return self[:3] == other[:3]


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
    """Parse strict JSON (RFC 8259): UTF-8, no NaN, duplicate keys, lone surrogates. Numbers become floats."""
    def unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("duplicate key")
        return fields

    try:
        # an int of 1 MiB takes 3.6 a quarter of a minute; a float is infinite then, and so refused
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=float)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return document
    except (ValueError, RecursionError, MemoryError):
        pass  # raised below: the context of an exception would hold the text
    raise ValueError("not valid JSON")


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


HTTP_FAULTS = (  # the first that fits counts
    (http.client.RemoteDisconnected, "the server closed the connection"),
    (ssl.SSLEOFError, "the server closed the connection"),
    (ssl.SSLZeroReturnError, "the server closed the connection"),
    (http.client.LineTooLong, "a header is too long"),
    (http.client.IncompleteRead, "the answer was cut off"),
    (http.client.BadStatusLine, "the answer is not HTTP"),
    (http.client.UnknownProtocol, "the answer is not HTTP/1.1"))


def show_error(error: BaseException) -> str:
    """Say why something failed. Most texts of exceptions are not used: they may hold a header or a body."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return show_error(error.reason)
    for kind, words in HTTP_FAULTS:
        if isinstance(error, kind):
            return words
    if type(error) is http.client.HTTPException:  # it has no class of its own
        return "too many headers"
    reason = getattr(error, "reason", None)  # of an SSLError
    if isinstance(error, ssl.CertificateError) or reason == "CERTIFICATE_VERIFY_FAILED":
        # 3.6 has no verify_message, and its CertificateError is for the host name alone
        default = "it is for another host name" if not isinstance(error, ssl.SSLError) else ""
        words = escape(getattr(error, "verify_message", "") or default)
        return "certificate not trusted" + (f": {words}" if words else "")
    if isinstance(error, ssl.SSLError) and reason:
        return "TLS failed: " + escape(reason.replace("_", " ").lower())
    if isinstance(error, (socket.timeout, TimeoutError)) and not error.strerror:
        return "timed out"
    if isinstance(error, ImportError):
        return escape(error.msg)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return escape(error.strerror)
    _, is_proxy_s, refusal = str(error).partition("Tunnel connection failed: ")  # http.client's words
    if is_proxy_s and type(error) is OSError:
        return "the proxy refused: " + escape(refusal)
    return type(error).__name__


# ----------------------------------------------------------------------------------- credentials

CONFIG_SHAPE = ('{"default": "prod", "profiles": {"prod": '
                '{"server": "https://plexsphere.example.com", "token": "psk_..."}}}')
OPEN_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # Windows has neither
ALL_BITS, WRITE_BITS = 0o077, 0o022  # of the group and of others
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class Secret:
    """A string that does not show itself; `source`, for messages, says where it came from."""

    __slots__ = ("_value", "source")

    def __init__(self, value: str, source: str = "") -> None:
        self._value = value
        self.source = source

    def reveal(self) -> str:
        """Return the value."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled or copied")


def find_token_fault(raw: bytes) -> str:
    """Say what is wrong with a bearer token, without showing it; "" if nothing is."""
    if not raw:
        return "is empty"
    if raw.startswith(BYTE_ORDER_MARKS):
        return "starts with a byte-order mark; save it as plain ASCII"
    if raw.lower().startswith(b"bearer "):
        return 'starts with "Bearer "; give the token alone'
    if b"\n" in raw or b"\r" in raw:
        return "contains a line break"
    if b" " in raw or b"\t" in raw:
        return "contains a space"
    if len(raw) > TOKEN_MAX_CHARACTERS:
        return f"is longer than {TOKEN_MAX_CHARACTERS} characters"
    return "" if re.fullmatch(b"[!-~]+", raw) else "contains a character that is not printable ASCII"


def parse_token(raw: bytes, source: str) -> Secret:
    """Parse a bearer token: one line end is dropped, the rest must be 1 to 8192 characters of \\x21-\\x7e."""
    kept = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1] if raw.endswith(b"\n") else raw
    fault = find_token_fault(kept)
    if fault:
        raise CredentialsError(f"{source}: the token {fault}")
    return Secret(kept.decode("ascii"), source)


def show_word(word: str) -> str:
    """Quote a word of the command line for a message; "" if it may be a token in the wrong place."""
    may_be_token = len(word) > 20 or word.lower().startswith("psk")
    return "" if may_be_token and not os.path.isdir(os.path.dirname(word)) else f" '{escape(word)}'"


def find_file_fault(status: os.stat_result, forbidden_bits: int) -> str:
    """Say why a file is not safe: only we and root may own it and use it in these ways. "" if it is."""
    if os.name != "posix":
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"is owned by uid {status.st_uid}, must be yours or root's"
    mode = stat.S_IMODE(status.st_mode)
    advice = "chmod go-w" if forbidden_bits == WRITE_BITS else (
        "chmod 600 (a mounted secret: --token-file - < FILE)")
    return f"permissions {mode:04o} are too open; run {advice}" if mode & forbidden_bits else ""


def is_standard_input(path: str) -> bool:
    """Tell whether this names the file that is descriptor 0: "-", /dev/stdin, or what was redirected."""
    try:
        return path == "-" or os.path.samestat(os.stat(path), os.fstat(0))
    except (OSError, ValueError):
        return False


def read_limited(descriptor: int, limit: int) -> bytes:
    """Read to the end, waiting for a pipe's writer; ValueError if there are more than `limit` bytes."""
    raw = b""
    while len(raw) <= limit:
        try:
            piece = os.read(descriptor, limit + 1 - len(raw))
        except BlockingIOError:
            wait_for(descriptor, READABLE)
            continue
        if not piece:
            return raw
        raw += piece
    raise ValueError(f"is larger than {limit} bytes")


def read_own_file(path: str, source: str, forbidden_bits: int = ALL_BITS, limit: int = SECRET_FILE_MAX_BYTES,
                  kind: Type[PlexctlError] = CredentialsError) -> bytes:
    """Read a file on which others have none of the `forbidden_bits`; "-" is standard input, unchecked.

    It is opened first and then judged by its descriptor, so that nothing can be swapped in
    between; non-blocking, since a FIFO without a writer would block `open` for ever. The file that
    is descriptor 0, by whatever name, is read there: opened once more it would start anew, and
    all of it would be left for --stdio or COMMAND to give away. An error of `kind` where it cannot
    be read, CredentialsError where it is not safe.
    """
    at_stdin = is_standard_input(path)
    if at_stdin and sys.stdin is None:
        raise kind(f"{source}: standard input is closed")
    try:
        descriptor = os.dup(0) if at_stdin else os.open(path, os.O_RDONLY | OPEN_AT_ONCE)
    except (OSError, ValueError) as error:
        raise kind(f"{source}: cannot be opened: {show_error(error)}") from error
    try:
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)
        # a pipe, a socket or a terminal at standard input is the caller's choice
        if path != "-" and (is_file or not at_stdin):
            if not is_file and not stat.S_ISFIFO(status.st_mode):
                raise ValueError("must be a regular file or a pipe")
            fault = find_file_fault(status, forbidden_bits)
            if fault:
                raise CredentialsError(f"{source}: {fault}")
        if path != "-" and is_file:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return read_limited(descriptor, limit)
    except OSError as error:
        raise kind(f"{source}: cannot be read: {show_error(error)}") from error
    except ValueError as error:
        raise kind(f"{source}: {error}") from error
    finally:
        os.close(descriptor)


def read_ca_file(path: str) -> str:
    """Read the PEM text of --ca-file. Whoever can write it decides which server gets the bearer token."""
    source = "--ca-file " + escape(path)
    raw = read_own_file(path, source, WRITE_BITS, CA_FILE_MAX_BYTES, UsageError)
    if b"-----BEGIN CERTIFICATE-----" not in raw:
        raise UsageError(f"{source}: not a PEM bundle of certificates")
    return raw.decode("ascii", "ignore")  # comments may be in UTF-8


class Profile(NamedTuple):
    """One entry of the config file: server URL and token, either may be missing ("", None)."""

    server: str = ""
    token: Optional[Secret] = None


def find_own_file(variable: str, below_home: str, name: str, environ: Environ) -> str:
    """Return the path of our file in an XDG base directory (freedesktop.org); "" without a home directory."""
    base = environ.get(variable, "")
    if not os.path.isabs(base):
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), below_home)
    return os.path.join(base, "plexctl", name) if os.path.isabs(base) else ""


def is_object(value: Any, **types: type) -> bool:
    """Tell whether this is a JSON object with only these fields, each of its type."""
    return isinstance(value, dict) and all(isinstance(value[name], types.get(name, ())) for name in value)


def read_profile(name: str, environ: Environ) -> Profile:
    """Read the profile called `name`, or for "" the default one, which may be empty."""
    path = find_own_file("XDG_CONFIG_HOME", ".config", "config.json", environ)
    source = "config file " + escape(path)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        if name:
            raise CredentialsError(f"--profile: there is no {source}; expected {CONFIG_SHAPE}") from None
        return Profile()
    except OSError:  # read_own_file says why
        pass
    try:
        document = parse_json(read_own_file(path, source))
    except ValueError:
        document = None
    profiles = document.get("profiles") if is_object(document, default=str, profiles=dict) else None
    if profiles is None or not all(is_object(entry, server=str, token=str) for entry in profiles.values()):
        raise CredentialsError(f"{source}: expected {CONFIG_SHAPE}")
    wanted = name or document.get("default")
    if not wanted:
        return Profile()
    if wanted not in profiles:
        flag, available = "--profile" if name else '"default"', escape(", ".join(sorted(profiles)))
        raise CredentialsError(f"{flag}: no profile{show_word(wanted)} in {source}; "
                               f"available: {available or 'none'}")
    entry, token = profiles[wanted], None
    if "token" in entry:
        token = parse_token(entry["token"].encode("utf-8"), f"token of a profile in {source}")
    return Profile(entry.get("server", ""), token)


def check_server(text: str, source: str, allow_http: bool) -> Server:
    """Parse a server's URL; UsageError names the source."""
    try:
        return parse_server(text, allow_http)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def read_token_file(path: str) -> Secret:
    """Read --token-file. What is neither a path nor a file may be the token itself."""
    is_path = path[:1] in "/.~-" or os.path.lexists(path)
    source = "--token-file " + escape(path) if is_path else "--token-file" + show_word(path)
    return parse_token(read_own_file(path, source), source)


def resolve_credentials(server_flag: Optional[str], profile_flag: Optional[str], token_file: Optional[str],
                        allow_http: bool, environ: Environ) -> Tuple[Server, Secret]:
    """Find server and bearer token, each in: its flag, --profile, the environment, the default profile.

    A token that stands in a profile goes to that profile's own server and to no other.
    """
    url = environ.get("PLEXSPHERE_URL")
    variable = environ.get("PLEXSPHERE_TOKEN", "")
    named = read_profile(profile_flag, environ) if profile_flag else Profile()
    is_complete = (server_flag or named.server or url) and (token_file or named.token or variable)
    default = Profile() if is_complete else read_profile("", environ)

    servers = (("--server", server_flag), ("server of the profile", named.server), ("PLEXSPHERE_URL", url),
               ("server of the default profile", default.server))
    source, text = next((row for row in servers if row[1]), ("", None))
    if not text:
        raise UsageError("no server: give --server, a profile, or PLEXSPHERE_URL")
    server = check_server(text, source, allow_http)

    if token_file:
        return server, read_token_file(token_file)
    if variable and not named.token:
        return server, parse_token(variable.encode("utf-8", "surrogateescape"), "PLEXSPHERE_TOKEN")
    profile = named if named.token else default
    if not profile.token:
        raise CredentialsError("no credentials: give --token-file, a profile, or PLEXSPHERE_TOKEN")
    if not profile.server or not check_server(
            profile.server, "server of the profile", allow_http).same_origin(server):
        raise CredentialsError(f"the token of a profile goes only to that profile's own server, and {source} "
                               "names another one; give --token-file for that")
    return server, profile.token


# --------------------------------------------------------------------------------- control plane
#
# A call of ControlPlane makes one Exchange per attempt. That runs urllib's opener in a thread:
# PlaneHandler opens a PlaneConnection, read_body reads what comes, and the calling thread waits
# until that is done or its time is up. Then the calling thread judges the answer.

ISSUE, GET, REVOKE = "IssueSession", "GetSession", "RevokeSession"
SUCCESS = range(200, 300)
EXPECTED = {ISSUE: {201}, GET: {200}, REVOKE: {*SUCCESS, 404, 409, 410}}  # a session that is gone is revoked
JITTER_SECONDS = 0.2
CANCEL_POLL_SECONDS = 0.1
PIECE_BYTES = 64 * 1024
FINDABLE_CHARACTERS = 8  # of a secret; a shorter one is in any text
PROXY_PATTERN = r"(?i:http)://(?:(?:[\w.~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?([^/@]+)/?"
PROXY_FORM = "http://[USER:PASSWORD@]HOST:PORT"


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


class SessionRequest(NamedTuple):
    """What an operator asks for (schema IssueSessionRequest, kind tcp)."""

    project_id: str
    resource_id: str
    host: str
    port: int
    ttl_seconds: int = 0  # 0: the server's default


class Exchange:
    """One request, and its answer: `status`, `headers`, `body`.

    It runs in a thread of its own, which `run` stops waiting for at the deadline: a time-out of
    urllib's is for each recv, and the look-up of a name has none. `sent`: the server may have the
    request.
    """

    def __init__(self, operation: str, peer: str) -> None:
        self.operation = operation
        self.peer = peer
        self.status = 0
        self.headers: Any = {}  # email.message.Message
        self.body = bytearray()
        self.sent = False
        self.is_given_up = False
        self.connection: Optional[PlaneConnection] = None
        self._error: Optional[TransportError] = None
        self._done = threading.Event()

    def run(self, opener: urllib.request.OpenerDirector, request: Any, seconds: float,
            is_needless: Callable[[], bool], tell: Callable[[], None]) -> None:
        """Get the answer within `seconds`, or raise TransportError; Cancelled once it `is_needless`.

        `tell` is called after SILENT_SECONDS without one.
        """
        request.exchange = self  # for PlaneHandler
        if not start_thread(self._perform, opener, request):
            self._perform(opener, request)  # no more threads: the limits are those of each recv, then
        deadline = elapsed_seconds() + seconds
        tell_on: Optional[float] = elapsed_seconds() + SILENT_SECONDS
        while not self._done.wait(max(0.0, min(CANCEL_POLL_SECONDS, deadline - elapsed_seconds()))):
            if is_needless():
                self._give_up()
                raise Cancelled(f"{self.operation}: given up, the run is ending")
            if elapsed_seconds() >= deadline:
                self._give_up()
                raise self._fail(f"timed out after {seconds:.3g} s")
            if tell_on and elapsed_seconds() >= tell_on:
                tell_on = None
                tell()
        if self._error is not None:
            raise self._error

    def _give_up(self) -> None:
        self.is_given_up = True
        if self.connection is not None:
            self.connection.wake()

    def _perform(self, opener: urllib.request.OpenerDirector, request: Any) -> None:
        fault = ""
        try:
            with opener.open(request, timeout=CONNECT_SECONDS) as response:
                self.status, self.headers = response.status, response.headers
                fault = read_body(response, self.body)
        except Exception as error:  # OSError, HTTPException, ValueError, RecursionError, MemoryError, ...
            fault = show_error(error)  # the error itself, its context too, would hold the request
        if fault and (self.status in SUCCESS or not self.status):
            self._error = self._fail(fault)
        elif fault:  # the status of an error counts by itself
            self.body.clear()
        self._done.set()

    def _fail(self, fault: str) -> TransportError:
        # no other attempt makes a certificate good, and three bad log-ins at a proxy lock an account
        passing = not fault.startswith(("certificate", "TLS failed", "the proxy refused: 407"))
        if re.search("issuer|self.signed", fault):
            fault += " (--ca-file names another CA)"
        tried = "no complete answer from" if self.sent else "cannot connect to"
        return TransportError(f"{self.operation}: {tried} {self.peer}: {fault}", passing=passing,
                              may_exist=self.sent and self.operation == ISSUE)


class PlaneConnection(http.client.HTTPConnection):
    """A connection of http.client's, with TLS where there is a `context`, that another thread can wake."""

    def __init__(self, host: str, exchange: Exchange, context: Optional[ssl.SSLContext] = None,
                 server_name: str = "", **options: Any) -> None:
        super().__init__(host, **options)
        self._exchange = exchange
        self._context = context
        self._server_name = server_name
        self._kept: Optional[socket.socket] = None
        exchange.connection = self

    def connect(self) -> None:
        """Connect, through a proxy if there is one; from then on the request counts as sent."""
        super().connect()
        if self._context is not None:
            # the handshake comes apart, so that it can be woken as well
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self._server_name,
                                                  do_handshake_on_connect=False)
            self.sock.do_handshake()
        self._kept = self.sock  # http.client forgets it once it has read the head
        self._exchange.sent = True
        if self._exchange.is_given_up:  # it was said that nothing was sent
            self.close()
            raise TimeoutError
        self.sock.settimeout(EXCHANGE_SECONDS)

    def wake(self) -> None:
        """Make the exchange's thread stop waiting, unless it is looking up a name or still connecting."""
        sock = self._kept or self.sock
        try:
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # not open any more
            pass


class PlaneHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs of one server with a PlaneConnection."""

    def __init__(self, context: Optional[ssl.SSLContext], server_name: str) -> None:
        super().__init__()
        self._context = context
        self._server_name = server_name

    def http_open(self, request: Any) -> Any:
        return self.do_open(PlaneConnection, request, exchange=request.exchange)  # type: ignore[arg-type]

    def https_open(self, request: Any) -> Any:
        return self.do_open(PlaneConnection, request, exchange=request.exchange,  # type: ignore[arg-type]
                            context=self._context, server_name=self._server_name)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def read_body(response: http.client.HTTPResponse, body: bytearray) -> str:
    """Read the body piece by piece into `body`; return what is wrong with it, "" if nothing is.

    read() would take a chunk of size -1 for no limit at all, and not notice an end that comes early.
    """
    length = response.length  # None: in chunks, or until the connection ends
    while len(body) != length and len(body) <= BODY_MAX_BYTES:
        piece = response.read1(PIECE_BYTES)
        if not piece:
            return "the answer was cut off" if length else ""
        body += piece
    return f"the answer is larger than {BODY_MAX_BYTES} bytes" if len(body) > BODY_MAX_BYTES else ""


def find_session_id(answer: Exchange) -> str:
    """Find the id of the session in a success, even if that is compressed or cut off; "" if there is none."""
    raw = bytes(answer.body) if answer.status in SUCCESS else b""
    if raw.startswith(b"\x1f\x8b"):  # gzip, which nobody asked for
        try:
            raw = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(raw, BODY_MAX_BYTES)
        except zlib.error:
            return ""
    text = raw.decode("utf-16" if raw.startswith(BYTE_ORDER_MARKS[1:]) else "utf-8", "replace")
    for name in ("session_id", "id"):  # of IssuedSession, and of the Session in it
        found = re.search(rf'"{name}"\s*:\s*"({UUID_PATTERN})"', text)
        if found:
            return found.group(1)
    return ""


def find_proxy(server: Server, environ: Environ) -> str:
    """Return the proxy's URL for an https server: HTTPS_PROXY unless NO_PROXY names the host; "" for none."""
    if server.scheme != "https":  # it would see the bearer token
        return ""
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY") or ""
    exempt = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if not proxy or urllib.request.proxy_bypass_environment(  # type: ignore[attr-defined]
            join_host_port(server.host, server.port), {"no": exempt}):
        return ""
    if "://" not in proxy and not proxy.lower().startswith("http:"):
        proxy = "http://" + proxy
    if not proxy.lower().startswith("http://"):  # urllib takes any other for plain CONNECT
        raise UsageError(f"HTTPS_PROXY: must be {PROXY_FORM}; other kinds of proxies are not supported "
                         "(NO_PROXY exempts servers)")
    found = re.fullmatch(PROXY_PATTERN, proxy, re.ASCII)
    try:
        address = found.group(1) if found else ""
        parse_endpoint(address if re.search(r":[0-9]*\Z", address) else address + ":80")
    except ValueError:
        raise UsageError(f"HTTPS_PROXY: must be {PROXY_FORM}; percent-encode special characters in the user "
                         "name and password (%40 for @)") from None
    return proxy


def create_tls_context(ca_file: Optional[str] = None) -> ssl.SSLContext:
    """Create a context that verifies certificates and host names, with TLS 1.2 at least."""
    ca_text = read_ca_file(ca_file) if ca_file else None
    try:
        context = ssl.create_default_context(cadata=ca_text)
    except (OSError, ValueError) as error:
        source = f"--ca-file {escape(ca_file)}: not a usable PEM bundle" if ca_file else (
            "TLS cannot be set up (see SSL_CERT_FILE and SSLKEYLOGFILE)")
        raise UsageError(f"{source}: {show_error(error)}") from error
    if hasattr(ssl, "TLSVersion"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def create_opener(server: Server, ca_file: Optional[str], proxy: str) -> urllib.request.OpenerDirector:
    """Create a urllib opener for one server that follows no redirect and raises for no status.

    urllib's default one carries the bearer token to wherever a redirect points and to the proxy of
    plain http, and opens file: URLs. This one has just the handlers that it is given.
    """
    # --ca-file is judged for http as well, where nothing is done with it
    context = create_tls_context(ca_file) if ca_file or server.scheme == "https" else None
    opener = urllib.request.OpenerDirector()
    opener.addheaders = [("User-Agent", "plexctl/" + __version__)]
    opener.add_handler(PlaneHandler(context, server.host))
    if proxy:
        opener.add_handler(urllib.request.ProxyHandler({"https": proxy}))
    return opener


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


def may_pass(operation: str, status: int, code: str, has_retry_after: bool) -> bool:
    """Tell whether the same request may well succeed a little later."""
    if operation == REVOKE:
        return status == 429 or status >= 500
    if status == 409:  # the first request with this idempotency key is still being answered
        return code == "idempotent_replay"
    if status == 429:  # a rate limit; without Retry-After it is the limit of sessions
        return has_retry_after
    return status in (502, 503, 504)


def random_uuid() -> str:
    """Create a version 4 UUID (RFC 9562, section 5.4); importing uuid takes 20 ms on 3.6."""
    digits = os.urandom(16).hex()
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], "8" + digits[17:20], digits[20:]))


class Fields:
    """The fields of one JSON object of an answer, each checked as it is taken."""

    def __init__(self, operation: str, document: Any) -> None:
        self._operation = operation
        self._document = document if isinstance(document, dict) else {}

    def get(self, name: str) -> Any:
        """Return a field as it is, None if it is missing."""
        return self._document.get(name)

    def take(self, name: str, parse: Callable[[Any], Any], kind: type = str) -> Any:
        """Return a required field of this kind as parsed by `parse`, which raises ValueError."""
        value, fault = self.get(name), "is missing, or of another type"
        if isinstance(value, kind):
            try:
                return parse(value)
            except ValueError as error:  # what it must be, not what it is
                fault = str(error)
        raise TransportError(f"{self._operation}: the answer's {name} {fault}")

    def take_optional(self, name: str, parse: Callable[[str], Any]) -> Any:
        """Do the same, or return None if the field is missing or null."""
        return None if self.get(name) is None else self.take(name, parse)


class ControlPlane:
    """IssueSession, GetSession and RevokeSession of one server.

    Safe to use from several threads. Every call ends within its limit and raises PlexctlError:
    UsageError for what was given here, TransportError for no or a malformed answer, ApiError for
    an error answer. `cancel` (threading.Event) ends pauses and further attempts, and gives up a
    GetSession at once (Cancelled), but not the others, whose outcome matters. `report` takes a line
    per exchange: method, path, status, seconds; never a header or a body. `notice` takes a line for
    whoever waits when the server is silent.
    """

    def __init__(self, server: Server, token: Secret, ca_file: Optional[str] = None,
                 environ: Optional[Environ] = None, cancel: Optional[threading.Event] = None,
                 report: Report = lambda line: None, notice: Report = lambda line: None) -> None:
        self.server = server
        self.cancel = cancel or threading.Event()
        self._token = parse_token(token.reveal().encode("utf-8", "surrogateescape"), "bearer token")
        self._token_source = token.source
        self._session_tokens: Dict[str, Secret] = {}  # by session_id, until it is revoked
        self._report = report
        self._notice = notice
        self._is_silent = False  # and that was said
        proxy = find_proxy(server, os.environ if environ is None else environ)
        self._peer = str(server) + (" through HTTPS_PROXY" if proxy else "")
        self._opener = create_opener(server, ca_file, proxy)

    def issue(self, request: SessionRequest,
              on_issued: Callable[[str], None] = lambda session_id: None) -> IssuedSession:
        """Issue a session, with the same idempotency key in each of at most ISSUE_ATTEMPTS attempts.

        `on_issued(session_id)` is called as soon as an id can be read, even from an answer that is
        malformed or no 201, and before it is judged: the caller can revoke the session whatever follows.
        """
        path = f"/v1/projects/{request.project_id}/sessions"
        body: Dict[str, Any] = {
            "resource_id": request.resource_id, "kind": "tcp",
            "target": {"tcp": {"host": request.host, "port": request.port}},
            "idempotency_key": random_uuid()}
        if request.ttl_seconds:
            body["requested_ttl_seconds"] = request.ttl_seconds
        asked_on = elapsed_seconds()
        answer, fields, session_id = self._ask_until_issued(path, body, on_issued)
        token = fields.take("token", matching("[!-~]{1,65536}", "printable ASCII", Secret))
        self._session_tokens[session_id] = token
        expires = fields.take("expires_at", parse_time)
        session = self._parse_session(Fields(ISSUE, fields.take("session", dict, kind=dict)), session_id)
        issued_at = session.issued_at or parse_http_date(answer.headers.get("Date")) or time.time()
        endpoint = fields.take_optional("listener_endpoint", self._parse_endpoint)
        return IssuedSession(session_id, token, fields.get("expires_at"), expires - issued_at, asked_on,
                             session, endpoint or session.listener_endpoint)

    def get(self, project_id: str, session_id: str, seconds: float = EXCHANGE_SECONDS) -> Session:
        """Return the session as the control plane sees it now."""
        path = f"/v1/projects/{project_id}/sessions/{session_id}"
        answer = self._exchange(Exchange(GET, self._peer), path, None, seconds)
        return self._parse_session(self._parse_body(answer), session_id)

    def revoke(self, project_id: str, session_id: str, seconds: float = EXCHANGE_SECONDS) -> None:
        """Revoke the session. One that is gone already (404, 409, 410) counts as revoked."""
        path = f"/v1/projects/{project_id}/sessions/{session_id}/revoke"
        self._exchange(Exchange(REVOKE, self._peer), path, {"revoke_reason": "operator_request"}, seconds)
        self._session_tokens.pop(session_id, None)

    def _ask_until_issued(self, path: str, body: Dict[str, Any],
                          on_issued: Callable[[str], None]) -> Tuple[Exchange, Fields, str]:
        """Try until there is an answer of 201; return it, its fields and the session's id."""
        owed: Set[str] = set()

        def owe(session_id: str) -> None:
            if session_id and session_id.lower() not in owed:
                owed.add(session_id.lower())
                on_issued(session_id)

        may_exist = False
        for attempt in range(1, ISSUE_ATTEMPTS + 1):
            answer = Exchange(ISSUE, self._peer)
            try:
                try:
                    self._exchange(answer, path, body)
                finally:  # an answer that is cut off, or no 201, may name a session as well
                    owe(find_session_id(answer))
                may_exist = True  # and nobody can revoke it if its id cannot be read
                fields = self._parse_body(answer)
                session_id = fields.take("session_id", parse_session_id)
                owe(session_id)
                return answer, fields, session_id
            except (TransportError, ApiError) as failure:
                error: PlexctlError = failure
            may_exist = may_exist or error.may_exist
            if not error.passing or attempt == ISSUE_ATTEMPTS or self.cancel.is_set():
                break
            wait = getattr(error, "retry_after_seconds", None)
            if wait is None:
                wait = attempt * POLL_MIN_SECONDS + JITTER_SECONDS * (os.urandom(1)[0] / 255 - 0.5)
            self._report(f"{error}; trying again in {wait:.1f} s")
            if self.cancel.wait(wait):
                break
        error.may_exist = may_exist and not owed
        error.args = (str(error) + (f" (after {attempt} attempts)" if attempt > 1 else "") + (
            "; a session may exist all the same, it will expire on its own" if error.may_exist else ""),)
        raise error

    def _exchange(self, answer: Exchange, path: str, body: Optional[Dict[str, Any]],
                  seconds: float = EXCHANGE_SECONDS) -> Exchange:
        """Carry out the exchange; ApiError for an unexpected status."""
        operation = answer.operation
        request = urllib.request.Request(str(self.server) + path, headers={
            "Accept": "application/json, application/problem+json"})
        request.add_unredirected_header("Authorization", "Bearer " + self._token.reveal())
        if body is not None:  # and then it is a POST
            request.data = json.dumps(body).encode("ascii")
            request.add_header("Content-Type", "application/json")

        def tell() -> None:
            if operation == ISSUE or not self._is_silent:  # once, where a running proxy asks again and again
                self._is_silent = True
                self._notice(f"still waiting for {self._peer} to answer {operation}")

        began = elapsed_seconds()
        answer.run(self._opener, request, seconds, lambda: operation == GET and self.cancel.is_set(), tell)
        self._is_silent = False
        self._report(f"{request.get_method()} {path}: {answer.status}, {elapsed_seconds() - began:.3f} s")
        if answer.status not in EXPECTED[operation]:
            raise self._parse_problem(answer)
        return answer

    def _parse_problem(self, answer: Exchange) -> ApiError:
        """Make the error of an unexpected status, with its problem details (RFC 9457) if it has any."""
        try:
            problem = self._parse_body(answer)
        except TransportError:
            problem = Fields(answer.operation, None)
        status, code = answer.status, self._show(problem.get("code"))
        title = self._show(problem.get("title")) or http.client.responses.get(status, "")
        words = answer.operation, f"{status} {title}".strip(), self._show(problem.get("detail"))
        text = ": ".join(filter(None, words)) + (f" ({code})" if code else "")
        for name in ("reason", "relation_path", "correlation_id"):
            shown = self._show(problem.get(name))
            if shown:
                text += f"; {name.replace('_', ' ')} {shown}"
        retry_after = parse_retry_after(answer.headers.get("Retry-After"))
        passing = may_pass(answer.operation, status, code, retry_after is not None)
        # a gateway that lost the answer, the first request, no error at all; 429 and 503 did nothing
        may_exist = answer.operation == ISSUE and (status < 300 or passing and status in (409, 502, 504))
        forbidden = EXIT_REBAC_DENIED if code == "rebac_denied" else EXIT_FORBIDDEN
        return ApiError(text + self._advise(answer, code, retry_after is not None), passing=passing,
                        may_exist=may_exist, status=status, code=code, retry_after_seconds=retry_after,
                        exit_code={401: EXIT_CREDENTIALS, 403: forbidden}.get(status, EXIT_FAILURE))

    def _advise(self, answer: Exchange, code: str, is_rate_limit: bool) -> str:
        """Say what an operator can do about an error answer."""
        if answer.status == 429:
            return "; too many requests, try again later" if is_rate_limit else (
                "; sessions count until they expire or are revoked, also those of print mode; "
                "--max-sessions limits those of a proxy")
        if 300 <= answer.status < 400:
            location = self._show(answer.headers.get("Location"))
            return "; a redirect is never followed" + (f": {location}" if location else "")
        if answer.status in (404, 405, 501):
            return "; check --project-id, --resource-id and --server"
        if answer.status < 300:
            return "; the API does not answer like this, check --server"
        advice = ""
        if answer.status in (401, 403) and self._token_source:
            advice = "; the token is from " + self._token_source
        if answer.status == 401 and code == "step_up_required":
            challenge = " ".join(answer.headers.get_all("WWW-Authenticate", []))
            found = re.search(r'acr_values\s*=\s*("[^"]+"|[^\s",]+)', challenge)
            acr = self._show(found.group(1).strip('"')) if found else ""
            advice += "; re-authenticate" + (f" with acr_values {acr}" if acr else "") + " and try again"
        return advice

    def _parse_body(self, answer: Exchange) -> Fields:
        try:
            return Fields(answer.operation, parse_json(bytes(answer.body)))
        except ValueError:
            kinds = [f"{name} {self._show(answer.headers[name])}"
                     for name in ("Content-Type", "Content-Encoding") if name in answer.headers]
            raise TransportError(f"{answer.operation}: the answer is not the API's JSON "
                                 f"({', '.join(kinds) or 'no Content-Type'}); check --server") from None

    def _parse_endpoint(self, text: str) -> Endpoint:
        if self._conceal(text) != text:
            raise ValueError("contains a token")
        endpoint = parse_endpoint(text)
        if not is_dialable(endpoint.host, is_loopback(self.server.host)):
            raise ValueError(f"{endpoint} is refused: on this machine, link-local or multicast")
        return endpoint

    def _parse_session(self, fields: Fields, session_id: str) -> Session:
        fields.take("id", lambda text: one_of(session_id.lower())(text.lower()))
        fields.take("kind", one_of("tcp"))
        return Session(session_id, fields.take("status", one_of("active", "revoked", "expired")),
                       fields.take_optional("issued_at", parse_time) or 0.0,
                       fields.take_optional("listener_endpoint", self._parse_endpoint),
                       self._show(fields.get("revoke_reason")))

    def _conceal(self, text: str) -> str:
        """Remove the tokens from a text: a server may repeat what it was sent, in upper or lower case."""
        for secret in [self._token, *self._session_tokens.values()]:
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


def make_private_directory(path: str) -> None:
    """Make it, and what is missing above it, 0700; from 3.7 on os.makedirs does so with the last one only."""
    if os.path.isdir(path):
        return
    make_private_directory(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # a umask may have taken our own bits
    except FileExistsError:  # another plexctl was faster; if it is no directory, the next call says so
        pass


def send_to_syslog(message: str) -> None:
    """Send one line to the host's syslog, if it has one (RFC 3164, without a host name); OSError."""
    for path in SYSLOG_SOCKETS:
        if os.path.exists(path):
            month_to_second = time.ctime()[4:19]  # strftime would take the locale's names
            line = f"<{SYSLOG_AUTHPRIV_INFO}>{month_to_second} plexctl[{os.getpid()}]: {message}"
            send_record(path, line.encode("ascii"), SYSLOG_SECONDS)
            return


def find_user(environ: Environ) -> Tuple[str, Optional[int]]:
    """Return the name and the uid of whoever runs this."""
    if os.name != "posix":
        return environ.get("USERNAME", ""), None
    try:
        return pwd.getpwuid(os.getuid()).pw_name, os.getuid()
    except KeyError:
        return str(os.getuid()), os.getuid()


class AuditLog(logging.Handler):
    """The record of --reveal-secrets; it fails closed.

    The file is opened before a session is issued, and `record` returns only when the whole line
    was written and synced. Syslog gets a copy where the host has it.
    """

    def __init__(self, environ: Environ, report: Report) -> None:
        super().__init__()
        self._environ = environ
        self._report = report
        self._descriptor = -1
        self._has_written = False
        given = environ.get("PLEXCTL_AUDIT_LOG", "")
        path = given or find_own_file("XDG_STATE_HOME", ".local/state", "audit.log", environ)
        if not path:
            raise PlexctlError("audit log: no home directory for it (PLEXCTL_AUDIT_LOG names a file)")
        self._source = "audit log " + escape(path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | OPEN_AT_ONCE
        try:
            if not given:
                make_private_directory(os.path.dirname(path))
            self._descriptor = os.open(path, flags, 0o600)
            status = os.fstat(self._descriptor)
            fault = find_file_fault(status, WRITE_BITS)
            if not stat.S_ISREG(status.st_mode):  # a device might keep nothing
                fault = "must be a regular file"
        except (OSError, ValueError) as error:
            fault = "cannot be opened: " + show_error(error)
        if fault:
            self.close()
            raise PlexctlError(f"{self._source}: {fault} (PLEXCTL_AUDIT_LOG names another)")

    def close(self) -> None:
        """Close the file and ignore errors: what counts was synced."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.closerange(descriptor, descriptor + 1)
        super().close()

    def record(self, server: Server, request: SessionRequest, issued: IssuedSession) -> None:
        """Write one JSON object in one line with one write; raise unless it is verifiably there."""
        user, uid = find_user(self._environ)
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
        logger.addHandler(self)
        self._has_written, fault = False, "logging dropped it"  # logging.disable, a level, a filter
        try:
            logger.info("%s", message)
        except OSError as error:
            fault = show_error(error)
        finally:
            logger.removeHandler(self)
        if not self._has_written:
            raise PlexctlError(f"{self._source}: the record was not written: {fault}; the token is not shown")
        try:
            send_to_syslog(message)
        except OSError as error:
            self._report("warning: syslog did not take the audit record, the file has it: "
                         + show_error(error))

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line to the file and sync it; OSError unless all its bytes are there."""
        line = (record.getMessage() + "\n").encode("ascii")
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        os.lseek(self._descriptor, max(0, size - 1), os.SEEK_SET)
        if size and os.read(self._descriptor, 1) != b"\n":
            line = b"\n" + line  # behind what a full disk cut short
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "short write")
        os.fsync(self._descriptor)
        if not os.fstat(self._descriptor).st_nlink:
            raise OSError(errno.ENOENT, "the file was removed")
        self._has_written = True


# ----------------------------------------------------------------------------------------- relay

FIRST_BUFFER_BYTES = 64 * 1024
LARGEST_BUFFER_BYTES = 768 * 1024
TICK_SECONDS = 1  # after which whatever waits looks around
QUIET_SECONDS = 2.0  # of the target, before a client's end of input is passed on
FIRST_ASK_SECONDS = 0.05  # whether a client that has ended its input is gone; then ever less often
LAST_ASK_SECONDS = 0.4
DRAIN_SECONDS = 0.05  # for the Node's end, before the worker goes on without its partner
STREAM_TICK_SECONDS = 0.2  # of standard input and output, which have no time limit of their own
LINGER_SECONDS = 10  # for the Node's answer to the end of a client that is gone
STRUCT_LINGER = "ii" if os.name == "posix" else "HH"
SILENCE = BlockingIOError if os.name == "posix" else TimeoutError  # of a call that has waited for a tick
SO_RCVTIMEO_64 = 66  # of systems of 32 bits with times of 64 bits: their timeval has two of these
LEG_OPTIONS: "List[Tuple[int, int, Any]]" = []  # filled at the first use, which loads socket


def set_leg_options(sock: "socket.socket", is_tcp: bool = True) -> None:
    """What both legs of a connection have; on Linux a listener hands it on to what it accepts.

    TCP_NODELAY (a request in two writes costs 44 ms without it), keepalive that notices in two
    minutes, urgent data in the stream, and close() sends a reset unless it was called in order:
    not even SIGKILL may let a stream that was cut off look complete. A call that blocks comes back
    after TICK_SECONDS, with SILENCE or a part of its work.
    """
    if not LEG_OPTIONS:
        tick = struct.pack("qq" if socket.SO_RCVTIMEO == SO_RCVTIMEO_64 else "ll", TICK_SECONDS, 0)
        if os.name != "posix":
            tick = struct.pack("L", TICK_SECONDS * 1000)
        LEG_OPTIONS[:] = [(level, getattr(socket, name), value) for level, name, value in (
            (socket.IPPROTO_TCP, "TCP_NODELAY", 1), (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60),
            (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15), (socket.IPPROTO_TCP, "TCP_KEEPCNT", 4),
            (socket.SOL_SOCKET, "SO_KEEPALIVE", 1), (socket.SOL_SOCKET, "SO_OOBINLINE", 1),
            (socket.SOL_SOCKET, "SO_LINGER", struct.pack(STRUCT_LINGER, 1, 0)),
            (socket.SOL_SOCKET, "SO_RCVTIMEO", tick), (socket.SOL_SOCKET, "SO_SNDTIMEO", tick))
            if hasattr(socket, name)]
    for level, option, value in LEG_OPTIONS:
        if is_tcp or level == socket.SOL_SOCKET:
            sock.setsockopt(level, option, value)


def has_hung_up(sock: "socket.socket") -> bool:
    """Whether the other end is lost; of a unix socket: closed. False where poll() is missing."""
    fd = sock.fileno()
    return fd < 0 or ON_LINUX and wait_for(fd, 0, 0)


def close_leg(sock: "socket.socket", reset: bool) -> None:
    """Closes it with a reset for the peer, which it is set to, or in order."""
    try:
        if not reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(STRUCT_LINGER, 0, 0))
        sock.close()
    except OSError:  # closed all the same
        sock.close()


def is_connected(sock: "socket.socket") -> bool:
    """False after a reset whose error somebody has read, and after the ends of both directions."""
    try:
        sock.getpeername()
        return True
    except OSError:
        return False


class Partner:
    """A thread that runs one function after another, and the buffer that it reads into.

    A buffer belongs to a thread: one that is still in a recv must not fill another connection's.
    """

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        self.is_free = threading.Event()
        self.is_free.set()
        self._works: "Any" = getattr(queue, "SimpleQueue", queue.Queue)()  # 3.6 has the other one
        if not start_thread(self._run):
            raise PlexctlError("cannot start a thread for a connection (ulimit -u)")

    def do(self, work: "Optional[Callable[[], None]]") -> None:
        """Runs it after what it was given before; None is the end."""
        self.is_free.clear()
        self._works.put(work)

    def _run(self) -> None:
        for work in iter(self._works.get, None):
            work()
            self.is_free.set()


class Flow:
    """One direction of a connection: what `source` sends goes to `sink`."""

    def __init__(self, source: "socket.socket", sink: "socket.socket", buffer: memoryview) -> None:
        self.source = source
        self.sink = sink
        self.buffer = self.first_buffer = buffer
        self.moved = 0  # bytes
        self.in_hand = 0  # bytes that were read, and are not all sent yet
        self.is_running = True  # False: it is to end
        self.is_over = False  # the end of input was passed on
        self.fault = 0  # the error number of a reset by the source, which can be asked for once
        self._quiet_since = 0.0
        self._moved_then = 0

    def is_quiet(self) -> bool:
        """Whether nothing was read for QUIET_SECONDS, counted from the first question."""
        now = elapsed_seconds()
        if not self._quiet_since or self.in_hand or self.moved != self._moved_then:
            self._quiet_since, self._moved_then = now, self.moved
        return now - self._quiet_since >= QUIET_SECONDS

    def grow(self) -> memoryview:
        """A larger buffer for a source that fills this one; given back at once, unlike a bytearray."""
        if len(self.buffer) < LARGEST_BUFFER_BYTES:
            try:
                self.buffer = memoryview(mmap.mmap(-1, min(2 * len(self.buffer), LARGEST_BUFFER_BYTES)))
            except (OSError, ValueError):  # no memory: it will do
                pass
        return self.buffer


class Relay:
    """Carries one connection, its two legs: a direction in the thread of `carry`, the other in its partner.

    The last of them closes both sockets. Where the client is gone `carry` returns, and the partner reads
    what still comes, so that nothing is reset. `is_gone` tells whether a client that has ended its
    input listens no more (False where nobody can know); `on_remote_end` hears that the remote has ended
    first. Afterwards: what `up` and `down` have moved, and the `error` that broke it, if any.
    """

    def __init__(self, client: "socket.socket", remote: "socket.socket", buffer: memoryview,
                 partner: Partner, is_gone: "Callable[[], bool]",
                 on_remote_end: "Callable[[], object]") -> None:
        self.up = Flow(client, remote, buffer)
        self.down = Flow(remote, client, partner.buffer)
        self.error: "Optional[Exception]" = None  # one peer is lost: the other gets a reset, not an end
        self.remote_ended_first = False
        self.client_is_gone = False  # what it sent may still be on its way
        self.is_closed = False
        self._partner = partner
        self._is_gone = is_gone
        self._on_remote_end = on_remote_end
        self._lock = threading.Lock()
        self._threads = 2

    def carry(self) -> None:
        """Returns once both directions are over, or the client is gone and what it sent is handed on.

        Raises nothing: whatever fails ends this connection alone.
        """
        self._partner.do(self._carry_down)
        try:
            if self._copy(self.up):
                self._hold_end()
        except Exception as error:
            self._break(error)
        self._leave()
        # what has come is still delivered, and counted; for a client that is gone nobody waits for more
        while not self._partner.is_free.wait(DRAIN_SECONDS):
            if self.client_is_gone and not self.down.in_hand:
                break

    def stop(self) -> None:
        """Ends both directions, with a reset where they are not over; from any thread."""
        with self._lock:  # or a descriptor might be another socket's by now
            self.up.is_running = self.down.is_running = False
            for sock in () if self.is_closed else (self.up.source, self.up.sink):
                try:
                    sock.shutdown(socket.SHUT_RD)  # wakes who reads, and tells the peer nothing
                except OSError:
                    pass

    def _carry_down(self) -> None:
        try:
            if self._copy(self.down):
                self._note_remote_end()
                self._pass_on(self.down)
            if self.client_is_gone:
                self._drain()
        except Exception as error:
            self._note_remote_end()
            self._break(error)
        self._leave()

    def _copy(self, flow: Flow) -> bool:
        """Whether the source has ended its input; else the sink is lost, or it was told to end."""
        receive, send, buffer = flow.source.recv_into, flow.sink.send, flow.buffer
        while flow.is_running:
            try:
                count = flow.in_hand = receive(buffer)
            except SILENCE:
                rest = buffer = flow.buffer = flow.first_buffer  # nobody holds a larger one any more
                # the Node has ended, and so serves another one; a client may keep its end open for ever
                if flow is self.up and self.down.is_over and flow.is_quiet():
                    self.stop()
                continue
            if not count:
                self._check(flow)
                return flow.is_running and self.error is None
            rest = buffer[:count]
            while rest and flow.is_running:
                try:
                    sent = send(rest)
                    flow.moved += sent
                    rest = rest[sent:]
                except SILENCE:
                    self._check(flow)
                except OSError as error:
                    self._lose_sink(flow, error)
            flow.in_hand = 0
            if count == len(buffer):
                buffer = flow.grow()
        return False

    def _check(self, flow: Flow) -> None:
        """Raises ConnectionResetError where the source is lost."""
        other = self.down if flow is self.up else self.up
        # not connected is also a socket that both have ended: `is_over` is set before, so it is asked last
        if not is_connected(flow.source) and not other.is_over:
            flow.fault = flow.fault or flow.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if flow.fault != errno.EPIPE:  # Linux's name for a reset behind the end of input: nothing is lost
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def _hold_end(self) -> None:
        """The Node ends both directions at a client's end of input, and so would cut the answer off.

        It is passed on once the target has been quiet, or has ended, or nobody waits for its answer.
        """
        client, pause = self.up.source, FIRST_ASK_SECONDS
        while self.up.is_running and not self._partner.is_free.is_set():
            # has_hung_up: a reset, where nobody can ask; a client that both have ended looks like that, too
            if (self._is_gone() or has_hung_up(client)) and not self.down.is_over:
                error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                self.client_is_gone = True
                self.down.is_running = False
                break
            if not self.up.is_over and self.down.is_quiet():
                self._pass_on(self.up)
            self._partner.is_free.wait(pause)
            pause = min(2 * pause, LAST_ASK_SECONDS)
        if self.up.is_running and not self.up.is_over:
            self._pass_on(self.up)

    def _drain(self) -> None:
        """close() would answer what is still to come with a reset, which can overtake what was sent."""
        deadline, remote = elapsed_seconds() + LINGER_SECONDS, self.down.source
        while elapsed_seconds() < deadline and self.up.is_running:
            try:
                if not remote.recv(FIRST_BUFFER_BYTES):
                    return
            except SILENCE:
                pass

    def _pass_on(self, flow: Flow) -> None:
        """The half-close of TCP."""
        flow.is_over = True
        try:
            if self.error is None:
                flow.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._lose_sink(flow, error)

    def _lose_sink(self, flow: Flow, error: OSError) -> None:
        """The sink's peer is gone. What it sent before is still read and delivered by the other flow."""
        flow.is_running = False
        if flow is self.up:
            self._note_remote_end()
        if not self.client_is_gone:
            self.error = self.error or error
        if error.errno in EXHAUSTED:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Ends both directions now: a truncated stream must not look like a complete one."""
        self.error = self.error or error
        self.stop()

    def _note_remote_end(self) -> None:
        if not (self.up.is_over or self.remote_ended_first or self.error):
            self.remote_ended_first = True
            self._on_remote_end()

    def _leave(self) -> None:
        """The last act of each thread; the second of them closes the sockets."""
        with self._lock:
            self._threads -= 1
            if self._threads:
                return
            self.is_closed = True
        is_broken = self.error is not None
        # what is complete may be on its way yet; a client that is gone minds nothing
        close_leg(self.up.source, is_broken or not self.down.is_over or self.client_is_gone)
        close_leg(self.up.sink, is_broken or not self.up.is_over)


class StandardStreams:
    """Descriptors 0 and 1 as a client's socket, as far as a Relay uses one; they may be terminals or files.

    Their file status flags are left alone, since they may be somebody's terminal. `error` says why
    standard output has not had everything (PlexctlError).
    """

    def __init__(self) -> None:
        self.error: "Optional[PlexctlError]" = None
        self._is_closed = False
        # it is_connected, always; has_hung_up asks descriptor 1
        self.setblocking = self.setsockopt = self.getsockopt = self.getpeername = lambda *arguments: 0
        self.recv = lambda size, flags: b""  # a look at what a client that is gone has sent

    def fileno(self) -> int:
        """The one that tells whether anybody listens."""
        return 1

    def recv_into(self, buffer: memoryview) -> int:
        """Standard input, until an answer could not be written."""
        if self.error is not None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if os.name == "posix" and not wait_for(0, READABLE, STREAM_TICK_SECONDS):
            raise SILENCE
        try:
            piece = os.read(0, len(buffer))
        except OSError as error:
            if error.errno == errno.EISDIR or not isinstance(error, SILENCE) and os.isatty(0):
                return 0  # it was closed at the start, or the terminal is gone
            raise
        buffer[:len(piece)] = piece
        return len(piece)

    def send(self, piece: memoryview) -> int:
        """Standard output."""
        try:
            if os.name == "posix" and not wait_for(1, WRITABLE, STREAM_TICK_SECONDS):
                raise SILENCE
            return os.write(1, piece)
        except SILENCE:
            raise
        except OSError as error:
            self._fail(error)
            raise

    def shutdown(self, how: int) -> None:
        """The reader sees the end."""
        if how == socket.SHUT_WR and not self._is_closed:
            try:
                if stat.S_ISSOCK(os.fstat(1).st_mode):  # of inetd or socat, which is descriptor 0 as well
                    with socket.fromfd(1, socket.AF_INET, socket.SOCK_STREAM) as sock:
                        sock.shutdown(how)
            except OSError:  # the peer has gone
                pass
            self.close()

    def close(self) -> None:
        """The same; the number stays taken."""
        if not self._is_closed:
            self._is_closed = True
            try:
                nowhere = open_nowhere(os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.close(nowhere)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.error = PlexctlError("cannot write to standard output: %s" % show_error(error))


# --------------------------------------------------------------------------------------- workers

GRACE_SECONDS = 0.3  # a connection waits so long for a session to become idle, before one is issued for it
POLL_SECONDS = 0.1  # between two looks at who waits
IDLE_SECONDS = 60  # after which a session above the minimum is given back
ASK_SECONDS = 2  # between two questions about one session
ASK_LIMIT_SECONDS = 5  # for an answer, which a connection may wait for
RECHECK_SECONDS = 60  # the reconcile period of a Node
GONE_SECONDS = 30  # of refused dials, until a listener counts as gone
REPLACE_SECONDS = 60  # between two replacements of sessions that never carried a connection
RETRY_SECONDS = 5  # until a further session is asked for again
UNREACHABLE_SECONDS = 10  # a Node that ends a connection within this, without a byte, had no target
CONNECTING = (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK)


class SessionRevoked(SessionOver):
    """It was taken away, or is not there any more: never replaced by another one."""


class EndpointMissing(PlexctlError):
    """The Node reported no listener in time."""


class ConnectionFailed(PlexctlError):
    """One connection broke after it had been dialled."""


def dial(route: "Tuple[int, Any]", is_needless: "Callable[[], bool]") -> "socket.socket":
    """A TCP socket connected to (family, address); OSError in time, or once it `is_needless`."""
    family, address = route
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(True)
        set_leg_options(sock)
        error, deadline = errno.EINPROGRESS, elapsed_seconds() + CONNECT_SECONDS
        while error in CONNECTING and elapsed_seconds() < deadline and not is_needless():
            error = sock.connect_ex(address)  # comes back once in TICK_SECONDS
        if error not in (0, errno.EISCONN):
            raise OSError(error, os.strerror(errno.ETIMEDOUT if error in CONNECTING else error))
        return sock
    except BaseException:
        sock.close()
        raise


class Connection:
    """One client, from its accept to its end.

    `is_gone()` tells whether it listens no more (False where nobody can know); `on_end(connection,
    error)` is called once, with a PlexctlError where it failed. `wants_reason`: that error is to say
    as well why the session is over.
    """

    def __init__(self, sock: "Any", on_end: "Callable[..., object]",
                 is_gone: "Callable[[], bool]" = lambda: False, address: "Any" = None,
                 wants_reason: bool = False) -> None:
        sock.setblocking(True)  # whatever socket.setdefaulttimeout() was told
        if not (ON_LINUX and isinstance(address, tuple)):  # or it has what the listener has
            set_leg_options(sock, isinstance(address, tuple))
        self.sock = sock
        self.is_gone = is_gone
        self.address = address
        self.wants_reason = wants_reason
        self.began = elapsed_seconds()
        self.relay: "Optional[Relay]" = None
        self._on_end = on_end

    def __str__(self) -> str:
        return join_host_port(*self.address[:2]) if isinstance(self.address, tuple) else "a local process"

    def has_left(self) -> bool:
        """Whether a client that waits has reset its connection, or closed it without a byte."""
        try:
            return not is_connected(self.sock) or (  # behind a reset what came before can still be read
                wait_for(self.sock.fileno(), READABLE, 0)
                and not self.sock.recv(1, socket.MSG_PEEK) and self.is_gone())
        except OSError as error:
            return error.errno not in EXHAUSTED

    def end(self, error: "Optional[PlexctlError]" = None) -> None:
        """It is over; a client that was not served gets a reset."""
        if self.relay is None:
            close_leg(self.sock, reset=True)
        on_end, self._on_end = self._on_end, lambda connection, error: None
        on_end(self, error)


class Counts(Record):
    """Totals: connections `open`, `waiting` and `ended`; live `sessions`; bytes `up` and `down`."""

    open: int = 0
    waiting: int = 0
    ended: int = 0
    sessions: int = 0
    up: int = 0
    down: int = 0


class Worker:
    """One session, from its issue to its revocation, in a thread of its own (`run`).

    It does what the Node's listener does: one connection after another, never two at once. `issued`
    and `endpoint` are known once it `is_ready`; `why` is what has ended it.
    """

    def __init__(self, sessions: "Sessions") -> None:
        self.session_id = ""  # until it is issued
        self.issued: "Optional[IssuedSession]" = None
        self.endpoint: "Optional[Endpoint]" = None
        self.expires_on = float("inf")
        self.why: "Optional[PlexctlError]" = None
        self.is_ready = False
        self.is_ending = False
        self.has_carried = False
        self.connection: "Optional[Connection]" = None
        self.turn = threading.Condition(sessions.lock)
        self._sessions = sessions
        self._partner: "Any" = None
        self._buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        self._route: "Any" = None  # family and address of the endpoint
        self._refused_since = 0.0
        self._asking = threading.Lock()
        self._asked_on = 0.0
        self._has_answer = False
        self._recheck_on = elapsed_seconds() + RECHECK_SECONDS

    def run(self) -> None:
        sessions = self._sessions
        try:
            self._partner = Partner()
            self._move(self._issue())
            sessions.add_ready(self)
            connection = sessions.take(self)
            while connection is not None:
                self._serve(connection)
                connection = sessions.take(self)
        except PlexctlError as error:
            self.why = error
        except Exception as error:  # no memory or descriptors, or a defect
            self.why = PlexctlError("a session was given up after %s" % show_error(error))
        finally:
            sessions.dismiss(self)
            if self._partner is not None:
                self._partner.do(None)

    def check_over(self) -> bool:
        """Whether it carries no more; to be asked often, since it looks after itself meanwhile."""
        now = elapsed_seconds()
        if self.why is None and now >= self.expires_on:
            self.why = SessionOver("the session expired")
        if self.why is None and now >= self._recheck_on:
            self.ask_in_thread()
        return self.why is not None or self._sessions.is_stopped

    def _issue(self) -> Endpoint:
        """Issues the session and waits until its Node has reported the listener."""
        sessions = self._sessions
        issued = self.issued = sessions.plane.issue(
            sessions.next_request(), lambda session_id: sessions.owe(self, session_id))
        self.expires_on = issued.issued_on + issued.lifetime_seconds
        if issued.session.status != "active" or issued.lifetime_seconds <= 0:
            raise SessionOver("the session was over when it arrived")
        return issued.listener_endpoint or self._await_endpoint()

    def _await_endpoint(self) -> Endpoint:
        sessions, pause = self._sessions, POLL_MIN_SECONDS
        deadline = elapsed_seconds() + sessions.wait_seconds
        limit = show_seconds(sessions.wait_seconds)
        if sessions.wait_seconds:
            tell = sessions.say if sessions.first else sessions.tell_once
            tell("waiting for the Node to report its listener (up to %s)" % limit)
        while elapsed_seconds() < deadline:
            left = deadline - elapsed_seconds()
            try:
                session = sessions.plane.get(sessions.request.project_id, self.session_id,
                                             min(EXCHANGE_SECONDS, max(1.0, left)))
                if session.status != "active":
                    raise describe_end(session)
                if session.listener_endpoint:
                    return session.listener_endpoint
            except (TransportError, ApiError) as error:
                if not error.passing:
                    raise
            if sessions.plane.cancel.wait(max(0.0, min(pause, deadline - elapsed_seconds()))):
                raise Cancelled("interrupted")
            pause = min(pause * 1.5, POLL_MAX_SECONDS)
        raise EndpointMissing("the Node reported no listener endpoint within %s; is it up, "
                              "with fewer than ten sessions? (--wait-seconds)" % limit)

    def _move(self, endpoint: Endpoint) -> None:
        """Looks the endpoint's name up once; what it leads to is judged like the endpoint itself."""
        host: "Any" = endpoint.host.encode("ascii")  # for a str, getaddrinfo loads the IDNA codec, 1 ms
        try:
            found = socket.getaddrinfo(host, endpoint.port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise PlexctlError("listener endpoint %s: %s" % (endpoint, show_error(error))) from error
        family, _, _, _, address = found[0]
        if not is_dialable(str(address[0]), is_loopback(self._sessions.plane.server.host)):
            raise PlexctlError("listener endpoint %s: leads to %s, which is refused" % (endpoint, address[0]))
        self.endpoint, self._route = endpoint, (family, address)

    def _serve(self, connection: Connection) -> None:
        """One connection, from the dial to its end."""
        sessions = self._sessions
        try:
            if not self._partner.is_free.is_set():  # it still drains what comes for a client that is gone
                self._partner.do(None)
                self._partner = Partner()
            remote = self._dial()
        except PlexctlError as error:
            if not sessions.put_back(self):
                sessions.end(self, error)
            return
        dialled_on = elapsed_seconds()
        # psql's Ctrl-C and iperf3's data get no answer, but come beside a connection that has had one
        is_reached = sessions.is_answering()
        sessions.say("connection from %s to %s", connection, self.endpoint)
        relay = connection.relay = Relay(connection.sock, remote, self._buffer, self._partner,
                                         connection.is_gone, self.ask_in_thread)
        sessions.add_relay(relay)
        relay.carry()
        if relay.remote_ended_first and (connection.wants_reason or not relay.down.moved):
            self.ask()
        sessions.end(self, self._judge(
            relay, not is_reached and elapsed_seconds() - dialled_on < UNREACHABLE_SECONDS))

    def _judge(self, relay: Relay, is_suspicious: bool) -> "Optional[PlexctlError]":
        """What there is to say of a connection that was carried; None where it went well."""
        if self._sessions.is_stopped:
            return Cancelled("interrupted")
        if self.why is not None:
            return self.why
        if relay.remote_ended_first and not relay.down.moved and is_suspicious:
            return PlexctlError(
                "the Node ended the connection at once and nothing came back: nothing listens at %s, or "
                "the Node cannot reach it (--host and --port are as the Node sees them)"
                % join_host_port(self._sessions.request.host, self._sessions.request.port))
        if relay.error is not None:
            is_peer_s = isinstance(relay.error, OSError) and relay.error.errno not in EXHAUSTED
            return (ConnectionFailed if is_peer_s else PlexctlError)(
                "the connection ended: %s" % show_error(relay.error))
        return None

    def _dial(self) -> "socket.socket":
        """A connection to the listener; PlexctlError says why there is none."""
        has_moved = False
        while not self.check_over():
            route = self._route
            try:
                remote = dial(route, self.check_over)
            except OSError as failure:
                has_answer = self.ask()
                if self._sessions.is_stopped or not has_moved and self._route != route:
                    has_moved = True  # a new endpoint is tried once
                    continue
                if has_answer and self.why is None and isinstance(failure, ConnectionRefusedError):
                    self._note_refusal()
                raise self.why or PlexctlError("cannot connect to the listener endpoint %s: %s" % (
                    self.endpoint, show_error(failure))) from failure
            self._refused_since = 0.0
            self.has_carried = True
            return remote
        raise self.why or Cancelled("interrupted")

    def _note_refusal(self) -> None:
        """The listener is gone, though the control plane says that the session is active."""
        now = elapsed_seconds()
        self._refused_since = self._refused_since or now
        if self._sessions.may_replace(self):
            self.why = SessionOver("the Node has closed the session's listener")
        elif now - self._refused_since >= GONE_SECONDS:
            self.why = SessionOver("the Node has closed the session's listener and opened no other one "
                                   "for %d s" % GONE_SECONDS)

    def ask_in_thread(self) -> None:
        """To be called for any hint that the session may be over."""
        if elapsed_seconds() - self._asked_on >= ASK_SECONDS and not self._asking.locked():
            start_thread(self.ask, EXCHANGE_SECONDS)

    def ask(self, seconds: float = ASK_LIMIT_SECONDS) -> bool:
        """Asks GetSession and acts on it; whether there is an answer in time. Raises nothing.

        One question at a time, and one in ASK_SECONDS, serves all who want to know.
        """
        sessions = self._sessions
        if not self._asking.acquire(timeout=seconds):
            return False
        try:
            if self.why is not None or elapsed_seconds() - self._asked_on < ASK_SECONDS:
                return self._has_answer
            self._has_answer = False
            try:
                session = sessions.plane.get(sessions.request.project_id, self.session_id, seconds)
                self._has_answer = True
                if session.status != "active":
                    self.why = describe_end(session)
                elif session.listener_endpoint not in (None, self.endpoint):
                    sessions.say("the Node reports a new listener endpoint: %s", session.listener_endpoint)
                    self._move(session.listener_endpoint)
            except PlexctlError as error:
                if isinstance(error, ApiError) and error.status in (404, 410):
                    self.why = SessionRevoked("the session is gone")
                elif not sessions.is_stopped:
                    sessions.tell_once("warning: %s" % error)
            finally:
                self._asked_on = elapsed_seconds()
                self._recheck_on = self._asked_on + RECHECK_SECONDS
            return self._has_answer
        finally:
            self._asking.release()


def describe_end(session: Session) -> SessionOver:
    """Why a session is no longer active."""
    reason = " (%s)" % session.revoke_reason if session.revoke_reason else ""
    if session.status == "revoked" and session.revoke_reason not in ("ttl_expired", "idle_timeout"):
        return SessionRevoked("the session was revoked" + reason)
    return SessionOver("the session expired" + reason)


class Sessions:
    """The workers, and the queue of the connections that they serve, first come first served.

    At most `limit` sessions at once, `minimum` of them issued at the start; `renew`: one that has run
    out is replaced. Every session_id that the control plane ever gave is owed a revocation, until
    `keep` or `leave`. `report` takes lines, from any thread; more of them with `verbose`.

    A worker's `why` ends its session, and clients that wait go on waiting for the others, or for the one
    that replaces it; `over` ends all of them: whoever runs them raises it, and `stop` resets who waits.
    """

    def __init__(self, plane: ControlPlane, request: SessionRequest, report: "Report", limit: int = 4,
                 minimum: int = 1, renew: bool = False, wait_seconds: float = 90.0,
                 verbose: bool = False) -> None:
        self.plane = plane
        self.request = request
        self.report = report
        self.wait_seconds = wait_seconds
        self.over: "Optional[PlexctlError]" = None  # what has ended all of them
        self.first: "Optional[Worker]" = None  # that was ready
        self.is_stopped = False
        self.lock = threading.RLock()  # `report` may ask for a count
        self._relays: "List[Relay]" = []  # that are not closed yet, and so not added to _ended
        self._changed = threading.Condition(self.lock)
        self._limit = limit
        self._minimum = minimum
        self._renew = renew
        self.verbose = verbose
        self._workers: "List[Worker]" = []
        self._idle: "List[Worker]" = []  # the last one is taken first, so that the others can be given back
        self._queue: "Any" = collections.deque()
        self._ended = Counts()
        self._known: "Set[str]" = set()  # every session_id that there was
        self._owed: "Dict[str, bool]" = {}  # by session_id; True: it is being revoked
        self._keep = False
        self._replaced_on = -float("inf")
        self._retry_on = self._sweep_on = 0.0
        self._warned_at = float("inf")
        self._told: "Set[str]" = set()

    # For whoever forwards

    def establish(self) -> Worker:
        """Issues the first sessions, and waits until the Node of one of them reports its listener."""
        with self._changed:
            for _ in range(0 if self.is_stopped else self._minimum):
                self._start_worker()
            while self.first is None:
                if self.over or self.is_stopped:
                    raise self.over or Cancelled("interrupted")
                self._changed.wait(TICK_SECONDS)
            return self.first

    def put(self, connection: Connection) -> None:
        """One connection more: it is carried as soon as a session is idle."""
        with self.lock:
            if not self.is_stopped and not self.over:
                self._queue.append(connection)
                self._call_idle()
                if not self._workers:
                    self._grow(elapsed_seconds())
                return
        connection.end(self.over or Cancelled("interrupted"))

    def tick(self) -> None:
        """To be called several times a second: who has left, who has waited for long, whose time is up."""
        now = elapsed_seconds()
        with self.lock:
            if now >= self._sweep_on:
                for connection in [each for each in self._queue if each.has_left()]:
                    self._queue.remove(connection)
                    connection.end(Cancelled("the client has left"))
                self._sweep_on = now + 10 * (elapsed_seconds() - now)  # at most a tenth of the time
            if self._is_time_up(now):
                self.over = self.over or SessionOver("the session expired")
            self._grow(now)
            for each in self._workers:
                if each.connection and each.check_over() and each.connection.relay:
                    each.connection.relay.stop()
        lifetime = self.first.issued.lifetime_seconds if self.first and self.first.issued else 0.0
        left_seconds = self.seconds_left()
        for threshold in () if self._renew else reversed(WARN_LEFT_SECONDS):
            if 0 < left_seconds <= threshold < min(lifetime, self._warned_at):
                self._warned_at = threshold
                self.report("warning: %s of the session are left" % show_seconds(left_seconds + 0.5))

    def count(self) -> Counts:
        """The totals so far; from any thread."""
        with self.lock:
            return Counts(len(self._list_carried()), len(self._queue), self._ended.ended,
                          sum(worker.is_ready and not worker.is_ending for worker in self._workers),
                          self._ended.up + sum(relay.up.moved for relay in self._relays),
                          self._ended.down + sum(relay.down.moved for relay in self._relays))

    def count_descriptors(self) -> int:
        """How many descriptors the connections may take, those that wait and those that are carried."""
        lingering = [each for each in tuple(self._relays) if each.client_is_gone and not each.is_closed]
        return len(self._queue) + 2 * (len(self._list_carried()) + len(lingering))

    def seconds_left(self) -> float:
        """Until the sessions run out, with `renew` the first of them; 0 where there is none."""
        with self.lock:
            workers = [worker for worker in self._workers if worker.is_ready]
            if not self._renew and self.first is not None:
                workers = [self.first]
            return max(0.0, min((each.expires_on for each in workers), default=0.0) - elapsed_seconds())

    def is_delivering(self) -> bool:
        """Whether bytes of clients that are gone are still on their way to the target."""
        with self.lock:
            return (any(relay.client_is_gone and not relay.is_closed for relay in self._relays)
                    or any(each.is_gone() for each in self._list_carried() + list(self._queue)))

    def is_answering(self) -> bool:
        """Whether the target has sent something to a connection that is open."""
        with self.lock:
            return any(relay.down.moved and not relay.is_closed for relay in self._relays)

    def say(self, line: str, *words: "Any") -> None:
        """A line for who wants to know more."""
        if self.verbose:
            self.report(line % words)

    def tell_once(self, line: str, subject: str = "") -> None:
        """A line, once in a run; or one of all that have the same subject."""
        if (subject or line) not in self._told:
            self._told.add(subject or line)
            self.report(line)

    # For the workers, each in its own thread

    def next_request(self) -> SessionRequest:
        """What to ask for: without `renew` a further session may not outlive the first one."""
        asked = self.request
        if self._renew or self.first is None:
            return asked
        left = max(1, int(self.first.expires_on - elapsed_seconds()))
        return asked._replace(ttl_seconds=min(asked.ttl_seconds or left, left))

    def owe(self, worker: Worker, session_id: str) -> None:
        """There is a session of this id, to be revoked whatever follows."""
        with self._changed:
            if session_id in self._known:
                raise TransportError("%s: the answer's session_id is that of an earlier session" % ISSUE)
            self._known.add(session_id)
            worker.session_id = session_id
            self._owed[session_id] = False
            self._changed.notify_all()  # leave() may be waiting for it

    def add_ready(self, worker: Worker) -> None:
        """Its Node has reported the listener."""
        with self._changed:
            worker.is_ready = True
            self.first = self.first or worker
            self._changed.notify_all()
        self.say("session %s: listener endpoint %s, expires at %s", worker.session_id, worker.endpoint,
                 worker.issued and worker.issued.expires_at)

    def take(self, worker: Worker) -> "Optional[Connection]":
        """The next connection for an idle worker; None where it is to end."""
        with self.lock:
            idle_since = elapsed_seconds()
            while not worker.check_over() and not self.over:
                while self._queue:
                    connection: Connection = self._queue.popleft()
                    if elapsed_seconds() - connection.began < POLL_SECONDS or not connection.has_left():
                        self._forget_idle(worker)
                        worker.connection = connection
                        return connection
                    connection.end(Cancelled("the client has left"))
                if elapsed_seconds() - idle_since >= IDLE_SECONDS and self._minimum < sum(
                        each.is_ready and not each.is_ending for each in self._workers):
                    break
                if worker not in self._idle:
                    self._idle.append(worker)
                worker.turn.wait(TICK_SECONDS)
            self._forget_idle(worker)
            worker.is_ending = True
            return None

    def put_back(self, worker: Worker) -> bool:
        """Hands the connection of a session that has just ended to another one, where there may be one."""
        with self.lock:
            others = any(each.why is None and not each.is_ending for each in self._workers)
            if self.is_stopped or self.over or not worker.why or not (others or self._renew):
                return False
            self._queue.appendleft(worker.connection)
            worker.connection = None
            self._call_idle()
            return True

    def add_relay(self, relay: Relay) -> None:
        """A connection begins to be carried."""
        with self.lock:
            for each in [each for each in self._relays if each.is_closed]:
                self._relays.remove(each)
                self._ended.up += each.up.moved
                self._ended.down += each.down.moved
            self._relays.append(relay)
            if self.is_stopped:
                relay.stop()

    def end(self, worker: Worker, error: "Optional[PlexctlError]") -> None:
        """The worker's connection is over."""
        with self._changed:
            connection, worker.connection = worker.connection, None
            if connection is not None:
                self._ended.ended += 1
                connection.end(error)
            self._changed.notify_all()

    def may_replace(self, worker: Worker) -> bool:
        """Whether one whose listener is gone is replaced at once: a Node may refuse everybody."""
        now = elapsed_seconds()
        with self.lock:
            if not self._renew or not worker.has_carried and now - self._replaced_on < REPLACE_SECONDS:
                return False
            if not worker.has_carried:
                self._replaced_on = now
            return True

    def dismiss(self, worker: Worker) -> None:
        """A worker's last act: what follows from its end, and the revocation."""
        self.end(worker, worker.why or Cancelled("interrupted"))
        with self._changed:
            worker.is_ending = True
            if worker.why and not self.over and not self.is_stopped:
                self._follow(worker, worker.why)
            if worker.why and worker.why.may_exist and worker.why is not self.over and (
                    self.over or self.is_stopped or self.first is None):  # nobody else says it
                self.report("warning: session unknown: %s" % worker.why)
            is_due = self._claim(worker.session_id)
            self._changed.notify_all()
        if is_due:
            self._revoke(worker.session_id)
        with self._changed:
            self._workers.remove(worker)
            self._changed.notify_all()

    # Below: how

    def _list_carried(self) -> "List[Connection]":
        return [worker.connection for worker in tuple(self._workers) if worker.connection]

    def _is_time_up(self, now: float) -> bool:
        """Without `renew` access is for the time of the first session."""
        return not self._renew and self.first is not None and now >= self.first.expires_on

    def _call_idle(self) -> None:
        if self._idle:
            self._idle.pop().turn.notify()

    def _forget_idle(self, worker: Worker) -> None:
        if worker in self._idle:
            self._idle.remove(worker)

    def _start_worker(self) -> None:
        """With the lock held."""
        worker = Worker(self)
        self._workers.append(worker)
        if not start_thread(worker.run):
            self._workers.remove(worker)
            why = PlexctlError("cannot start a thread for a session (ulimit -u)")
            if self.first is None and not self._workers:
                self.over = self.over or why
            self._retry_on = elapsed_seconds() + RETRY_SECONDS
            self.tell_once("warning: %s" % why)
            while not self._workers and self._queue:
                self._queue.popleft().end(why)

    def _grow(self, now: float) -> None:
        """With the lock held: starts the workers that are wanted now."""
        if self.first is None or self.is_stopped or self.over or now < self._retry_on:
            return
        live = [worker for worker in self._workers if not worker.is_ending]
        if self._workers and not live:  # the server may count what is being revoked
            return
        coming = sum(not worker.is_ready for worker in live)
        patience = GRACE_SECONDS if live else 0.0
        waited = sum(now - connection.began >= patience for connection in self._queue)
        if waited and len(live) - coming >= self._limit:
            self.tell_once("warning: more connections at once than sessions (%d): they wait their turn "
                           "(--max-sessions)" % self._limit, "limit")
        missing = self._minimum - len(live) if self._minimum > 1 else 0  # one alone: when needed
        wanted = min(max(waited - coming, missing), self._limit - len(self._workers))
        for _ in range(wanted if self._renew or self.first.expires_on - now >= 1 else 0):
            self._start_worker()

    def _follow(self, worker: Worker, why: PlexctlError) -> None:
        """With the lock held: what one's end means for the others, and for those who wait."""
        others = sum(not each.is_ending for each in self._workers)
        refused = isinstance(why, ApiError) and why.status < 500
        if isinstance(why, SessionRevoked) or self._is_time_up(elapsed_seconds()) or not others and (
                self.first is None or refused or not self._renew):
            self.over = why
        elif worker.is_ready:
            self.tell_once("%s%s" % (why, "; the next connection gets a new one" if self._renew else ""))
        elif self.first is None:  # whoever established it hears of the last one
            pass
        elif others and (refused or isinstance(why, EndpointMissing)):
            self._limit = min(self._limit, others)
            self.tell_once("warning: no further session, connections wait for those there are: %s" % why,
                           "limit")
        else:
            self._retry_on = elapsed_seconds() + RETRY_SECONDS
            self.tell_once("warning: no further session for now: %s" % why)
        while self._queue and not (others or self.over or worker.is_ready):
            self._queue.popleft().end(why)

    # Leaving

    def keep(self) -> None:
        """The sessions are in the operator's hands from now on: `leave` will not revoke them."""
        self._keep = True

    def stop(self, seconds: float = CLOSE_SECONDS) -> None:
        """Ends every connection, with a reset where it was not over; waits for that so long."""
        deadline = elapsed_seconds() + seconds
        with self._changed:
            if self.is_stopped:
                return
            self.is_stopped = True
            self.plane.cancel.set()
            while self._queue:
                self._queue.popleft().end(Cancelled("interrupted"))
            for relay in self._relays:
                relay.stop()
            for worker in self._workers:
                worker.turn.notify()
            self._changed.notify_all()
            while self._list_carried() and elapsed_seconds() < deadline:
                self._changed.wait(max(0.0, deadline - elapsed_seconds()))
            for connection in self._list_carried():
                connection.end(Cancelled("interrupted"))

    def leave(self, seconds: float = LEAVE_SECONDS) -> None:
        """Revokes what is owed, also what is just being issued; returns after `seconds` at most."""
        deadline = elapsed_seconds() + seconds
        self.stop(0.0)
        while elapsed_seconds() < deadline:
            with self._changed:
                due = [session_id for session_id in self._owed if self._claim(session_id)]
                if not due:
                    if not any(self._owed.values()) and all(each.session_id for each in self._workers):
                        return
                    self._changed.wait(max(0.0, min(TICK_SECONDS, deadline - elapsed_seconds())))
            for session_id in due:
                if not start_thread(self._revoke, session_id):
                    self._revoke(session_id)

    def left_behind(self) -> "List[str]":
        """What `leave` could not settle, in words; told once."""
        with self.lock:
            owed = [each for each, is_begun in self._owed.items() if is_begun or not self._keep]
            self._owed.clear()
            lines = ["session %s is not revoked, it will run out by itself" % each for each in owed]
            if not all(worker.session_id for worker in self._workers):
                lines.append("a session may have been issued, it will run out by itself")
            return lines

    def _claim(self, session_id: str) -> bool:
        """With the lock held: whether it is for the caller to revoke it, once."""
        is_begun_or_done = self._owed.get(session_id, True)
        if is_begun_or_done or self._keep and self.is_stopped:
            return False
        self._owed[session_id] = True
        return True

    def _revoke(self, session_id: str) -> None:
        """A failure that may pass is tried again. Raises nothing."""
        self.say("session %s given back", session_id)
        deadline, failure = elapsed_seconds() + LEAVE_SECONDS, None
        while True:
            try:
                self.plane.revoke(self.request.project_id, session_id, max(0.5, deadline - elapsed_seconds()))
                break
            except Exception as error:
                if not getattr(error, "passing", False) or elapsed_seconds() + POLL_MIN_SECONDS > deadline:
                    failure = error if isinstance(error, PlexctlError) else show_error(error)
                    break
            time.sleep(POLL_MIN_SECONDS)
        with self._changed:
            if self._owed.pop(session_id, None) and failure:  # else it was told already
                self.report("warning: session %s is not revoked, it will run out by itself: %s"
                            % (session_id, failure))
            self._changed.notify_all()


# ------------------------------------------------------------------------------------- forwarder

BACKLOG_CONNECTIONS = 1024  # the default of 5 makes bursts wait a second
PAUSE_SECONDS = 0.5  # after an accept() that failed
RESERVED_DESCRIPTORS = 24  # for exchanges with the control plane, and the standard library
TCP_SYN_SENT, TCP_LISTEN = 2, 10
SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, NETLINK_SOCK_DIAG = 20, 1, 4
NOBODY = 0xFFFFFFFF  # no uid: (uid_t) -1


class OwnerCheck:
    """Which user holds the other end of a loopback connection, by the kernel's word.

    sock_diag(7), inet_diag: one netlink request with the exact addresses, about 10 microseconds.
    OSError from the constructor where the host cannot answer. Usable from several threads.
    """

    def __init__(self, family: int, local: "Tuple[str, int]") -> None:
        self._family = family
        self._local = local
        self._sequence = 0
        self._lock = threading.Lock()
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        try:
            self._netlink.connect((0, 0))
            self._netlink.setblocking(False)
            os.close(os.dup(self._netlink.fileno()))  # if_nametoindex opens one, and hides why it fails
            # asked so, the kernel finds sockets that are bound to the device and others alike
            self._device = socket.if_nametoindex("lo")
            nobody = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104
            if self._ask(local, (nobody, 0), is_listener=True)[0] != os.geteuid():
                raise OSError(errno.EOPNOTSUPP, "no answer")
        except BaseException:
            self.close()
            raise

    def find(self, client: "Tuple[Any, ...]") -> "Tuple[int, bool]":
        """The uid that holds the client's socket, NOBODY for none; and whether no process has it open."""
        try:
            uid, inode = self._ask(client, self._local)
            return (uid, False) if inode else (NOBODY, True)
        except OSError:  # the kernel does not tell
            return NOBODY, False

    def _ask(self, source: "Tuple[Any, ...]", destination: "Tuple[Any, ...]",
             is_listener: bool = False) -> "Tuple[int, int]":
        """The uid and inode of a socket, of a connection unless `is_listener`; (NOBODY, 0) for none."""
        ports = struct.pack(">HH", source[1], destination[1])
        with self._lock:
            self._sequence = self._sequence + 1 & 0xFFFFFFFF
            # nlmsghdr, inet_diag_req_v2, and in it inet_diag_sockid
            self._netlink.send(struct.pack(
                "=IHHIIBBBBI4s16s16sIII", 72, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, self._sequence, 0,
                self._family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF, ports,
                socket.inet_pton(self._family, source[0]), socket.inet_pton(self._family, destination[0]),
                self._device, 0xFFFFFFFF, 0xFFFFFFFF))
            sequence = -1
            while sequence != self._sequence:  # a late answer to an earlier question is nobody's
                answer = self._netlink.recv(4096)
                kind, _, sequence = struct.unpack_from("=HHI", answer, 4)
        if kind != SOCK_DIAG_BY_FAMILY or len(answer) < 88:
            error = -struct.unpack_from("=i", answer, 16)[0]
            if error != errno.ENOENT:  # there is no such socket
                raise OSError(error, os.strerror(error))
            return NOBODY, 0
        # inet_diag_msg behind the nlmsghdr: family, state, timer, retrans, ports. Where it finds no
        # connection, the kernel answers with a listener on the source's port
        state, found_ports = struct.unpack_from("=xBxx4s", answer, 16)
        if found_ports != ports or not is_listener and state in (TCP_LISTEN, TCP_SYN_SENT):
            return NOBODY, 0
        return struct.unpack_from("=II", answer, 80)

    def close(self) -> None:
        self._netlink.close()


def read_proc(path: str) -> str:
    """A small file of the kernel's, "" where there is none."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except (OSError, ValueError):
        return ""


def has_unmapped_uid() -> bool:
    """Whether our own uid is what a user namespace shows for every uid that it does not know."""
    overflow = read_proc("/proc/sys/kernel/overflowuid").strip() or "65534"
    identity = ["0", "0", str(NOBODY)]
    return str(os.geteuid()) == overflow and read_proc("/proc/self/uid_map").split() != identity


def create_listener(local: LocalAddress) -> "Any":
    """A socketserver that binds and listens now; what becomes of a connection is for its owner to set."""
    class Listener(socketserver.TCPServer):
        request_queue_size = BACKLOG_CONNECTIONS
        allow_reuse_address = os.name == "posix"  # on Windows it would let others take the port
        identity: "Optional[os.stat_result]" = None
        if local.path:
            address_family = socket.AF_UNIX
        elif ":" in local.host:
            address_family = socket.AF_INET6

        def server_bind(self) -> None:
            if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            mask = os.umask(0o177) if local.path else 0
            try:
                super().server_bind()
            finally:
                if local.path:
                    os.umask(mask)
            self.socket.setblocking(False)
            if local.path:
                self.identity = os.lstat(local.path)
            else:
                set_leg_options(self.socket)

        def server_close(self) -> None:
            super().server_close()
            mine, self.identity = self.identity, None
            try:
                if mine and os.path.samestat(mine, os.lstat(local.path)):
                    os.unlink(local.path)
            except OSError:  # it is gone, or its directory is not ours any more
                pass

    address = local.path or (local.host, local.port)
    try:
        return Listener(address, None)  # type: ignore[arg-type]
    except (OSError, OverflowError) as error:
        raise PlexctlError("--local-addr %s: cannot listen: %s"
                           % (escape(str(local)), show_error(error))) from error


def count_capacity() -> int:
    """How many descriptors connections may take, so that some are left for everything else."""
    if not ON_LINUX:  # select() takes no more
        return 400
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(2, soft - RESERVED_DESCRIPTORS)


class Forwarder:
    """Listens on a local address, and puts every connection into the queue of `sessions`.

    The address is bound when the object is made (PlexctlError if that fails); `start` accepts, also
    before the first session is there, and `stop` ends everything.
    """

    def __init__(self, local: LocalAddress, sessions: Sessions, allow_other_users: bool = False) -> None:
        self.unidentified = 0  # connections not served, since their clients had gone already
        self._sessions = sessions
        self._is_accepting = False
        self._accepted_until = float("inf")
        self._tick_on = 0.0
        self._capacity = count_capacity()
        server = self._server = create_listener(local)
        server.get_request, server.verify_request = self._get_request, self._may_serve
        server.process_request, server.service_actions = self._enqueue, self.tick
        server.shutdown_request = lambda request: close_leg(request, reset=True)
        server.handle_error = lambda request, address: self.warn_once(
            "a connection was dropped after %s" % type(sys.exc_info()[1]).__name__)
        self.local = local if local.path else LocalAddress(local.host, server.server_address[1])
        self._owners: "Optional[OwnerCheck]" = None
        self._checks_owners = False
        self._create_owner_check(allow_other_users)

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Accepts from now on, in a thread; PlexctlError where there is none."""
        self._is_accepting = True
        if not start_thread(self._accept):
            self._is_accepting = False
            raise PlexctlError("cannot start a thread to accept connections (ulimit -u)")

    def accept_rest(self) -> None:
        """Accepts the connections that wait already, and no more."""
        self._stop_accepting()
        self._server.timeout, deadline = 0, elapsed_seconds() + CLOSE_SECONDS
        while self._server.fileno() >= 0 and elapsed_seconds() < deadline and wait_for(
                self._server.fileno(), READABLE, 0):
            self._server.handle_request()
        self._server.server_close()

    def stop(self) -> None:
        """Stops listening and ends every connection, within CLOSE_SECONDS or so."""
        self._stop_accepting()
        self._server.server_close()
        self._sessions.stop()
        if self._owners is not None:
            self._owners.close()

    def raise_limit(self) -> None:
        """Raises the process's limit of descriptors, and takes as many connections as that allows."""
        if ON_LINUX:
            try:
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            except (OSError, ValueError):
                pass
        self._capacity = count_capacity()

    # What the listener calls, in its thread

    def _get_request(self) -> "Tuple[socket.socket, Any]":
        try:
            return self._server.socket.accept()  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno in EXHAUSTED:
                self.warn_once("cannot accept connections for now: %s" % show_error(error))
                time.sleep(PAUSE_SECONDS)  # do not spin
            raise

    def _may_serve(self, client: "socket.socket", address: "Any") -> bool:
        """Whether the user behind this connection may use the port: ours or root, by the kernel's word."""
        if not self._checks_owners or self._owners is None:
            return True
        uid = self._owners.find(address)[0]
        if not is_connected(client):  # its socket is dead, and the address may be another one's by now
            uid = NOBODY
        if uid in (0, os.geteuid()):
            return True
        if uid == NOBODY:
            self.unidentified += 1
        else:
            self._sessions.tell_once("warning: turned away connections of uid %d (--allow-other-users lets "
                                     "other users in)" % uid, "other users")
        return False

    def _enqueue(self, client: "socket.socket", address: "Any") -> None:
        if self._sessions.count_descriptors() >= self._capacity:
            self.warn_once("no more descriptors (ulimit -n): connections are refused")
            close_leg(client, reset=True)
            return

        def is_gone() -> bool:
            if self.local.path:
                return has_hung_up(client)
            if self._owners is None:  # nobody can know; at the end there is time for what was sent to arrive
                return 0 <= elapsed_seconds() - self._accepted_until < LEAVE_SECONDS
            return self._owners.find(address)[1]

        self._sessions.put(Connection(client, self._end, is_gone, address))

    def tick(self) -> None:
        """To be called often. Nothing may end the accepting."""
        now = elapsed_seconds()
        if now < self._tick_on:
            return
        self._tick_on = now + POLL_SECONDS
        try:
            self._sessions.tick()
        except Exception as error:
            self.warn_once("%s while looking after connections" % show_error(error))

    def warn_once(self, text: str) -> None:
        self._sessions.tell_once("warning: " + text)

    # Below: how

    def _create_owner_check(self, allow_other_users: bool) -> None:
        if self.local.path:
            return
        if not is_loopback(self.local.host):
            if not allow_other_users:
                self.warn_once("%s is not a loopback address: any user, here and elsewhere, can use the "
                               "port" % str(self.local))
            return
        try:
            self._owners = OwnerCheck(self._server.address_family, (self.local.host, self.local.port))
            self._checks_owners = not allow_other_users and not has_unmapped_uid()
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) in EXHAUSTED:
                self._server.server_close()
                raise PlexctlError("cannot carry connections: %s" % show_error(error)) from error
        if not self._checks_owners and not allow_other_users:
            self.warn_once("this host cannot tell whose a connection is: any local user can use the port")

    def _accept(self) -> None:
        while True:
            try:
                self._server.serve_forever(POLL_SECONDS)
            except Exception as error:  # of its waiting itself
                self.warn_once("cannot accept connections for now: %s" % show_error(error))
                time.sleep(PAUSE_SECONDS)
            if not self._is_accepting:
                return

    def _stop_accepting(self) -> None:
        if self._is_accepting:
            self._is_accepting, self._accepted_until = False, elapsed_seconds()
            self._server.shutdown()  # which waits for serve_forever; _accept always comes to it

    def _end(self, connection: Connection, error: "Optional[PlexctlError]") -> None:
        relay = connection.relay
        if relay is not None and self._sessions.verbose:
            why = " (%s)" % error if isinstance(error, ConnectionFailed) else ""
            self._sessions.report("connection closed%s: %s up, %s down" % (
                why, show_bytes(relay.up.moved), show_bytes(relay.down.moved)))
        if error is not None and not isinstance(error, (SessionOver, ConnectionFailed, Cancelled)):
            self.warn_once(str(error) if relay else "a connection was not served: %s" % error)


# ---------------------------------------------------------------------------------------- output


def terminal_width(stream: Optional[IO[str]]) -> int:
    """Return the width in columns; 80 if nobody knows."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return 80


def format_text(document: Dict[str, Any], width: int = 0) -> str:
    """Format a header line and a row, columns aligned; one line per column if the terminal is narrower."""
    cells = dict(document, target=join_host_port(**document["target"]))
    header = row = lines = ""
    for name in ("local_addr", "listener_endpoint", "target", "session_id", "expires_at"):
        cell = escape(cells[name], DOCUMENT_MAX_CHARACTERS)
        column = max(len(name), len(cell)) + 2
        header += name.upper().ljust(column)
        row += cell.ljust(column)
        lines += f"{name.upper():19}{cell}\n"
    return lines if 0 < width < len(row.rstrip()) else f"{header.rstrip()}\n{row.rstrip()}\n"


def format_json(document: Dict[str, Any], width: int = 0) -> str:
    """Format one line of JSON, ASCII only."""
    return json.dumps(document) + "\n"


def format_yaml(document: Dict[str, Any], width: int = 0, indent: str = "") -> str:
    """Format the same keys as YAML; strings are quoted as in JSON, which YAML 1.2 reads the same way."""
    text = ""
    for key, value in document.items():
        if isinstance(value, dict):
            text += f"{indent}{key}:\n{format_yaml(value, width, indent + '  ')}"
        else:
            text += f"{indent}{key}: {json.dumps(value)}\n"
    return text


FORMATS: Dict[str, Callable[[Dict[str, Any], int], str]] = {
    "text": format_text, "json": format_json, "yaml": format_yaml}
FAILED_WAIT_SECONDS = 0.1
NOTIFY_SECONDS = 1.0
STATUS_SECONDS = 60
DELIVERY_SECONDS = 0.02


def write_all(stream: Optional[IO[str]], text: str) -> None:
    """Write ASCII text without Python's buffer, so that nothing is left to fail at exit; OSError."""
    if stream is None:
        raise OSError(errno.EBADF, "it is closed")
    try:
        fd = stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: a test's or a library user's
        stream.write(text)
        stream.flush()
        return
    stream.flush()
    raw = text.encode("ascii", "backslashreplace")
    while raw:
        try:
            raw = raw[os.write(fd, raw):]
        except BlockingIOError:
            wait_for(fd, WRITABLE)


def is_writable(stream: "Optional[IO[str]]") -> bool:
    """Whether a line can be written without blocking, as far as anybody knows."""
    try:
        return wait_for(stream.fileno(), WRITABLE, 0)  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):  # closed, or not a file: writing tells
        return True


class Waker:
    """A socket that the main thread waits at, and that any other thread, or a signal, writes to."""

    def __init__(self) -> None:
        self._is_awake = False
        self._watched, self.written = socket.socketpair()  # `written` is also for signal.set_wakeup_fd
        self._watched.setblocking(False)
        self.written.setblocking(False)

    def wake(self) -> None:
        """Ends the wait, or the next one."""
        if not self._is_awake:  # were it full, Python 3.6 would complain of a signal on stderr
            self._is_awake = True
            try:
                self.written.send(b"\0")
            except OSError:  # closed
                pass

    def wait(self, seconds: float) -> None:
        """Until somebody wakes it, for so long at most. Where waiting fails, what follows it must happen."""
        try:
            if wait_for(self._watched.fileno(), READABLE, seconds):
                self._watched.recv(4096)
        except OSError:
            time.sleep(min(seconds, FAILED_WAIT_SECONDS))
        self._is_awake = False  # not before: recv would take the byte of a wake() in between

    def close(self) -> None:
        self._watched.close()
        self.written.close()


class Messages:
    """What goes to stderr: lines of any thread, and the live line.

    A thread writes them: a stderr that takes nothing (a full pipe, a terminal that was stopped or whose
    network is gone) is no reason to stop, nor to keep a signal waiting.
    """

    def __init__(self, stream: "Optional[IO[str]]", live: bool) -> None:
        self.stream = stream
        self.is_live = live and stream is not None and stream.isatty()
        self._shown = 0  # characters of the live line that stand there
        self._texts: "Any" = collections.deque()  # one that ends no line is the live line, "" wipes it
        self._written = threading.Condition()
        self._is_writing = False

    def report(self, line: str) -> None:
        """One line for stderr; from any thread."""
        self._put("plexctl: %s\n" % line)

    def show(self, line: str) -> None:
        """Draws the live line, as much of it as fits; nothing where there is no terminal."""
        if self.is_live and not self._is_writing and not self._is_in_background():
            width = max(0, terminal_width(self.stream) - 3)  # the echo of Ctrl-C stands behind it
            while len(line) > width:
                line = line.rpartition(", ")[0] or line[:width]
            self._put(line)

    def flush(self, seconds: float) -> None:
        """Wipes the live line, and waits until everything is written, for so long at most."""
        if self.is_live or self._texts:
            self._put("")
        with self._written:
            self._written.wait_for(lambda: not self._is_writing, seconds)

    def _is_in_background(self) -> bool:
        """Whether the terminal is another process group's now (`plexctl ... &`)."""
        try:
            return os.tcgetpgrp(self.stream.fileno()) != os.getpgrp()  # type: ignore[union-attr]
        except (OSError, ValueError, AttributeError):
            return False

    def _put(self, text: str) -> None:
        with self._written:
            self._texts.append(text)
            if self._is_writing:
                return
            self._is_writing = True
        if not start_thread(self._write):
            self._write(may_block=False)

    def _write(self, may_block: bool = True) -> None:
        """Writes what there is, each text in place of the live line, as far as stderr takes it."""
        while True:
            with self._written:
                if not self._texts or not may_block and not is_writable(self.stream):
                    self._is_writing = False
                    self._written.notify_all()
                    return
                text = self._texts.popleft()
            shown, self._shown = self._shown, 0 if text.endswith("\n") else len(text)
            if shown:
                rows = (shown - 1) // terminal_width(self.stream)  # several after it was narrowed
                text = ("\x1b[%dA" % rows if rows else "") + "\r\x1b[J" + text
            try:
                write_all(self.stream, text)
            except Exception:  # noqa: S110  # closed, full, or a host's own stream: there is nowhere to say so
                pass


class Foreground:
    """The main thread: it waits for signals and for other threads.

    A signal's whole life is here: `handle` hears it, `wait` raises it as Interrupted (`finish`
    only hurries), and an `ignored` one is nobody's. `signals` holds those that were heard and not raised yet.
    """

    def __init__(self, stream: "Optional[IO[str]]", live: bool) -> None:
        self.waker = Waker()
        self.messages = Messages(stream, live)
        self.report = self.messages.report
        self.signals: "List[int]" = []
        self.ignored: "Tuple[int, ...]" = ()
        self.passed_on: "Tuple[int, ...]" = ()  # they do not count: COMMAND's to act on
        self._asked = 0  # signals that asked for the end
        self._is_finishing = False

    def handle(self, signum: int, frame: object) -> None:
        """The handler: a third signal that asks for the end ends the process at once."""
        if signum not in self.ignored:
            self.signals.append(signum)
            self._asked += signum not in self.passed_on
            if self._asked > 2:
                end_by_signal(signum)

    def wait(self, seconds: float) -> None:
        """Until something happens, `seconds` at most. Raises Interrupted for a signal."""
        self.waker.wait(0 if self.signals and not self._is_finishing else seconds)
        if self.signals and not self._is_finishing:
            raise Interrupted(self.signals.pop(0))

    def call(self, function: "Callable[[], Any]", status: "Optional[Callable[[], str]]" = None) -> "Any":
        """What `function` returns or raises, run in a thread, so that a signal ends the wait."""
        self.wait(0)  # a signal that is here already: then nothing is begun
        outcome = self._start(function)
        while not outcome:
            self.wait(TICK_SECONDS)
            if status is not None and not outcome:
                self.messages.show(status())
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def finish(self, function: "Callable[[], None]", seconds: float) -> None:
        """Runs what must still be done, for `seconds` at most; a further signal leaves HURRY_SECONDS."""
        self._is_finishing = True
        outcome = self._start(function)
        deadline = elapsed_seconds() + seconds
        while not outcome and elapsed_seconds() < deadline:
            if self.signals:
                deadline = min(deadline, elapsed_seconds() + HURRY_SECONDS)
            self.wait(max(0.0, min(TICK_SECONDS, deadline - elapsed_seconds())))

    def write(self, text: str, stream: "Optional[IO[str]]", name: str) -> None:
        """Writes text to a stream, behind the messages; PlexctlError unless all of it was taken."""
        self.messages.flush(HURRY_SECONDS)
        try:
            self.call(lambda: write_all(stream, text))
        except (OSError, ValueError) as error:
            raise PlexctlError("cannot write to %s: %s" % (name, show_error(error))) from error

    def _start(self, function: "Callable[[], Any]") -> "List[Tuple[Any, Optional[BaseException]]]":
        """Runs it in a thread; its result or error is put in the list that is returned."""
        outcome: "List[Tuple[Any, Optional[BaseException]]]" = []

        def run() -> None:
            try:
                outcome.append((function(), None))
            except BaseException as error:
                outcome.append((None, error))
            self.waker.wake()

        if not start_thread(run):  # better without an ear for signals than not at all
            run()
        return outcome


# ---------------------------------------------------------------------------------- command line

COMMAND = "tcp-forward"
USAGE = """plexctl [options] tcp-forward --project-id UUID --resource-id UUID
               --host HOST --port PORT [options]
               [--proxy | --stdio | -- COMMAND [ARG ...]]"""
SHORT_USAGE = ("usage: plexctl tcp-forward --project-id UUID --resource-id UUID --host HOST --port PORT "
               "[options]")
ABOUT = """\
Ask a plexsphere control plane for a one-time mediated session to a TCP target
behind a Node, and print the local address and the listener endpoint. With
--proxy, --stdio or -- COMMAND also forward connections, and revoke the session
at the end."""
EXAMPLES = """\
examples, with the four required options in TARGET:
  plexctl tcp-forward $TARGET
  plexctl tcp-forward $TARGET --proxy --local-addr 127.0.0.1:15432
  plexctl tcp-forward $TARGET -- psql -h {host} -p {port} -U postgres
  ssh -o ProxyCommand="plexctl tcp-forward $TARGET --stdio" behind-the-node

COMMAND runs while connections are forwarded: {host}, {port} and {addr} in its
arguments are replaced, and PLEXCTL_LOCAL_HOST, _PORT and _ADDR are in its
environment. plexctl exits with its status.

exit codes: 0 success, 1 failure, 2 usage error, 3 credentials, 4 forbidden,
77 ReBAC denial, 126 COMMAND cannot be executed, 127 COMMAND not found"""
DEFAULT_MAX_SESSIONS = 4
parse_word = matching(r"[^\0]+", "one character or more")  # a path may hold what is not printable


def describe_version() -> str:
    """Return the version and the SHA-256 of the file that this was loaded from, even from a zip file."""
    try:
        raw = __loader__.get_data(__file__)  # type: ignore[name-defined]
        digest = f"sha256 {hashlib.sha256(raw).hexdigest()} of {escape(__file__)}"
    except (NameError, AttributeError):
        digest = "no sha256: running from standard input"
    except OSError as error:
        digest = f"no sha256: {escape(__file__)} cannot be read: {show_error(error)}"
    return f"plexctl {__version__} ({digest})\n"


class Parser(argparse.ArgumentParser):
    """argparse's parser, with UsageErrors that do not show the value: it may be a secret."""

    def __init__(self) -> None:
        def create_formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=25, width=80)

        super().__init__(prog="plexctl", usage=USAGE, description=ABOUT, epilog=EXAMPLES, add_help=False,
                         allow_abbrev=False, formatter_class=create_formatter)
        self.color = False  # 3.14 would colour the help
        self.takes_value: Dict[str, bool] = {}  # by flag

    def error(self, message: str) -> NoReturn:
        raise UsageError(escape(message.replace("argument ", "", 1).partition("'")[0]).rstrip(": "))

    def add(self, group: Any, flag: str, metavar: str, parse: Callable[[str], Any], text: str,
            default: Any = None, required: bool = False) -> None:
        """Add a flag with a value; the last one counts."""
        def convert(value: str) -> Any:
            try:
                return parse(value)
            except ValueError as error:  # argparse would show the value
                raise argparse.ArgumentTypeError(str(error)) from None

        self.takes_value[flag] = True
        group.add_argument(flag, metavar=metavar, type=convert, default=default, required=required, help=text)

    def add_switch(self, group: Any, flags: str, text: str, action: str = "store_true") -> None:
        """Add a flag without a value, and --flag=true and --flag=false, as in the Go plexctl."""
        *short, flag = flags.split()
        self.takes_value.update((each, False) for each in [*short, flag])
        group.add_argument(*short, flag, action=action, default=False, help=text)
        name = flag[2:].replace("-", "_")
        group.add_argument(flag + "=true", dest=name, action=action, help=argparse.SUPPRESS)
        group.add_argument(flag + "=false", dest=name, action="store_false", help=argparse.SUPPRESS)


def create_parser() -> Parser:
    """Create one parser for all flags: those of the command may come before it as well."""
    parser = Parser()
    group = parser.add_argument_group("target")
    parser.add(group, "--project-id", "UUID", parse_uuid, "owning Project (required)", required=True)
    parser.add(group, "--resource-id", "UUID", parse_uuid, "target Resource (required)", required=True)
    parser.add(group, "--host", "HOST", parse_target_host, "target host, as the Node sees it (required)",
               required=True)
    parser.add(group, "--port", "PORT", lambda text: parse_int(text, 1, PORT_MAX),
               "target port, 1 to 65535 (required)", required=True)
    parser.add(group, "--ttl-seconds", "N", lambda text: parse_int(text, 0, 10 ** 9),
               "requested lifetime; 0 (default): the server's default", 0)

    group = parser.add_argument_group("forwarding")
    parser.add_switch(group, "--proxy", "listen locally and forward until the session expires or you press "
                                        "Ctrl-C")
    parser.add_switch(group, "--stdio", "forward one connection over stdin and stdout (for ssh's "
                                        "ProxyCommand)")
    parser.add(group, "--local-addr", "ADDR", parse_local_address, "address to listen on: HOST:PORT or "
               "unix:/path (default 127.0.0.1:0, a free port)")
    parser.add(group, "--wait-seconds", "N", parse_seconds, "how long to wait for the Node to report its "
               "listener (default 90)", 90.0)
    parser.add(group, "--max-sessions", "N", lambda text: parse_int(text, 1, 32), "maximum number of "
               f"sessions, 1 to 32 (default {DEFAULT_MAX_SESSIONS}); each open connection uses one")
    parser.add(group, "--min-sessions", "N", lambda text: parse_int(text, 1, 32),
               "sessions to keep ready (default 1)")
    parser.add_switch(group, "--renew", "issue a new session when one has expired, instead of ending")
    parser.add_switch(group, "--keep-session", "do not revoke sessions on exit")
    parser.add_switch(group, "--allow-other-users", "let other local users use the local port")

    group = parser.add_argument_group("global options", "before or after the command")
    parser.add(group, "--server", "URL", parse_word, "control plane (or PLEXSPHERE_URL, or a profile)")
    parser.add(group, "--profile", "NAME", parse_word, "profile of ~/.config/plexctl/config.json")
    parser.add(group, "--token-file", "PATH", parse_word, "bearer token file, mode 0600; - is stdin "
               "(or PLEXSPHERE_TOKEN, or a profile)")
    parser.add(group, "--ca-file", "PATH", parse_word, "CA bundle to use instead of the system's")
    parser.add_switch(group, "--allow-http", "allow a plain-http server that is not loopback")
    parser.add(group, "--output", "FORMAT", one_of(*FORMATS), "text (default), json or yaml", "text")
    parser.add_switch(group, "--reveal-secrets", "print the session token to stderr, and record that")
    parser.add_switch(group, "-v --verbose", "log requests and connections to stderr", "count")
    parser.add_switch(group, "-q --quiet", "print errors only on stderr")
    parser.add_switch(group, "--yes", "ignored")
    parser.add_switch(group, "--version", "print the version and the SHA-256 of this file")
    parser.add_switch(group, "-h --help", "print this help")
    return parser


def describe_unknown(word: str, flags: Sequence[str]) -> str:
    """Describe an unknown flag, without what may be a secret, and the known one that was probably meant."""
    flag = word.partition("=")[0]
    if re.search(r"\s", flag):
        name = f" ({flag.split()[0]} ...)" if flag.split()[0] in flags else ""
        return (f"several words in one argument{name}: $TARGET must not be quoted, and zsh and fish do not "
                "split it")
    if flag[:2] != "--":
        return "unknown flag " + escape(flag[:2]) + "..." * (len(flag) > 2)
    import difflib
    names = [name for name in flags if name[:2] == "--"]
    alike = ([name for name in names if name.startswith(flag)]
             or difflib.get_close_matches(flag, names, 1, 0.8))
    advice = f"; did you mean {' or '.join(alike)}?" if flag[2:] and alike else ""
    return f"unknown flag {escape(flag, 40)}{advice}"


def describe_unexpected(word: str, has_command: bool) -> str:
    """Describe an argument that is neither a flag, nor a value, nor the command."""
    if has_command:
        return f"unexpected argument{show_word(word)}; put -- before the command to run"
    import difflib
    advice = f" (did you mean {COMMAND}?)" if difflib.get_close_matches(word, [COMMAND]) else ""
    return f"unknown command{show_word(word)}{advice}; {SHORT_USAGE}"


def find_flags(words: Sequence[str], takes_value: Mapping[str, bool]) -> List[str]:
    """Return the flags and their values, without the command; -h or --version alone.

    What argparse would get wrong ends here: it shows the value of an unknown flag, prints our help for
    `psql -h` without `--`, drops a value of `--` (up to 3.12), and does not split -vv (3.6, 3.7).
    """
    flags: List[str] = []
    has_command, wants_value = False, False
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("-h", "--help", "--version") and value in ("", "true"):
            return [flag]
        if word[:1] != "-" or re.fullmatch("-[0-9.]*", word):  # no flag, for argparse either
            if wants_value:
                flags.append(word)
            elif word == COMMAND and not has_command:
                has_command = True
            else:
                raise UsageError(describe_unexpected(word, has_command))
            wants_value = False
            continue
        if re.fullmatch("-[vq]{2,}", word):
            flags += ["-" + letter for letter in word[1:]]
            continue
        if flag not in takes_value:
            raise UsageError(describe_unknown(word, list(takes_value)))
        if value == "--":
            raise UsageError(f"{flag}: must not be --")
        if equals and not takes_value[flag] and value not in ("true", "false"):
            raise UsageError(f"{flag}: must be true or false, or left out")
        flags.append(word)
        wants_value = takes_value[flag] and not equals
    if not has_command:
        raise UsageError(f"no command; {SHORT_USAGE}")
    return flags


def parse_arguments(argv: Sequence[str]) -> Tuple[str, Any]:
    """Return what -h or --version prints, or the options."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = create_parser()
    try:
        flags = find_flags(argv[:end], parser.takes_value)
        if flags == ["--version"]:
            return describe_version(), None
        if flags and flags[0] in ("-h", "--help"):
            return parser.format_help(), None
        options = parser.parse_args(flags)
        options.command = list(argv[end + 1:]) if end < len(argv) else None
        check_together(options)
        return "", options
    except UsageError as error:
        raise UsageError(f"{error} (see plexctl --help)") from None


def check_together(options: argparse.Namespace) -> None:
    """Check flags that exclude or need one another; set `mode` and defaults that depend on others."""
    def given(*flags: str) -> List[str]:
        return [flag for flag in flags if getattr(options, flag[2:].replace("-", "_"))]

    modes = given("--proxy", "--stdio") + ["-- COMMAND"] * (options.command is not None)
    if len(modes) > 1:
        raise UsageError(f"{modes[0]} and {modes[1]} cannot be used together")
    if options.command is not None and not any(options.command[:1]):
        raise UsageError("a command is required after --")
    if modes and os.name != "posix":
        raise UsageError(f"{modes[0]} needs Linux or macOS; on Windows, use WSL")
    options.mode = modes[0] if modes else "print"
    listening = given("--max-sessions", "--min-sessions", "--renew", "--allow-other-users")
    if options.local_addr and (options.stdio or options.local_addr.path):
        listening.append("--local-addr unix:" if options.local_addr.path else "--local-addr")
    if listening and options.mode in ("print", "--stdio"):
        raise UsageError(f"{listening[0]} needs --proxy or -- COMMAND")
    if options.keep_session and not modes:
        raise UsageError("--keep-session needs --proxy, --stdio or -- COMMAND")
    if options.stdio and is_standard_input(options.token_file or ""):
        raise UsageError("--token-file - and --stdio cannot be used together: both read standard input")
    options.max_sessions = options.max_sessions or DEFAULT_MAX_SESSIONS
    options.min_sessions = options.min_sessions or 1
    if options.min_sessions > options.max_sessions:
        raise UsageError(f"--min-sessions must not be more than --max-sessions ({options.max_sessions})")
    if options.server:
        check_server(options.server, "--server", options.allow_http)
    options.local_addr = options.local_addr or LocalAddress("127.0.0.1", 0)


def find_command(name: str, environ: Environ) -> str:
    """Find the program that COMMAND names; exit 127 or 126 like a shell, before anything is issued."""
    path = environ.get("PATH", os.defpath)
    found = shutil.which(name, path=path)
    if found and os.path.isfile(found):
        return found
    if shutil.which(name, os.F_OK, path) or os.path.dirname(name) and os.path.exists(name):
        raise PlexctlError(f"{escape(name)}: cannot be executed", exit_code=EXIT_NOT_EXECUTABLE)
    raise PlexctlError(f"{escape(name)}: command not found", exit_code=EXIT_NOT_FOUND)


class Run:
    """One invocation: the options, and what every mode of it needs."""

    def __init__(self, options: "argparse.Namespace", environ: "Environ", foreground: Foreground,
                 stdout: "Optional[IO[str]]") -> None:
        self.options = options
        self.environ = environ
        self.foreground = foreground
        self.stdout = stdout
        self.request = SessionRequest(options.project_id, options.resource_id, options.host,
                                      options.port, options.ttl_seconds)
        self.report = foreground.report
        if options.mode == "--stdio" and not options.verbose:  # ssh's terminal may be in raw mode
            # of what Sessions says, only what is left behind: see Sessions._revoke and dismiss
            self.report = lambda line: (
                foreground.report(line) if line.startswith("warning: session ") else None)

    def execute(self) -> int:
        """The exit code. PlexctlError and Interrupted leave no session behind either."""
        options, foreground = self.options, self.foreground
        program = find_command(options.command[0], self.environ) if options.command else ""
        server, token = foreground.call(lambda: resolve_credentials(
            options.server, options.profile, options.token_file, options.allow_http, self.environ))
        # in a thread as well: --ca-file may be a pipe
        plane = foreground.call(lambda: ControlPlane(
            server, token, options.ca_file, self.environ,
            report=foreground.report if options.verbose else lambda line: None, notice=self.report))
        self.audit = AuditLog(self.environ, foreground.report) if options.reveal_secrets else None
        self.sessions = Sessions(plane, self.request, self.report, options.max_sessions, options.min_sessions,
                                 options.renew, options.wait_seconds, options.verbose > 0)
        try:
            if options.mode == "print":
                return self.print_coordinates()
            if options.mode == "--stdio":
                return self.carry_stdio()
            return self.forward(program)
        finally:
            foreground.finish(self.sessions.leave, LEAVE_SECONDS)
            for words in self.sessions.left_behind():
                foreground.report("warning: " + words)
            if self.audit is not None:  # not before: an interrupted record may still be on its way
                self.audit.close()

    def establish(self) -> Worker:
        """The first session, and its token where it is to be revealed."""
        began = elapsed_seconds()
        worker: Worker = self.foreground.call(self.sessions.establish, lambda: "waiting for the Node: %s"
                                              % show_seconds(elapsed_seconds() - began))
        issued = worker.issued
        if self.audit is not None and issued is not None:
            audit, token = self.audit, issued.token
            self.foreground.call(lambda: audit.record(self.sessions.plane.server, self.request, issued))
            self.foreground.write("plexctl: warning: the next line is the session token, a secret\n"
                                  "PLEXCTL_SESSION_TOKEN=%s\n" % token.reveal(),
                                  self.foreground.messages.stream, "standard error")
        if self.options.keep_session:
            self.sessions.keep()
        return worker

    def print_document(self, local: LocalAddress, worker: Worker) -> None:
        """The one document of stdout; PlexctlError unless all of it was taken."""
        document = {"session_id": worker.session_id, "kind": "tcp", "local_addr": str(local),
                    "listener_endpoint": str(worker.endpoint),
                    "target": {"host": self.request.host, "port": self.request.port},
                    "expires_at": worker.issued and worker.issued.expires_at}
        width = terminal_width(self.stdout) if self.stdout is not None and self.stdout.isatty() else 0
        self.foreground.write(FORMATS[self.options.output](document, width), self.stdout, "standard output")

    def print_coordinates(self) -> int:
        """Print mode: nothing is bound for longer than a moment, nothing dialled or revoked."""
        local = self.options.local_addr
        if not local.port:
            try:
                with socket.socket(socket.AF_INET6 if ":" in local.host else socket.AF_INET) as sock:
                    sock.bind((local.host, 0))
                    local = LocalAddress(local.host, sock.getsockname()[1])
            except OSError as error:
                raise PlexctlError("--local-addr %s: cannot be bound: %s"
                                   % (local, show_error(error))) from error
        self.print_document(local, self.establish())
        self.sessions.keep()
        return EXIT_OK

    def carry_stdio(self) -> int:
        """--stdio: one connection over descriptors 0 and 1."""
        self.establish()
        load_modules()
        began, streams = elapsed_seconds(), StandardStreams()
        ended: "List[Optional[PlexctlError]]" = []

        def end(connection: Connection, error: "Optional[PlexctlError]") -> None:
            ended.append(streams.error or error)
            self.foreground.waker.wake()

        connection = Connection(streams, end, wants_reason=True)
        self.sessions.put(connection)
        try:
            while not ended or self.sessions.is_delivering():
                self.watch_sessions()
            if ended[0] is not None:
                raise ended[0]
        except Interrupted:
            relay = connection.relay  # a signal after everything was delivered is no failure
            if not relay or not relay.down.is_over or relay.error or streams.error:
                raise
        finally:
            self.sessions.stop()
            if self.options.verbose:
                self.report(describe_total(self.sessions.count(), began, "connection closed"))
        return EXIT_OK

    def forward(self, program: str) -> int:
        """--proxy and -- COMMAND: the local socket is bound first, an address in use costs nothing."""
        options, foreground, began = self.options, self.foreground, elapsed_seconds()
        with Forwarder(options.local_addr, self.sessions, options.allow_other_users) as forwarder:
            forwarder.start()  # connections may come, and wait
            worker = self.establish()
            told, tell_on = "", 0.0
            try:
                load_modules()
                self.tell_systemd("READY=1")
                if program:
                    return self.run_command(program, forwarder)
                forwarder.raise_limit()
                self.print_document(forwarder.local, worker)
                while True:
                    self.watch_sessions()
                    words = self.describe_now(forwarder)
                    foreground.messages.show(words)
                    if words != told and elapsed_seconds() >= tell_on:
                        told, tell_on = words, elapsed_seconds() + STATUS_SECONDS
                        self.tell_systemd("STATUS=" + words)
            finally:
                foreground.ignored = foreground.passed_on = ()
                self.tell_systemd("STOPPING=1")
                foreground.finish(forwarder.stop, CLOSE_SECONDS + 1)
                total = describe_total(self.sessions.count(), began, "COMMAND ended" if program else "")
                if forwarder.unidentified:
                    total += "; %d not served, closed before their owner could be asked for (unix: and " \
                             "--allow-other-users do not ask)" % forwarder.unidentified
                foreground.report(total)

    def watch_sessions(self, seconds: float = TICK_SECONDS) -> None:
        """One turn of waiting; raises what ended the sessions."""
        self.foreground.wait(seconds)
        if self.options.mode == "--stdio":
            self.sessions.tick()
        if self.sessions.over is not None:
            raise self.sessions.over

    def describe_now(self, forwarder: Forwarder) -> str:
        """The live line, what matters most first."""
        counts, left = self.sessions.count(), self.sessions.seconds_left()
        target = escape(join_host_port(self.request.host, self.request.port), 60)
        return "%s%d open, %d waiting, %d ended, %d session%s, %s up, %s down, %s -> %s" % (
            "%s left, " % show_seconds(left) if left else "", counts.open, counts.waiting,
            counts.ended, counts.sessions, "" if counts.sessions == 1 else "s", show_bytes(counts.up),
            show_bytes(counts.down), forwarder.local, target)

    def tell_systemd(self, state: str) -> None:
        """sd_notify(3), for units of Type=notify; a state that cannot be told is a warning."""
        path = self.environ.get("NOTIFY_SOCKET", "")
        try:
            if path[:1] in ("/", "@") and hasattr(socket, "AF_UNIX"):
                send_record("\0" + path[1:] if path[0] == "@" else path, state.encode(), NOTIFY_SECONDS)
        except (OSError, ValueError) as error:
            self.sessions.tell_once("warning: NOTIFY_SOCKET: systemd was not told: %s" % show_error(error))

    def run_command(self, program: str, forwarder: Forwarder) -> int:
        """-- COMMAND: its terminal, Ctrl-C and Ctrl-\\ are its own, other signals are handed on."""
        foreground = self.foreground
        foreground.wait(0)
        foreground.ignored = (signal.SIGINT, getattr(signal, "SIGQUIT", signal.SIGINT))
        foreground.passed_on = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2")
                                     if hasattr(signal, name))
        foreground.messages.flush(HURRY_SECONDS)  # before anything that COMMAND says
        child = self.start_command(program, forwarder.local)
        forwarder.raise_limit()  # after the start of COMMAND, which keeps the limits it was given
        has_port, terminated = True, False
        while child.poll() is None:
            try:
                if has_port:
                    self.watch_sessions()
                else:
                    foreground.wait(TICK_SECONDS)
            except Interrupted as interrupted:
                try:
                    child.send_signal(interrupted.signum)
                except OSError:  # it ended just now, or is another user's by now
                    pass
                if interrupted.signum not in foreground.passed_on:
                    if terminated:
                        raise
                    terminated = True
            except PlexctlError as error:
                foreground.report("warning: %s; the port is closed, COMMAND goes on" % error)
                forwarder.stop()
                has_port = False
        foreground.ignored = foreground.passed_on = ()
        if has_port:  # what COMMAND sent right before its end still arrives
            self.deliver(forwarder)
        status = int(child.returncode)
        return status if status >= 0 else EXIT_SIGNAL_BASE - status

    def deliver(self, forwarder: Forwarder) -> None:
        """Until what clients have sent that are gone has arrived, as long as it moves."""
        forwarder.accept_rest()
        moved, give_up_on = -1, 0.0
        try:
            while self.sessions.is_delivering():
                counts = self.sessions.count()
                if counts.up != moved:
                    moved, give_up_on = counts.up, elapsed_seconds() + CLOSE_SECONDS
                if elapsed_seconds() > give_up_on:
                    break
                self.watch_sessions(DELIVERY_SECONDS)
                forwarder.tick()
            if self.sessions.count().waiting:
                self.foreground.report("warning: COMMAND has ended, and connections still wait for a session")
        except PlexctlError as error:
            self.foreground.report("warning: %s" % error)

    def start_command(self, program: str, local: LocalAddress) -> "Any":
        """Starts COMMAND with its placeholders and environment filled in; wakes us at its end."""
        host, port = (local.path, "") if local.path else (local.host, str(local.port))
        environ = dict(self.environ, PLEXCTL_LOCAL_HOST=host, PLEXCTL_LOCAL_PORT=port,
                       PLEXCTL_LOCAL_ADDR=str(local))
        environ.pop("PLEXSPHERE_TOKEN", None)
        arguments = [re.sub(r"\{(host|port|addr)\}", lambda found: environ[
            "PLEXCTL_LOCAL_" + found.group(1).upper()], argument) for argument in self.options.command]
        try:
            # COMMAND could read the token there, again or, of /dev/stdin, for the first time
            stdin = subprocess.DEVNULL if is_standard_input(self.options.token_file or "") else None
            child = subprocess.Popen(arguments, executable=program, env=environ, stdin=stdin)
        except (OSError, ValueError) as error:
            raise PlexctlError("%s: cannot be executed: %s" % (escape(arguments[0]), show_error(error)),
                               exit_code=EXIT_NOT_EXECUTABLE) from error

        def await_end() -> None:
            child.wait()
            self.foreground.waker.wake()

        start_thread(await_end)  # else run_command sees it at its next turn
        return child


def describe_total(counts: Counts, began: float, reason: str) -> str:
    """The line at the end; if a signal was the reason it is told, an error says its own."""
    error = sys.exc_info()[1]
    if isinstance(error, (Interrupted, PlexctlError)):
        reason = str(error) if isinstance(error, Interrupted) else ""
    return "%d connection%s, %s up, %s down, %s%s" % (
        counts.ended, "" if counts.ended == 1 else "s", show_bytes(counts.up),
        show_bytes(counts.down), show_seconds(elapsed_seconds() - began), reason and ": " + reason)


# ------------------------------------------------------------------------------------------ main

__all__ = [  # what is stable for those who vendor this file
    "ApiError", "ControlPlane", "CredentialsError", "Endpoint", "Forwarder", "IssuedSession", "LocalAddress",
    "PlexctlError", "Secret", "Server", "Session", "SessionOver", "SessionRequest", "Sessions",
    "TransportError", "UsageError", "main", "parse_local_address", "parse_server"]


def reserve_standard_descriptors() -> None:
    """Nothing that is opened later may become descriptor 0, 1 or 2 and be written to by mistake."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            open_nowhere(os.O_RDONLY)  # the lowest free number; writing to it fails


SIGNALS_OF_THE_END = ("SIGINT", "SIGTERM", "SIGHUP")
RARER_SIGNALS = ("SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGVTALRM", "SIGPROF", "SIGIO",
                 "SIGPWR")


def handle_signals(foreground: Foreground) -> "Callable[[], None]":
    """What would end the process goes to the foreground, the third of them ends the process at once.

    Of the rarer ones only those that nobody else in the process has a handler for. Returns what
    puts the handlers back that were there before.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before: "Dict[int, Any]" = {}
    for name in SIGNALS_OF_THE_END + RARER_SIGNALS:
        signum = getattr(signal, name, None)
        if signum is None:
            continue
        current = signal.getsignal(signum)
        if current == signal.SIG_DFL or name in SIGNALS_OF_THE_END and current != signal.SIG_IGN:  # nohup, &
            before[signum] = signal.signal(signum, foreground.handle)
    if hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or COMMAND has no status
    quiet: "Dict[str, Any]" = {"warn_on_full_buffer": False} if sys.version_info >= (3, 7) else {}
    wakeup = signal.set_wakeup_fd(foreground.waker.written.fileno(), **quiet)

    def restore() -> None:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)

    return restore


def perform(argv: "Optional[Sequence[str]]" = None, environ: "Optional[Environ]" = None,
            ends_process: bool = False) -> "Tuple[int, int]":
    """The command, as an exit code and the number of the signal that ended it (0: none)."""
    prints = ""
    try:
        prints, options = parse_arguments(sys.argv[1:] if argv is None else argv)
        if prints:
            write_all(sys.stdout, prints)
            return EXIT_OK, 0
        foreground = Foreground(sys.stderr, options.mode in ("print", "--proxy"))
        restore_handlers = handle_signals(foreground)
    except PlexctlError as error:
        return fail(str(error), error.exit_code), 0
    except Exception as error:  # no descriptors to load a module with, or a library that is damaged
        return fail("cannot %s: %s" % (
            "write to standard output" if prints else "start", show_error(error)), EXIT_FAILURE), 0
    status, signum = EXIT_FAILURE, 0
    try:
        status = Run(options, os.environ if environ is None else environ, foreground, sys.stdout).execute()
    except Interrupted as interrupted:
        signum = interrupted.signum
        status = EXIT_SIGNAL_BASE + signum
    except PlexctlError as error:
        status = error.exit_code
        foreground.report("error: %s" % error)
    except ImportError as error:  # of a module that the standard library loads late
        foreground.report("error: this Python lacks a part of its standard library: %s" % show_error(error))
    except (OSError, MemoryError) as error:
        foreground.report("error: the system refuses: %s" % show_error(error))
    except Exception as error:  # a defect; its text may hold what it was given
        foreground.report("error: internal error, please report it (with -v): %s" % show_error(error))
    finally:
        foreground.messages.flush(HURRY_SECONDS)
        if not ends_process:  # else a late signal would make it look as if it had not come to its end
            restore_handlers()
            foreground.waker.close()
            foreground.messages.stream = None  # what is said late is nobody's
    return status, signum


def fail(message: str, status: int) -> int:
    """The one line of an error."""
    try:
        write_all(sys.stderr, "plexctl: error: %s\n" % message)
    except (OSError, ValueError):
        pass
    return status


def main(argv: "Optional[Sequence[str]]" = None, environ: "Optional[Environ]" = None) -> int:
    """The command. Returns the exit code, 128 + n where signal n ended it; raises nothing."""
    return perform(argv, environ)[0]


def run() -> None:
    """The process: the command, then its end.

    os._exit, since what Python does at exit could still change the status: a flush that fails
    (120), a thread that was given up on and wakes up. Everything is written and closed by then.
    """
    reserve_standard_descriptors()
    try:
        status, signum = perform(ends_process=True)
        if signum:
            end_by_signal(signum)
        os._exit(status)
    except KeyboardInterrupt:  # before the handlers were there
        end_by_signal(2)


if __name__ == "__main__":
    run()
