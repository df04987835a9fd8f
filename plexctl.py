#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""plexctl: one TCP port of one machine behind a plexsphere Node, for as long as it is needed.

    plexctl tcp-forward --project-id UUID --resource-id UUID --host HOST --port PORT

asks the control plane for a one-time mediated session and prints the local address and the
listener endpoint on the Node. With --proxy, --stdio or -- COMMAND it carries the bytes as well,
and revokes the session when it ends.

Exit codes: 0 done; 1 transport or API failure, no listener endpoint, forwarder error, session
over; 2 usage; 3 credentials; 4 forbidden; 77 ReBAC denial; with -- COMMAND the status of COMMAND;
SIGINT, SIGTERM and SIGHUP end the process by that same signal, after the session is revoked.

One file, standard library only, Python 3.6 to 3.15. Read it from the top: a section uses only
those above it.
"""
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # the directory of the script: another user's argparse.py may lie in /tmp

import errno
import gc
import os
import time

if __name__ == "__main__":
    gc.disable()  # while modules load it takes 2 ms and finds nothing; the modes that stay enable it

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would take as long as compiling half of this file
    import argparse
    import collections
    import datetime
    import email.utils
    import hashlib
    import http.client
    import json
    import logging
    import mmap
    import pwd
    import re
    import resource
    import select
    import selectors
    import shutil
    import signal
    import socket
    import socketserver
    import ssl
    import stat
    import struct
    import subprocess
    import threading
    import urllib.request
    from typing import (Any, Callable, Dict, IO, List, Mapping, NoReturn, Optional, Sequence, Set, Tuple)

    Environ = Mapping[str, str]
    Report = Callable[[str], None]  # takes a line for people, from any thread


class LazyModule:
    """A module that is loaded at its first use, and takes this one's place then.

    --help must not wait for ssl and urllib, which take longer than all else.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> "Any":
        try:
            module = __import__(self._name)
        except (ImportError, OSError) as error:  # it is not there, or there are no descriptors left
            raise MissingModule("this Python cannot load its module %s: %s%s" % (
                getattr(error, "name", None) or self._name, escape(getattr(error, "msg", show_error(error))),
                "; install its whole standard library (Debian, Ubuntu: apt install python3), with OpenSSL "
                "where it is built from source" if isinstance(error, ModuleNotFoundError) else "")) from error
        globals()[module.__name__] = module
        return getattr(module, attribute)


LAZY_MODULES = (
    "argparse", "collections", "datetime", "email.utils", "hashlib", "http.client", "json", "logging",
    "mmap", "pwd", "re", "resource", "select", "selectors", "shutil", "signal", "socket", "socketserver",
    "ssl", "stat", "struct", "subprocess", "threading", "urllib.request")
globals().update((name.partition(".")[0], LazyModule(name)) for name in LAZY_MODULES)

__version__ = "0.1.0"

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
LEAVE_SECONDS = 10
SYSLOG_SECONDS = 2
CLOSE_SECONDS = 2
HURRY_SECONDS = 1.0  # what a second signal leaves of the time to revoke
ISSUE_ATTEMPTS = 3
RETRY_AFTER_MAX_SECONDS = 5
POLL_MIN_SECONDS = 0.5
POLL_MAX_SECONDS = 3.0
RECHECK_SECONDS = 60  # the reconcile period of a Node
WARN_LEFT_SECONDS = (300, 60)
BODY_MAX_BYTES = 1024 * 1024
SECRET_FILE_MAX_BYTES = 64 * 1024
TOKEN_MAX_CHARACTERS = 8192
SHOWN_MAX_CHARACTERS = 300


# ---------------------------------------------------------------------------------------- errors


class PlexctlError(Exception):
    """Anything that ends the command with one line on stderr.

    `exit_code` is the process's exit status; `passing`: the same may well succeed a little later;
    `may_exist`: a session may have been issued all the same.
    """

    exit_code = EXIT_FAILURE
    passing = False
    may_exist = False

    def __init__(self, message: str, exit_code: "Optional[int]" = None, **facts: "Any") -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code
        vars(self).update(facts)


class MissingModule(PlexctlError, ImportError):
    """A module of the standard library that cannot be loaded; found out at its first use."""


class UsageError(PlexctlError):
    """A flag, an environment variable or a URL that cannot be used."""

    exit_code = EXIT_USAGE


class CredentialsError(PlexctlError):
    """No credentials, or some that are not safe to use."""

    exit_code = EXIT_CREDENTIALS


class TransportError(PlexctlError):
    """No usable answer of the control plane."""


class ApiError(PlexctlError):
    """The control plane answered with an error. `status` is HTTP's, `code` the problem's.

    `retry_after_seconds` is None where the server did not say.
    """

    status = 0
    code = ""
    retry_after_seconds: "Optional[float]" = None


class Cancelled(PlexctlError):
    """A question whose answer nobody waits for any more: the run is ending."""


class SessionOver(PlexctlError):
    """The session expired, was revoked, or is no longer active for another reason."""


class Interrupted(Exception):
    """The first SIGINT, SIGTERM or SIGHUP; raised where the main thread waits, nowhere else."""

    def __init__(self, signum: int) -> None:
        super().__init__("ended by " + signal.Signals(signum).name)
        self.signum = signum


# ---------------------------------------------------------------------------------------- system

# CLOCK_BOOTTIME counts suspend on Linux (7; Python names it from 3.7 on); on macOS
# CLOCK_MONOTONIC does. On Windows time.monotonic() does.
_CLOCK = 7 if sys.platform.startswith("linux") else getattr(time, "CLOCK_MONOTONIC", None)


def elapsed_seconds() -> float:
    """A clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(_CLOCK) if _CLOCK is not None else time.monotonic()


def start_thread(function: "Callable[..., object]", *arguments: "Any") -> bool:
    """Runs it in a thread that does not keep the process alive; False if there are no more threads."""
    try:
        threading.Thread(target=function, args=arguments, daemon=True).start()
        return True
    except RuntimeError:
        return False


def send_datagram(path: str, data: bytes, seconds: float) -> None:
    """Sends it to a unix socket; OSError where that does not take it in time.

    A stream socket, as some syslogs have, gets a NUL behind it, which ends a record there.
    """
    for kind, end in ((socket.SOCK_DGRAM, b""), (socket.SOCK_STREAM, b"\0")):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.settimeout(seconds)
            try:
                sock.connect(path)
            except OSError as error:
                if error.errno == errno.EPROTOTYPE and kind == socket.SOCK_DGRAM:
                    continue
                raise
            sock.sendall(data + end)
            return


# ---------------------------------------------------------------------------------------- values

DIGITS = frozenset("0123456789")
PORT_MAX = 65535
JSON_INT_MAX_DIGITS = 4300  # newer Pythons refuse more; 3.6 takes a quarter of a minute for 1 MiB
HOST_MAX_CHARACTERS = 253  # RFC 1035, section 2.3.4, as text
SOCKET_PATH_MAX_BYTES = 100  # sun_path has 104 on macOS, 108 on Linux
UUID_PATTERN = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
NAME_PATTERN = r"(?a)(?:LABEL\.)*(?!0[xX]|[0-9]+\.?\Z)LABEL\.?".replace("LABEL", r"\w(?:[\w-]{0,61}\w)?")
URL_PATTERN = r"(?=[!-~]*\Z)" \
    r"(?i:(https?))://(\[[0-9a-fA-F:.]+\]|[^\[\]/:?#@\\]+)(?::([0-9]{1,5}))?(/[^?#\\]*)?"
TIME_PATTERN = r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-5][0-9]|60)" \
    r"(\.[0-9]{1,9})?(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
LOOPBACK_NAMES = frozenset("localhost localhost4 localhost6 ip6-localhost ip6-loopback".split())
MAPPED_PREFIX = b"\0" * 10 + b"\xff\xff"  # RFC 4291, section 2.5.5.2
TEREDO_PREFIX = b"\x20\x01\0\0"  # RFC 4380, section 4; the IPv4 address in it is inverted
EMBEDDED_IPV4 = (  # the beginning of an IPv6 address, and where an IPv4 address stands in it then
    (b"\0" * 12, 12),  # compatible: RFC 4291, section 2.5.5.1
    (b"\0" * 8 + b"\xff\xff\0\0", 12),  # translated: RFC 2765, section 2.1
    (b"\0\x64\xff\x9b" + b"\0" * 8, 12),  # NAT64: RFC 6052, section 2.1
    (b"\x20\x02", 2))  # 6to4: RFC 3056, section 2


def escape(text: str, limit: int = SHOWN_MAX_CHARACTERS) -> str:
    """`text` as printable ASCII, cut to `limit` characters: foreign text cannot drive a terminal."""
    shown = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in shown)


def parse_uuid(text: str) -> str:
    """The canonical 8-4-4-4-12 form (RFC 9562, section 4), in lower case."""
    if not re.fullmatch(UUID_PATTERN, text):
        raise ValueError("must be a UUID of 8-4-4-4-12 hexadecimal digits")
    return text.lower()


def parse_int(text: str, low: int, high: int) -> int:
    """Plain ASCII digits, `low` to `high`."""
    if not re.fullmatch("[0-9]{1,18}", text) or not low <= int(text) <= high:
        raise ValueError("must be a whole number from %d to %d" % (low, high))
    return int(text)


def parse_port(text: str) -> int:
    """A TCP port that something can listen on."""
    return parse_int(text, 1, PORT_MAX)


def parse_seconds(text: str) -> float:
    """A number of seconds, 0 or more: digits with perhaps a decimal point."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError("must be a number of seconds, 0 or more")
    return float(text)


def one_of(*words: str) -> "Callable[[str], str]":
    """A parser that takes just these words."""
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("must be one of " + ", ".join(words))
        return text
    return parse


def parse_target_host(text: str) -> str:
    """A target host as the Node will see it: printable, no white space."""
    if not text.strip():
        raise ValueError("must not be empty")
    if len(text) > HOST_MAX_CHARACTERS or not text.isprintable() or " " in text:
        raise ValueError("must be a host name or address without white space")
    if text.count(":") == 1:
        raise ValueError("must be a host alone; its port goes in --port")
    return text


def is_name(host: str) -> bool:
    """A DNS name whose last label cannot be taken for a number (RFC 1123, section 2.1)."""
    return len(host) <= HOST_MAX_CHARACTERS and bool(re.fullmatch(NAME_PATTERN, host))


def pack_address(host: str) -> bytes:
    """The 4 or 16 bytes of an IP address literal; b"" for anything else.

    connect() takes 127.1, 0 and 010.0.0.1 for addresses; inet_pton does not.
    """
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):
        return b""
    return packed[12:] if packed.startswith(MAPPED_PREFIX) else packed


def is_loopback(host: str) -> bool:
    """Whether `host` (a literal or a name) can only be this machine."""
    packed = pack_address(host)
    return (host.lower().rstrip(".") == "localhost" or packed[:1] == b"\x7f" and len(packed) == 4
            or packed == b"\0" * 15 + b"\1")


def is_own_name(host: str) -> bool:
    """Whether a name is one of this host's. Nothing is looked up."""
    own = socket.gethostname().lower()
    name = host.lower().rstrip(".")
    label, _, domain = name.partition(".")
    return (name in (own, own.partition(".")[0]) or name.endswith(".localhost")
            or label in LOOPBACK_NAMES and (not domain or domain.startswith("localdomain")))


def is_dialable(host: str, from_loopback: bool = False) -> bool:
    """Whether a listener endpoint may be at `host`, a name or an address.

    Not on this machine, no multicast, no Teredo, nothing link-local (169.254/16, where clouds keep
    their metadata service, fe80::/10), nor an IPv6 address in which such an IPv4 address stands.
    `from_loopback`: the control plane is on this machine, and so may be the Node; what is
    link-local stays refused, since a control plane behind `ssh -L` is on loopback, too.
    """
    packed = pack_address(host.partition("%")[0])  # getaddrinfo gives fe80::1%eth0
    if not packed:
        return from_loopback or not is_own_name(host)
    found = [packed]
    if len(packed) == 16:
        found += [packed[at:at + 4] for prefix, at in EMBEDDED_IPV4 if packed.startswith(prefix)]
    for each in found:
        is_ipv4 = len(each) == 4
        if each.startswith(b"\xa9\xfe" if is_ipv4 else TEREDO_PREFIX) \
                or not is_ipv4 and b"\xfe\x80" <= each[:2] <= b"\xfe\xbf":
            return False
        is_here = each[:1] == b"\x7f" if is_ipv4 else each == b"\0" * 15 + b"\1"
        is_multicast = each[:1] >= (b"\xe0" if is_ipv4 else b"\xff")
        if not from_loopback and (is_here or is_multicast or not any(each)):
            return False
    return True


def join_host_port(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address (RFC 3986, section 3.2.2)."""
    return "%s:%d" % ("[%s]" % host if ":" in host and host[0] != "[" else host, port)


class Record:
    """Named fields, in the order of the annotations: what dataclasses (3.7) would be used for."""

    def __init__(self, *values: "Any", **named: "Any") -> None:
        fields = type(self).__annotations__
        vars(self).update(zip(fields, values), **named)
        if len(values) > len(fields) or vars(self).keys() - fields.keys() \
                or not all(hasattr(self, name) for name in fields):
            raise TypeError("%s takes %s" % (type(self).__name__, ", ".join(fields)))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)


class Endpoint(Record):
    """A host and a port that passed the strict parsers. `str()` gives host:port."""

    host: str
    port: int

    def __str__(self) -> str:
        return join_host_port(self.host, self.port)


def parse_endpoint(text: str, lowest_port: int = 1) -> Endpoint:
    """host:port or [IPv6]:port; the host an address literal or a DNS name; no 127.1, no 0."""
    left, _, port = text.rpartition(":")
    host = left[1:-1] if left.startswith("[") and left.endswith("]") else left
    has_brackets = host != left
    if len(port) > 5 or has_brackets != (":" in host) or not (is_name(host) or pack_address(host)):
        raise ValueError("must be host:port, with brackets around an IPv6 address")
    return Endpoint(host, parse_int(port, lowest_port, PORT_MAX))


class LocalAddress(Record):
    """Where the operator's side listens: a literal address and a port, or a unix socket's path."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        return "unix:" + self.path if self.path else join_host_port(self.host, self.port)


def parse_local_address(text: str) -> LocalAddress:
    """127.0.0.1:0, [::1]:0 or unix:/path. `localhost` is taken for 127.0.0.1, so it stays literal."""
    scheme, _, path = text.partition(":")
    if scheme == "unix":
        if path[:1] != "/" or not path.isprintable() or len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
            raise ValueError("must be unix: and an absolute path of at most %d bytes" % SOCKET_PATH_MAX_BYTES)
        return LocalAddress("", 0, path)
    try:
        endpoint = parse_endpoint(text, lowest_port=0)
    except ValueError:
        endpoint = Endpoint("", 0)
    host = "127.0.0.1" if endpoint.host.lower() == "localhost" else endpoint.host
    if not pack_address(host):
        raise ValueError("must be ADDRESS:PORT, [ADDRESS]:PORT or unix:/path; a literal address, "
                         "port 0 to %d" % PORT_MAX)
    return LocalAddress(host, endpoint.port)


class Server(Record):
    """A control plane's address. `prefix` has no slash at its end; `str()` gives the URL."""

    scheme: str
    host: str
    port: int
    prefix: str

    def __str__(self) -> str:
        return "%s://%s%s" % (self.scheme, join_host_port(self.host, self.port), self.prefix)

    def same_origin(self, other: "Server") -> bool:
        """Same scheme, host and port (RFC 6454, section 5)."""
        return ((self.scheme, self.host.lower(), self.port)
                == (other.scheme, other.host.lower(), other.port))


def parse_server(text: str, allow_http: bool) -> Server:
    """An absolute https URL; http only for loopback, or where `allow_http` says so."""
    found = re.fullmatch(URL_PATTERN, text)
    if not found:
        raise ValueError("must be an absolute https:// URL without user info, query, fragment "
                         "or white space")
    scheme, host, port, prefix = found.groups("")
    scheme = scheme.lower()
    try:
        endpoint = parse_endpoint("%s:%s" % (host, port or (443 if scheme == "https" else 80)))
    except ValueError:
        raise ValueError("has no valid host and port") from None
    if scheme == "http" and not allow_http and not is_loopback(endpoint.host):
        raise ValueError("must be https:// (plain http is for loopback; --allow-http permits it)")
    return Server(scheme, endpoint.host, endpoint.port, prefix.rstrip("/"))


def parse_time(text: str) -> float:
    """An RFC 3339 date-time, as seconds since the epoch. A leap second counts as the one before."""
    found = re.fullmatch(TIME_PATTERN, text)
    if not found:
        raise ValueError("is not an RFC 3339 time")
    parts = found.groups("0")
    year, month, day, hour, minute, second = map(int, parts[:6])
    fraction, sign, zone_hours, zone_minutes = parts[6:]
    moment = datetime.datetime(year, month, day, hour, minute, min(second, 59),
                               tzinfo=datetime.timezone.utc)
    offset = int(zone_hours) * 3600 + int(zone_minutes) * 60
    return moment.timestamp() + float(fraction) + (offset if sign == "-" else -offset)


def parse_json(raw: bytes) -> "Any":
    """Strict JSON (RFC 8259): UTF-8, no NaN, no duplicate keys, no lone surrogates."""
    def unique(pairs: "List[Tuple[str, Any]]") -> "Dict[str, Any]":
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("duplicate key")
        return fields

    def bounded(digits: str) -> int:
        if len(digits) > JSON_INT_MAX_DIGITS:
            raise ValueError("too many digits")
        return int(digits)

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=bounded)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return document
    except (ValueError, RecursionError, MemoryError):
        pass  # raised below: the context of an exception would hold the text
    raise ValueError("not valid JSON")


def show_bytes(count: int) -> str:
    """A byte count for people: 512 B, 1.5 KiB, 3.2 GiB."""
    power = min(4, max(0, count.bit_length() - 1) // 10)
    return "%.1f %siB" % (count / 1024 ** power, " KMGT"[power]) if power else "%d B" % count


def show_seconds(seconds: float) -> str:
    """A duration for people: 5s, 2m05s, 1h02m."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    if minutes >= 60:
        return "%dh%02dm" % divmod(minutes, 60)
    return "%dm%02ds" % (minutes, rest) if minutes else "%ds" % rest


def show_error(error: BaseException) -> str:
    """Why something failed, without what it was given: a message may hold a header or a body."""
    kind = type(error).__name__
    reason = getattr(error, "reason", None)  # URLError's and SSLError's
    if isinstance(reason, BaseException):
        return show_error(reason)
    verify_message = getattr(error, "verify_message", None)
    if verify_message:
        return "certificate not trusted: " + escape(verify_message)
    if reason == "CERTIFICATE_VERIFY_FAILED":  # 3.6 has no verify_message
        return "certificate not trusted"
    if kind == "CertificateError":  # 3.6; a ValueError there
        return "certificate not trusted: it is for another host name"
    if kind == "SSLError" and reason:
        return "TLS failed: " + escape(reason.replace("_", " ").lower())
    _, by_proxy, answer = str(error).partition("Tunnel connection failed: ")  # http.client's words
    if by_proxy and kind == "OSError":
        return "the proxy refused: " + escape(answer)
    if isinstance(error, OSError) and error.strerror and "SSL" not in kind:
        return escape(error.strerror)
    return "timed out" if kind in ("timeout", "TimeoutError") else kind


# ----------------------------------------------------------------------------------- credentials

CONFIG_SHAPE = ('{"default": "prod", "profiles": {"prod": '
                '{"server": "https://plexsphere.example.com", "token": "psk_..."}}}')
OPEN_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # Windows has neither
OTHERS_BITS = 0o077
OTHERS_WRITE_BITS = 0o022
READ_RETRY_SECONDS = 0.05


class Secret:
    """A string that does not show itself: `repr` and `str` are masked, `reveal()` is the way in.

    `source` says where it came from, for messages.
    """

    __slots__ = ("_value", "source")

    def __init__(self, value: str, source: str = "") -> None:
        self._value = value
        self.source = source

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> "NoReturn":
        raise TypeError("a Secret is not pickled or copied")


def parse_token(raw: bytes, source: str) -> Secret:
    """A bearer token: one line end is dropped, the rest is 1 to 8192 characters of \\x21-\\x7e."""
    kept = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1] if raw.endswith(b"\n") else raw
    if not 1 <= len(kept) <= TOKEN_MAX_CHARACTERS or not set(kept) <= set(range(0x21, 0x7F)):
        raise CredentialsError("%s: must hold one token of 1 to %d printable ASCII characters, and "
                               "nothing else" % (source, TOKEN_MAX_CHARACTERS))
    return Secret(kept.decode("ascii"), source)


def find_file_fault(status: os.stat_result, bits: int) -> str:
    """What speaks against a file that only we, or root, should have these permission bits for."""
    if os.name != "posix":
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return "is owned by uid %d, must be yours or root's" % status.st_uid
    mode = stat.S_IMODE(status.st_mode)
    return "has mode %04o, others may use it; chmod 600" % mode if mode & bits else ""


def is_standard_input(path: str) -> bool:
    """Whether it names the file that is descriptor 0: "-", /dev/stdin, or whatever was redirected."""
    try:
        return path == "-" or os.path.samestat(os.stat(path), os.fstat(0))
    except (OSError, ValueError):
        return False


def read_limited(descriptor: int, source: str) -> bytes:
    """All of it, up to SECRET_FILE_MAX_BYTES."""
    raw = b""
    while len(raw) <= SECRET_FILE_MAX_BYTES:
        try:
            piece = os.read(descriptor, SECRET_FILE_MAX_BYTES + 1 - len(raw))
        except BlockingIOError:  # a pipe whose writer takes its time
            time.sleep(READ_RETRY_SECONDS)
            continue
        except OSError as error:
            raise CredentialsError("%s: cannot be read: %s" % (source, show_error(error))) from error
        if not piece:
            return raw
        raw += piece
    raise CredentialsError("%s: is larger than %d bytes" % (source, SECRET_FILE_MAX_BYTES))


def read_secret_file(path: str, source: str) -> bytes:
    """Reads a file that nobody else can read or replace; "-" is standard input.

    It is opened first and then judged by its descriptor, so that nothing can be swapped in
    between; non-blocking, since a FIFO without a writer would block `open` for ever. The file that
    is descriptor 0, by whatever name, is read there: opened once more it would start anew, and
    all of it would be left for --stdio or COMMAND to give away.
    """
    at_stdin = is_standard_input(path)
    try:
        descriptor = os.dup(0) if at_stdin else os.open(path, os.O_RDONLY | OPEN_AT_ONCE)
    except (OSError, ValueError) as error:
        raise CredentialsError("%s: cannot be opened: %s" % (source, show_error(error))) from error
    try:
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)
        if not (is_file or at_stdin or stat.S_ISFIFO(status.st_mode)):
            raise CredentialsError("%s: must be a regular file or a pipe" % source)
        if path != "-" and (is_file or not at_stdin):
            fault = find_file_fault(status, OTHERS_BITS)
            if fault:
                raise CredentialsError("%s: %s" % (source, fault))
        if path != "-" and is_file:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return read_limited(descriptor, source)
    finally:
        os.close(descriptor)


class Profile(Record):
    """One entry of the config file: server URL and token, either may be missing ("", None)."""

    server: str = ""
    token: "Optional[Secret]" = None


def base_directory(variable: str, below_home: str, environ: "Environ") -> str:
    """An XDG base directory, "" where there is none (freedesktop.org, XDG Base Directory)."""
    given = environ.get(variable, "")
    if os.path.isabs(given):
        return given
    home = environ.get("HOME") or os.path.expanduser("~")
    return os.path.join(home, below_home) if os.path.isabs(home) else ""


def is_object(value: "Any", **types: type) -> bool:
    """Whether this is a JSON object with no fields but these, each of its type."""
    return isinstance(value, dict) and all(isinstance(value[name], types.get(name, ())) for name in value)


def read_profile(name: str, environ: "Environ") -> Profile:
    """The profile called `name`, or for "" the config file's default one; an empty one if there is none."""
    base = base_directory("XDG_CONFIG_HOME", ".config", environ)
    path = os.path.join(base, "plexctl", "config.json")
    source = "config file " + escape(path)
    try:
        os.lstat(path if base else "")
    except (FileNotFoundError, NotADirectoryError):
        if name:
            raise CredentialsError("--profile: no such profile, there is no %s" % source) from None
        return Profile()
    except OSError:  # read_secret_file says why
        pass
    try:
        document = parse_json(read_secret_file(path, source))
    except ValueError:
        document = None
    profiles = document.get("profiles") if is_object(document, default=str, profiles=dict) else None
    if profiles is None or not all(is_object(entry, server=str, token=str) for entry in profiles.values()):
        raise CredentialsError("%s: must have the shape %s" % (source, CONFIG_SHAPE))
    wanted = name or document.get("default")
    if not wanted:
        return Profile()
    entry = profiles.get(wanted)
    if entry is None:
        raise CredentialsError("%s: has no such profile as %s names, but %s" % (
            source, "--profile" if name else '"default"',
            escape(", ".join(sorted(profiles))) or "none at all"))
    token = entry.get("token")
    if token is not None:
        token = parse_token(token.encode("utf-8"), "token of a profile in " + source)
    return Profile(entry.get("server", ""), token)


def check_server(text: str, source: str, allow_http: bool) -> Server:
    """parse_server, as a UsageError that names the source."""
    try:
        return parse_server(text, allow_http)
    except ValueError as error:
        raise UsageError("%s: %s" % (source, error)) from None


def resolve_credentials(server_flag: "Optional[str]", profile_flag: "Optional[str]",
                        token_file: "Optional[str]", allow_http: bool,
                        environ: "Environ") -> "Tuple[Server, Secret]":
    """Server and bearer token, the first of each that is given in the order of the tables below.

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

    def from_file(path: str) -> Secret:
        # a name under which there is nothing may be the token itself, given by mistake
        name = "--token-file " + escape(path) if os.path.lexists(path) else "--token-file"
        return parse_token(read_secret_file(path, name), name)

    def from_variable(value: str) -> Secret:
        return parse_token(value.encode("utf-8", "surrogateescape"), "PLEXSPHERE_TOKEN")

    def from_profile(profile: Profile) -> "Optional[Secret]":
        if profile.token and not (profile.server and check_server(
                profile.server, "server of the profile", allow_http).same_origin(server)):
            raise CredentialsError("the token of a profile goes only to that profile's own server; "
                                   "give --token-file for another one")
        return profile.token

    tokens: Tuple[Tuple[Any, Callable[[Any], Optional[Secret]]], ...] = (
        (token_file, from_file), (named, from_profile), (variable, from_variable), (default, from_profile))
    for given, take in tokens:
        token = take(given) if given else None
        if token is not None:
            return server, token
    raise CredentialsError("no credentials: give --token-file, a profile, or PLEXSPHERE_TOKEN")


# --------------------------------------------------------------------------------- control plane

ISSUE = "IssueSession"
SUCCESS = range(200, 300)
JITTER_SECONDS = 0.2
CANCEL_POLL_SECONDS = 0.1
SESSION_TOKEN_PATTERN = r"[!-~]{1,65536}"
FINDABLE_CHARACTERS = 8  # of a secret; a shorter one is in any text


class Session(Record):
    """What GetSession returns (schema Session), the fields that matter here."""

    session_id: str
    status: str  # active, revoked, expired
    issued_at: float  # seconds since the epoch, by the server's clock; 0: not told
    listener_endpoint: "Optional[Endpoint]"  # None until the Node has reported it
    revoke_reason: str  # "" where there is none


class IssuedSession(Record):
    """What IssueSession returns (schema IssuedSession), checked."""

    session_id: str
    token: Secret  # the one-time session token
    expires_at: str  # RFC 3339, as the server wrote it
    lifetime_seconds: float  # by the server's own clock
    issued_on: float  # elapsed_seconds() when it was asked for
    session: Session
    listener_endpoint: "Optional[Endpoint]"


class SessionRequest(Record):
    """What an operator asks for (schema IssueSessionRequest, kind tcp)."""

    project_id: str
    resource_id: str
    host: str
    port: int
    ttl_seconds: int = 0  # 0: the server's default


class Answer(Record):
    """One HTTP answer."""

    status: int
    headers: "Any"  # email.message.Message
    body: bytes


class Exchange:
    """One request and its answer, in a thread that can be given up on.

    A time-out of urllib's is for each recv, and looking a name up has none at all. `operation` and
    `peer` are for messages; `sent`: the server may have the request.
    """

    def __init__(self, operation: str, peer: str) -> None:
        self.sent = False
        self._operation = operation
        self._peer = peer
        self._abandoned = False
        self._socket: Any = None
        self._outcome: Any = None  # an Answer or a PlexctlError
        self._done = threading.Event()

    def run(self, opener: "Any", request: "Any", seconds: float,
            cancel: "Optional[threading.Event]") -> Answer:
        """The answer, within `seconds`; TransportError if there is none, Cancelled once `cancel` is set."""
        request.exchange = self
        if not start_thread(self._carry_out, opener, request):
            self._carry_out(opener, request)  # no more threads; the limits are those of each recv, then
        deadline = elapsed_seconds() + seconds
        while not self._done.wait(max(0.0, min(CANCEL_POLL_SECONDS, deadline - elapsed_seconds()))):
            if cancel is not None and cancel.is_set():
                self._abandon()
                raise Cancelled("%s: given up, the run is ending" % self._operation)
            if elapsed_seconds() >= deadline:
                self._abandon()
                raise self._fail("timed out after %.3g s" % seconds, True)
        if isinstance(self._outcome, PlexctlError):
            raise self._outcome
        return self._outcome  # type: ignore[no-any-return]

    def open_socket(self, address: "Tuple[str, int]", *arguments: "Any") -> "socket.socket":
        """A connected socket for http.client, in the exchange's thread."""
        host: Any = address[0].encode("ascii")  # for a str, getaddrinfo loads the IDNA codec, 1 ms
        sock = socket.create_connection((host, address[1]), *arguments)
        # a duplicate is kept: ssl detaches the original, http.client forgets it after the head
        self._socket = sock.dup()
        if self._abandoned:  # the caller was told that nothing was sent
            sock.close()
            raise TimeoutError
        return sock

    def _carry_out(self, opener: "Any", request: "Any") -> None:
        try:
            with opener.open(request, timeout=CONNECT_SECONDS) as response:
                self._outcome = self._read(response)
        except PlexctlError as error:
            self._outcome = error
        except Exception as error:  # OSError, HTTPException, ValueError, RecursionError, MemoryError, ...
            # made here and raised elsewhere: the context of an exception would hold the request
            reason = show_error(error)
            if re.search("issuer|self.signed", reason):
                reason += " (--ca-file names another CA)"
            # another attempt makes no certificate good
            self._outcome = self._fail(reason, not reason.startswith(("certificate", "TLS failed")))
        finally:
            if self._socket is not None:
                self._socket.close()
            self._done.set()

    @staticmethod
    def _read(response: "Any") -> Answer:
        body = b""
        try:
            body = response.read(BODY_MAX_BYTES + 1)
            if len(body) > BODY_MAX_BYTES:
                raise OverflowError
            if response.length:  # read(n) hides that fewer bytes came than were promised
                raise http.client.IncompleteRead(b"")
        except Exception:  # the status of an error counts also without its body
            if response.status in SUCCESS:
                raise
            body = b""
        return Answer(response.status, response.headers, body)

    def _fail(self, reason: str, passing: bool) -> TransportError:
        tried = "no complete answer from" if self.sent else "cannot connect to"
        return TransportError("%s: %s %s: %s" % (self._operation, tried, self._peer, reason),
                              passing=passing, may_exist=self.sent and self._operation == ISSUE)

    def _abandon(self) -> None:
        """Wakes the thread by shutting its socket down."""
        self._abandoned = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except (OSError, AttributeError):  # not open any more, or not yet
            pass


def load_hashlib() -> None:
    """For urllib.request; it logs a traceback to stderr for each digest that is missing (fips)."""
    if "logging" not in sys.modules:  # a logging that others have set up is not ours to quieten
        sys.modules["logging"] = type("Quiet", (), {"exception": lambda *words: None})  # type: ignore
        try:
            hasattr(hashlib, "new")  # loads it
        finally:
            del sys.modules["logging"]


def find_proxy(server: Server, environ: "Environ") -> str:
    """The proxy URL for an https server, "" for none: HTTPS_PROXY unless NO_PROXY names the host."""
    if server.scheme != "https":  # it would see the bearer token
        return ""
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY") or ""
    exempt = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if not proxy or urllib.request.proxy_bypass_environment(  # type: ignore[attr-defined]
            join_host_port(server.host, server.port), {"no": exempt}):
        return ""
    if not re.fullmatch(r"(?i)http://[!-~]+", proxy):  # urllib takes any other for plain CONNECT
        raise UsageError("HTTPS_PROXY: must be an http:// URL")
    return proxy


def create_tls_context(ca_file: "Optional[str]") -> "Any":
    """Certificates and host names verified, TLS 1.2 at least; no way to turn it off."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        source = "--ca-file %s: not a usable PEM bundle" % escape(ca_file) if ca_file else (
            "TLS cannot be set up (see SSL_CERT_FILE and SSLKEYLOGFILE)")
        raise UsageError("%s: %s" % (source, show_error(error))) from error
    if hasattr(ssl, "TLSVersion"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def create_opener(server: Server, ca_file: "Optional[str]", proxy: str) -> "Any":
    """A urllib opener that knows one scheme, follows no redirect and raises on no status.

    Put together by hand: the default one carries the bearer token to wherever a redirect points,
    to the proxy of plain http, and opens file: URLs; from 3.12 on it loads the CA bundle for http.
    """
    secure = server.scheme == "https"
    keywords = {"context": create_tls_context(ca_file)} if secure else {}
    base: Any = http.client.HTTPSConnection if secure else http.client.HTTPConnection

    class Response(http.client.HTTPResponse):
        def _read_status(self) -> "Any":
            """Reads interim answers over (RFC 9110, section 15.2); http.client does so with 100 alone."""
            while True:
                found = super()._read_status()  # type: ignore[misc]
                if not 100 <= found[1] < 200 or found[1] == http.client.SWITCHING_PROTOCOLS:
                    return found
                http.client.parse_headers(self.fp)

    class Connection(base):  # type: ignore[misc]
        response_class = Response

        def __init__(self, host: str, exchange: Exchange, **more: "Any") -> None:
            super().__init__(host, **more)
            self._exchange = exchange
            self._create_connection = exchange.open_socket

        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(EXCHANGE_SECONDS)
            self._exchange.sent = True

    class Handler(urllib.request.AbstractHTTPHandler):
        def carry(self, request: "Any") -> "Any":
            return self.do_open(Connection, request, exchange=request.exchange, **keywords)  # type: ignore

        http_open = https_open = carry
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    opener = urllib.request.OpenerDirector()
    opener.addheaders = [("User-Agent", "plexctl/" + __version__)]
    opener.add_handler(Handler())
    if proxy:
        opener.add_handler(urllib.request.ProxyHandler({"https": proxy}))
    return opener


def conceal(text: str, secrets: "List[Secret]") -> str:
    """`text` without the secrets in it: a server may repeat what it was sent, in either case."""
    for value in [secret.reveal() for secret in secrets]:
        if len(value) >= FINDABLE_CHARACTERS and value.lower() in text.lower():
            text = re.sub(re.escape(value), "(secret)", text, flags=re.IGNORECASE)
    return text


class Fields:
    """The fields of one JSON object of an answer, each checked as it is taken."""

    def __init__(self, operation: str, document: "Any", secrets: "List[Secret]") -> None:
        self._operation = operation
        self._document = document if isinstance(document, dict) else {}
        self._secrets = secrets

    def bad(self, name: str, why: str = "") -> TransportError:
        """The error for this field."""
        return TransportError("%s: the answer has no valid %s%s" % (self._operation, name, why))

    def take(self, name: str, parse: "Callable[[Any], Any]", kind: type = str) -> "Any":
        """A required field of this kind, as `parse` (which raises ValueError) makes it."""
        value = self._document.get(name)
        if isinstance(value, str) and conceal(value, self._secrets) != value:
            raise self.bad(name, ": it repeats a secret")
        try:
            if isinstance(value, kind):
                return parse(value)
        except ValueError:
            pass
        raise self.bad(name)

    def take_optional(self, name: str, parse: "Callable[[str], Any]") -> "Any":
        """The same, or None where the field is missing or null."""
        return None if self._document.get(name) is None else self.take(name, parse)

    def shown(self, name: str) -> str:
        """A string or a list of strings for people, escaped; "" for anything else."""
        value = self._document.get(name)
        words = value if isinstance(value, list) else [value]
        return escape(conceal(", ".join(word for word in words if isinstance(word, str)), self._secrets))


def parse_http_date(text: "Optional[str]") -> float:
    """A Date header (RFC 9110, section 5.6.7) in seconds since the epoch; 0 where it is none."""
    try:
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0


def parse_retry_after(text: "Optional[str]") -> "Optional[float]":
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3), up to RETRY_AFTER_MAX_SECONDS."""
    if text and set(text) <= DIGITS:
        return min(float(text), RETRY_AFTER_MAX_SECONDS)
    moment = parse_http_date(text)
    return max(0.0, min(moment - time.time(), RETRY_AFTER_MAX_SECONDS)) if moment else None


def random_uuid() -> str:
    """A version 4 UUID (RFC 9562, section 5.4); importing uuid takes 20 ms on 3.6."""
    a, b, c, d, e, f = struct.unpack(">IHHHHI", os.urandom(16))
    return "%08x-%04x-%04x-%04x-%04x%08x" % (a, b, c & 0x0FFF | 0x4000, d & 0x3FFF | 0x8000, e, f)


class ControlPlane:
    """IssueSession, GetSession and RevokeSession of one server.

    Safe to use from several threads. Every call ends within its limit and raises PlexctlError:
    UsageError for what was given here, TransportError for no or a malformed answer, ApiError for
    an error answer. `cancel` (threading.Event) ends pauses and further attempts, and gives up on a
    GetSession at once (Cancelled); not on the others, whose outcome is to be known. `report` takes
    a line per exchange: method, path, status, seconds; never a header or a body.
    """

    def __init__(self, server: Server, token: Secret, ca_file: "Optional[str]" = None,
                 environ: "Environ" = os.environ,
                 cancel: "Optional[threading.Event]" = None,
                 report: "Report" = lambda line: None) -> None:
        self.server = server
        self.cancel = cancel or threading.Event()
        self._token = parse_token(token.reveal().encode("utf-8", "surrogateescape"), "bearer token")
        self._token_source = token.source
        self._secrets = [self._token]
        self._report = report
        load_hashlib()
        proxy = find_proxy(server, environ)
        self._peer = str(server) + (" through HTTPS_PROXY" if proxy else "")
        self._opener = create_opener(server, ca_file, proxy)

    def issue(self, request: SessionRequest,
              on_issued: "Callable[[str], None]" = lambda session_id: None) -> IssuedSession:
        """Issues a session; the same idempotency key in each of at most ISSUE_ATTEMPTS attempts.

        `on_issued(session_id)` is called as soon as it is known that there is one, before the
        rest of the answer is judged: the caller can then revoke it whatever follows.
        """
        path = "/v1/projects/%s/sessions" % request.project_id
        body: Dict[str, Any] = {
            "resource_id": request.resource_id, "kind": "tcp",
            "target": {"tcp": {"host": request.host, "port": request.port}},
            "idempotency_key": random_uuid()}
        if request.ttl_seconds:
            body["requested_ttl_seconds"] = request.ttl_seconds
        asked_on = elapsed_seconds()
        answer, fields, session_id = self._ask_until_issued(path, body)
        on_issued(session_id)
        token = Secret(fields.take("token", str))
        if not re.fullmatch(SESSION_TOKEN_PATTERN, token.reveal()):
            raise fields.bad("token")
        self._secrets.append(token)
        if conceal(session_id, [token]) != session_id:
            raise fields.bad("session_id", ": it repeats a secret")
        expires_at = fields.take("expires_at", str)
        expires = fields.take("expires_at", parse_time)
        session = self._parse_session(
            Fields(ISSUE, fields.take("session", dict, kind=dict), self._secrets), session_id)
        issued_at = session.issued_at or parse_http_date(answer.headers.get("Date")) or time.time()
        endpoint = fields.take_optional("listener_endpoint", self._parse_endpoint)
        return IssuedSession(session_id, token, expires_at, expires - issued_at, asked_on,
                             session, endpoint or session.listener_endpoint)

    def get(self, project_id: str, session_id: str, seconds: float = EXCHANGE_SECONDS) -> Session:
        """The session as the control plane sees it now."""
        answer = self._exchange("GetSession", "GET", "/v1/projects/%s/sessions/%s" % (project_id, session_id),
                                None, seconds, self.cancel)
        if answer.status != 200:
            raise self._parse_problem("GetSession", answer)
        return self._parse_session(self._parse_body("GetSession", answer), session_id)

    def revoke(self, project_id: str, session_id: str, seconds: float = EXCHANGE_SECONDS) -> None:
        """Revokes the session. One that is gone already (404, 409, 410) counts as revoked."""
        path = "/v1/projects/%s/sessions/%s/revoke" % (project_id, session_id)
        answer = self._exchange("RevokeSession", "POST", path, {"revoke_reason": "operator_request"}, seconds)
        if answer.status not in SUCCESS and answer.status not in (404, 409, 410):
            raise self._parse_problem("RevokeSession", answer)

    def _ask_until_issued(self, path: str, body: "Dict[str, Any]") -> "Tuple[Answer, Fields, str]":
        """The answer to IssueSession, after attempts and pauses, and the id of the session that there is."""
        may_exist = False
        for attempt in range(1, ISSUE_ATTEMPTS + 1):
            try:
                answer = self._exchange(ISSUE, "POST", path, body)
                if answer.status != 201:
                    raise self._parse_problem(ISSUE, answer)
                may_exist = True  # and nobody can revoke it if its id does not follow
                fields = self._parse_body(ISSUE, answer)
                return answer, fields, fields.take("session_id", parse_uuid)
            except (TransportError, ApiError) as failure:
                error: PlexctlError = failure
            may_exist = may_exist or error.may_exist
            if not error.passing or attempt == ISSUE_ATTEMPTS or self.cancel.is_set():
                break
            wait = getattr(error, "retry_after_seconds", None)
            if wait is None:
                wait = attempt * POLL_MIN_SECONDS + JITTER_SECONDS * (os.urandom(1)[0] / 255 - 0.5)
            self._report("%s; trying again in %.1f s" % (error, wait))
            if self.cancel.wait(wait):
                break
        error.may_exist = may_exist
        error.args = (str(error) + (" (after %d attempts)" % attempt if attempt > 1 else "") + (
            "; a session may exist all the same, it will run out by itself" if may_exist else ""),)
        raise error

    def _exchange(self, operation: str, method: str, path: str, body: "Optional[Dict[str, Any]]",
                  seconds: float = EXCHANGE_SECONDS,
                  cancel: "Optional[threading.Event]" = None) -> Answer:
        request = urllib.request.Request(str(self.server) + path, method=method, headers={
            "Accept": "application/json, application/problem+json"})
        request.add_unredirected_header("Authorization", "Bearer " + self._token.reveal())
        if body is not None:
            request.data = json.dumps(body).encode("ascii")
            request.add_header("Content-Type", "application/json")
        began = elapsed_seconds()
        answer = Exchange(operation, self._peer).run(self._opener, request, seconds, cancel)
        self._report("%s %s: %d, %.3f s" % (method, path, answer.status, elapsed_seconds() - began))
        return answer

    def _parse_problem(self, operation: str, answer: Answer) -> ApiError:
        """The error of an answer that is not a success (RFC 9457 problem details, where it has them)."""
        try:
            problem = Fields(operation, parse_json(answer.body), self._secrets)
        except ValueError:
            problem = Fields(operation, None, self._secrets)
        status, code = answer.status, problem.shown("code")
        title = problem.shown("title") or http.client.responses.get(status, "")
        words = operation, ("%d %s" % (status, title)).strip(), problem.shown("detail")
        text = ": ".join(filter(None, words)) + (" (%s)" % code if code else "")
        for name in ("reason", "relation_path", "correlation_id"):
            if problem.shown(name):
                text += "; %s %s" % (name.replace("_", " "), problem.shown(name))
        forbidden = EXIT_REBAC_DENIED if code == "rebac_denied" else EXIT_FORBIDDEN
        exit_code = {401: EXIT_CREDENTIALS, 403: forbidden}.get(status, EXIT_FAILURE)
        # 409: the first request with this idempotency key is still being answered
        passing = status in (502, 503, 504) or status == 409 and code == "idempotent_replay"
        # a gateway that lost the answer, that first request, a success of another kind; 503 did nothing
        may_exist = operation == ISSUE and (passing and status != 503 or status in SUCCESS)
        return ApiError(text + self._advise(answer, code), exit_code, passing=passing, may_exist=may_exist,
                        status=status, code=code,
                        retry_after_seconds=parse_retry_after(answer.headers.get("Retry-After")))

    def _advise(self, answer: Answer, code: str) -> str:
        """What an operator can do about an error answer, to be put behind it."""
        if answer.status == 401:
            advice = "; the token is from " + self._token_source if self._token_source else ""
            if code == "step_up_required":
                challenge = " ".join(answer.headers.get_all("WWW-Authenticate", []))
                wanted = re.search(r'acr_values\s*=\s*(?:"([^"]*)"|([^\s,]+))', challenge)
                acr = conceal(wanted.group(1) or wanted.group(2) or "", self._secrets) if wanted else ""
                advice += "; re-authenticate%s and try again" % (
                    " with acr_values " + escape(acr) if acr else "")
            return advice
        if answer.status == 429:
            return ("; a session counts until it runs out or is revoked, one of print mode as well; "
                    "--max-sessions says how many a proxy takes")
        if 300 <= answer.status < 400:
            location = escape(conceal(answer.headers.get("Location", ""), self._secrets))
            return "; a redirect is never followed" + (": " + location if location else "")
        return ""

    def _parse_body(self, operation: str, answer: Answer) -> Fields:
        try:
            return Fields(operation, parse_json(answer.body), self._secrets)
        except ValueError:
            raise TransportError("%s: the answer is not valid JSON" % operation) from None

    def _parse_endpoint(self, text: str) -> Endpoint:
        endpoint = parse_endpoint(text)
        if not is_dialable(endpoint.host, is_loopback(self.server.host)):
            raise ValueError
        return endpoint

    def _parse_session(self, fields: Fields, session_id: str) -> Session:
        if fields.take("id", parse_uuid) != session_id:
            raise fields.bad("id")
        fields.take("kind", one_of("tcp"))
        return Session(session_id, fields.take("status", one_of("active", "revoked", "expired")),
                       fields.take_optional("issued_at", parse_time) or 0.0,
                       fields.take_optional("listener_endpoint", self._parse_endpoint),
                       fields.shown("revoke_reason"))


# ----------------------------------------------------------------------------------------- audit

SYSLOG_SOCKETS = ("/dev/log", "/var/run/syslog")  # Linux and others; macOS
SYSLOG_AUTHPRIV_INFO = 10 * 8 + 6  # RFC 3164, section 4.1.1: facility * 8 + severity


def make_private_directories(path: str) -> None:
    """Makes every directory that is missing 0700; os.makedirs does so with the last one alone (3.7)."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        try:
            os.mkdir(each, 0o700)
            os.chmod(each, 0o700)  # a umask may have taken our own bits
        except FileExistsError:  # another plexctl was faster; if it is no directory, the next call says so
            pass


def send_to_syslog(message: str, sockets: "Sequence[str]", seconds: float = SYSLOG_SECONDS) -> None:
    """One line for the host's syslog (RFC 3164, without a host name), where it has one; OSError."""
    for path in sockets:
        if os.path.exists(path):
            month_to_second = time.ctime()[4:19]  # strftime would take the locale's names
            line = "<%d>%s plexctl[%d]: %s" % (SYSLOG_AUTHPRIV_INFO, month_to_second, os.getpid(), message)
            send_datagram(path, line.encode("ascii"), seconds)
            return


class AuditLog:
    """The record of --reveal-secrets; it fails closed.

    The file is opened before a session is issued, and `record` returns only when the whole line
    was written and synced. Syslog gets a copy where the host has it.
    """

    def __init__(self, environ: "Environ", report: "Report",
                 syslog_sockets: "Sequence[str]" = SYSLOG_SOCKETS) -> None:
        self._environ = environ
        self._report = report
        self._syslog_sockets = syslog_sockets
        given = environ.get("PLEXCTL_AUDIT_LOG", "")
        base = base_directory("XDG_STATE_HOME", os.path.join(".local", "state"), environ)
        if not given and not base:
            raise PlexctlError("audit log: no home directory for it (PLEXCTL_AUDIT_LOG names a file)")
        path = given or os.path.join(base, "plexctl", "audit.log")
        self._name = "audit log " + escape(path)
        hint = "(PLEXCTL_AUDIT_LOG names another)"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | OPEN_AT_ONCE
        try:
            if not given:
                make_private_directories(os.path.dirname(path))
            self._descriptor = os.open(path, flags, 0o600)
        except (OSError, ValueError) as error:
            raise PlexctlError("%s: cannot be opened: %s %s"
                               % (self._name, show_error(error), hint)) from error
        status = os.fstat(self._descriptor)
        fault = find_file_fault(status, OTHERS_WRITE_BITS)
        if not stat.S_ISREG(status.st_mode):  # a device may take anything, and keep nothing
            fault = "is not a regular file"
        if fault:
            self.close()
            raise PlexctlError("%s: %s %s" % (self._name, fault, hint))

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def record(self, server: Server, request: SessionRequest, issued: IssuedSession) -> None:
        """Writes one JSON object in one line with one write; raises unless it is verifiably there."""
        message = json.dumps(self._fields(server, request, issued))
        written: List[int] = []
        handler = logging.Handler()
        handler.emit = lambda record: written.append(  # type: ignore[method-assign]
            self._append(record.getMessage()))
        logger = logging.getLogger("plexctl.audit")
        logger.propagate = False  # a handler of the root is no audit log, and may write to stderr
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            logger.info("%s", message)
        except OSError as error:
            raise PlexctlError("%s: the record was not written: %s; the token is not shown"
                               % (self._name, show_error(error))) from error
        finally:
            logger.removeHandler(handler)
        if len(written) != 1:  # logging.disable, a level, a filter
            raise PlexctlError("%s: logging dropped the record; the token is not shown" % self._name)
        try:
            send_to_syslog(message, self._syslog_sockets)
        except OSError as error:
            self._report("warning: syslog did not take the audit record: %s" % show_error(error))

    def _append(self, text: str) -> int:
        """Writes a line at the end of the file, synced; OSError unless all its bytes are there."""
        line = (text + "\n").encode("ascii")
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        os.lseek(self._descriptor, max(0, size - 1), os.SEEK_SET)
        if size and os.read(self._descriptor, 1) != b"\n":
            line = b"\n" + line  # behind what a full disk cut short
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "short write")
        os.fsync(self._descriptor)
        if not os.fstat(self._descriptor).st_nlink:
            raise OSError(errno.ENOENT, "the file was removed")
        return len(line)

    def _fields(self, server: Server, request: SessionRequest, issued: IssuedSession) -> "Dict[str, Any]":
        uid = os.getuid() if hasattr(os, "getuid") else None
        user = self._environ.get("USERNAME", "")
        if uid is not None:
            try:
                user = pwd.getpwuid(uid).pw_name
            except KeyError:
                user = str(uid)
        return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": "session_token_revealed",
                "user": user, "uid": uid, "sudo_user": self._environ.get("SUDO_USER"),
                "hostname": socket.gethostname(), "pid": os.getpid(), "server": str(server),
                "project_id": request.project_id, "resource_id": request.resource_id,
                "session_id": issued.session_id,
                "target": join_host_port(request.host, request.port),
                "expires_at": issued.expires_at}


# ----------------------------------------------------------------------------------------- relay

CHUNK_BYTES = 64 * 1024
BULK_BYTES = 2048 * 1024
BULK_BESIDE_OTHERS_BYTES = 512 * 1024  # shorter turns let a keystroke in between
BULK_AFTER_FULL_READS = 4
BULK_FLOWS_MAX = 64
BULK_WAIT_MICROSECONDS = 500000  # of a thread in one recv or send, before the loop takes over
TICK_SECONDS = 1.0
READABLE, WRITABLE = 1, 4  # EPOLLIN and EPOLLOUT
ERRORS_ONCE = 1 << 31  # EPOLLET: an error or hang-up that nobody reads would be reported for ever
READING, BLOCKED, BULK, ENDED = range(4)  # what a Flow is doing


class SelectorPoller:
    """The part of select.epoll that the relay uses, where there is no epoll (macOS, Windows)."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, mask: int) -> None:
        """Watches `fd` for READABLE, WRITABLE, both or, for now, nothing."""
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        """Changes what `fd` is watched for."""
        events = (1 if mask & READABLE else 0) | (2 if mask & WRITABLE else 0)
        if fd in self._selector.get_map():
            self._selector.unregister(fd)
        if events:
            self._selector.register(fd, events)

    def unregister(self, fd: int) -> None:
        """Forgets `fd`."""
        self.modify(fd, 0)

    def poll(self, timeout: float) -> "List[Tuple[int, int]]":
        """(fd, events) pairs, after at most `timeout` seconds."""
        return [(key.fd, (READABLE if events & 1 else 0) | (WRITABLE if events & 2 else 0))
                for key, events in self._selector.select(timeout)]

    def close(self) -> None:
        """Releases what the system gave."""
        self._selector.close()


class Flow:
    """One direction of a connection: what `source` sends goes to `sink`.

    The loop moves up to CHUNK_BYTES a turn. A flow whose reads keep filling the chunk gets a
    thread with a large buffer, until it pauses or its sink blocks. At most BULK_BYTES are held.
    Only the one that holds the flow (by `state`: the loop, or for BULK the thread) touches the rest.
    """

    __slots__ = ("pair", "twin", "source", "sink", "pending", "full_reads", "moved", "state")

    def __init__(self, pair: "Pair", source: "socket.socket", sink: "socket.socket") -> None:
        self.pair = pair
        self.twin = self
        self.source = source
        self.sink = sink
        self.pending = b""
        self.full_reads = 0
        self.moved = 0
        self.state = READING

    def on_events(self, events: int) -> None:
        """The loop's call: something happened to `source`, which the twin writes to."""
        if events & ~READABLE and self.twin.state == BLOCKED:  # a hang-up alone has send() tell why
            self.twin.flush()
        if events & ~WRITABLE and self.pair in self.pair.relay.pairs:
            if self.state == READING:
                self.pump()
            else:
                self.hang_up()

    def pump(self) -> None:
        """Moves what one read gives."""
        relay = self.pair.relay
        view = relay.view
        try:
            count = self.source.recv_into(view, 0, relay.dontwait)
        except BlockingIOError:
            return
        except OSError:
            self.pair.reset()
            return
        if not count:
            self.end()
            return
        try:
            sent = self.sink.send(view[:count], relay.dontwait)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lose_sink()
            return
        self.moved += sent
        if sent < count:
            self.pending = bytes(view[sent:count])
            self.state = BLOCKED  # nothing is read until the sink has taken it
            self.full_reads = 0
            self.pair.watch()
        elif count == CHUNK_BYTES:
            self.full_reads += 1
            if self.full_reads >= BULK_AFTER_FULL_READS and not self.pair.broken:
                relay.start_bulk(self)
        else:
            self.full_reads = 0

    def flush(self) -> None:
        """The sink takes more."""
        try:
            sent = self.sink.send(self.pending, self.pair.relay.dontwait)
        except BlockingIOError:
            return
        except OSError:
            self.lose_sink()
            return
        self.moved += sent
        self.pending = self.pending[sent:]
        if not self.pending:
            self.state = READING
            self.pair.watch()

    def end(self) -> None:
        """End of input: passed on as a half-close, the twin goes on.

        A reset looks the same once a send has consumed its error; but then the socket has no peer.
        """
        self.state = ENDED
        if self.twin.state == ENDED:
            self.pair.settle()
            return
        try:
            self.source.getpeername()
        except OSError:
            self.pair.reset()
            return
        try:
            if not self.pair.broken:
                self.sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.lose_sink()
        else:
            self.pair.settle()

    def lose_sink(self) -> None:
        """The sink's peer is gone. What it sent before is still read and delivered by the twin."""
        self.state = ENDED
        self.pending = b""
        self.pair.broken = True
        self.pair.settle()

    def hang_up(self) -> None:
        """An error of `source` while it is not read; a flow that has not ended sees it at its next read."""
        if self.state == ENDED and self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.pair.reset()

    def carry_in_bulk(self) -> None:
        """Runs in a thread of its own, with blocking calls; ends by handing the flow back."""
        then: "Optional[Callable[[], None]]" = None
        try:
            # given back to the system at once, unlike a bytearray
            with mmap.mmap(-1, BULK_BYTES) as buffer, memoryview(buffer) as view:
                while then is None and not self.pair.broken:
                    then = self.pump_in_bulk(view)
        except (OSError, ValueError):  # no memory for the buffer: the loop goes on with it
            pass
        finally:
            self.pair.relay.post(self.leave_bulk, then or self.pump)

    def pump_in_bulk(self, view: memoryview) -> "Optional[Callable[[], None]]":
        """Moves what one read gives; what the loop is to do next, None: go on unless it was broken."""
        relay = self.pair.relay
        others = len(relay.pairs) > relay.bulk_flows
        try:
            count = self.source.recv_into(view, BULK_BESIDE_OTHERS_BYTES if others else BULK_BYTES)
        except BlockingIOError:  # nothing came for BULK_WAIT_MICROSECONDS
            return self.pump
        except OSError:
            return self.pair.reset
        if not count:
            return self.end
        sent = 0
        try:
            while sent < count and not self.pair.aborted:
                taken = self.sink.send(view[sent:count])
                sent += taken
                self.moved += taken
        except BlockingIOError:  # nothing went for as long
            self.pending = bytes(view[sent:count])
            return self.flush
        except OSError:
            return self.lose_sink
        return None

    def leave_bulk(self, then: "Callable[[], None]") -> None:
        """Back in the loop's hands."""
        self.pair.relay.bulk_flows -= 1
        if self.pair.aborted:
            self.state = ENDED
            self.pair.settle()
        else:
            self.state = BLOCKED if self.pending else READING
            self.pair.watch()
            then()


class Pair:
    """The two sockets of one connection, and both flows between them."""

    __slots__ = ("relay", "client", "remote", "up", "down", "broken", "aborted", "spared", "on_end")

    def __init__(self, relay: "Relay", client: "socket.socket", remote: "socket.socket",
                 on_end: "Callable[[Pair], None]") -> None:
        self.relay = relay
        self.client = client
        self.remote = remote
        self.broken = False  # one peer is gone: the other one gets a reset, not an end of input
        self.aborted = False
        self.spared: "Any" = None  # the socket that is closed without a reset all the same
        self.on_end = on_end
        self.up = Flow(self, client, remote)
        self.down = Flow(self, remote, client)
        self.up.twin, self.down.twin = self.down, self.up

    def watch(self) -> None:
        """Tells the poller what each socket is waited for."""
        for flow in (self.up, self.down):
            mask = READABLE if flow.state == READING else 0
            if flow.twin.state == BLOCKED:
                mask |= WRITABLE
            self.relay.poller.modify(flow.source.fileno(), mask or ERRORS_ONCE)

    def settle(self) -> None:
        """After a flow has ended: closes what nobody needs any more."""
        if self.up.state == ENDED and self.down.state == ENDED:
            self._close()
        else:
            self.watch()

    def reset(self) -> None:
        """Ends both directions now; a truncated stream must not look like a complete one."""
        if self not in self.relay.pairs:
            return
        self.broken = self.aborted = True
        for flow in (self.up, self.down):
            if flow.state == BULK:  # its thread holds the sockets: wake it, close when it is out
                try:
                    flow.source.shutdown(socket.SHUT_RD)
                except OSError:
                    pass
            else:
                flow.state = ENDED
        self.settle()

    def _close(self) -> None:
        self.relay.pairs.discard(self)
        for sock in (self.client, self.remote):
            fd = sock.fileno()
            if not self.relay.over:
                self.relay.poller.unregister(fd)
            self.relay.handlers.pop(fd, None)
            if self.broken or sock is self.client:  # whom `add` had armed
                reset_on_close(sock, self.broken and sock is not self.spared)
            sock.close()
        self.up.pending = self.down.pending = b""  # it may be long until the cycle is collected
        self.on_end(self)


def reset_on_close(sock: "socket.socket", reset: bool = True) -> None:
    """close() will send RST instead of FIN (SO_LINGER of zero), or as usual a FIN."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))
    except OSError:
        pass


class Waker:
    """A socket that a waiting thread watches, and that any other thread, or a signal, writes to."""

    def __init__(self) -> None:
        self._awake = False
        self._watched, self._written = socket.socketpair()
        self._watched.setblocking(False)
        self._written.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._watched.fileno()

    def written_fd(self) -> int:
        """The descriptor for signal.set_wakeup_fd."""
        return self._written.fileno()

    def wake(self) -> None:
        """Ends the wait, or the next one."""
        if not self._awake:
            self._awake = True
            try:
                self._written.send(b"\0")
            except OSError:  # full, which wakes as well; or closed
                pass

    def clear(self, events: int = READABLE) -> None:
        """To be called when awake, before anything is done of what it was woken for."""
        try:
            self._watched.recv(4096)
        except BlockingIOError:
            pass
        self._awake = False  # not before: recv would take the byte of a wake() in between

    def close(self) -> None:
        """Closes both sockets."""
        self._watched.close()
        self._written.close()


class Relay:
    """One event loop for every connection that is idle or chatty, and threads for bulk.

    `run` is the loop; `post` gives it something to do from another thread. The rest belongs to
    the loop's thread. Connected sockets are blocking: the loop passes MSG_DONTWAIT, the threads
    do not, so a flow changes hands without a system call. Without MSG_DONTWAIT (Windows) they are
    non-blocking, and the loop keeps every flow.
    """

    def __init__(self, report: "Callable[[str], None]", poller: "Any" = None) -> None:
        self.poller = poller or (select.epoll() if hasattr(select, "epoll") else SelectorPoller())
        self.handlers: "Dict[int, Callable[[int], object]]" = {}
        self.pairs: "Set[Pair]" = set()
        self.view = memoryview(bytearray(CHUNK_BYTES))
        # macOS has MSG_DONTWAIT, but waits in send() all the same
        self.dontwait = socket.MSG_DONTWAIT if sys.platform.startswith("linux") else 0
        self.bulk_flows = 0
        self.on_tick: "Callable[[], None]" = lambda: None
        self._report = report
        self._posted: "Any" = collections.deque()
        self._running = True
        self.over = False
        self._waker = Waker()
        self.handlers[self._waker.fileno()] = self._waker.clear
        self.poller.register(self._waker.fileno(), READABLE)

    def add(self, client: "socket.socket", remote: "socket.socket",
            on_end: "Callable[[Pair], None]") -> Pair:
        """Carries bytes between two connected sockets from now on; the relay closes them."""
        for sock in (client, remote):
            sock.setblocking(bool(self.dontwait))
        reset_on_close(client)  # unless closed in order: not even SIGKILL may look like a clean end
        pair = Pair(self, client, remote, on_end)
        for flow in (pair.up, pair.down):  # both are known before either may be acted on
            fd = flow.source.fileno()
            self.handlers[fd] = flow.on_events
            self.poller.register(fd, READABLE)
        self.pairs.add(pair)
        return pair

    def post(self, action: "Callable[..., None]", *arguments: "Any") -> None:
        """Has the loop call `action` soon; from any thread."""
        self._posted.append((action, arguments))
        if self.over:  # there is no loop any more that could mind
            self._run_posted()
        else:
            self._waker.wake()

    def run(self) -> None:
        """The loop. Nothing but `stop` ends it: an error ends only the connection it came from."""
        poll, handlers = self.poller.poll, self.handlers
        next_tick = elapsed_seconds() + TICK_SECONDS
        while self._running:
            for fd, events in poll(TICK_SECONDS):
                handler = handlers.get(fd)
                if handler is not None:
                    try:
                        handler(events)
                    except Exception as error:
                        self._contain(handler, error)
            if elapsed_seconds() >= next_tick:
                next_tick = elapsed_seconds() + TICK_SECONDS
                self._posted.append((self.on_tick, ()))
            if self._posted:
                self._run_posted()
        self.close()

    def stop(self) -> None:
        """Has the loop reset what is left and end."""
        def last() -> None:
            for pair in list(self.pairs):
                if pair.up.state == ENDED and not pair.broken:
                    pair.spared = pair.remote  # all that the client sent may still be on its way
                pair.reset()
            self._running = False
        self.post(last)

    def start_bulk(self, flow: Flow) -> None:
        """Hands a flow to a thread: on Linux, and for a bounded number of flows.

        The time limits of one recv and send keep the thread answering.
        """
        if not self.dontwait or self.bulk_flows >= BULK_FLOWS_MAX:
            return
        flow.full_reads = 0
        limit = struct.pack("ll", 0, BULK_WAIT_MICROSECONDS)
        try:
            flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            flow.sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        except OSError:  # a 32-bit system whose time_t has 64 bits wants another structure
            return
        if start_thread(flow.carry_in_bulk):  # else the loop goes on with it
            self.bulk_flows += 1
            flow.state = BULK
            flow.pair.watch()

    def _run_posted(self) -> None:
        while self._posted:
            try:
                action, arguments = self._posted.popleft()
            except IndexError:  # after the loop's end several threads may be here
                return
            try:
                action(*arguments)
            except Exception as error:
                self._report("warning: %s in the relay" % type(error).__name__)

    def _contain(self, handler: "Any", error: Exception) -> None:
        self._report("warning: a connection was dropped after %s" % show_error(error))
        owner = getattr(handler, "__self__", None)
        if isinstance(owner, Flow):
            self.post(owner.pair.reset)

    def close(self) -> None:
        """Releases what the loop held: at its end, or instead of ever running it."""
        deadline = elapsed_seconds() + CLOSE_SECONDS
        while self.pairs and elapsed_seconds() < deadline:  # threads that hand back their flows
            time.sleep(0.01)
            self._run_posted()
        self.over = True  # from here on whoever posts runs it, and there is no poller
        self._run_posted()
        self.poller.close()
        self._waker.close()


LEG_OPTIONS: "List[Tuple[int, int, int]]" = []  # filled at the first use, which imports socket


def set_leg_options(sock: "socket.socket") -> None:
    """TCP_NODELAY (two writes cost 44 ms without it), and keepalive that notices in 2 minutes."""
    if not LEG_OPTIONS:
        LEG_OPTIONS[:] = [(level, getattr(socket, name), value) for level, name, value in (
            (socket.IPPROTO_TCP, "TCP_NODELAY", 1), (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
            (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60), (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15),
            (socket.IPPROTO_TCP, "TCP_KEEPCNT", 4)) if hasattr(socket, name)]
    for option in LEG_OPTIONS:
        sock.setsockopt(*option)


# ------------------------------------------------------------------------------- sessions in use


class Lease:
    """One session in use: where its listener is, until when, and by how many connections.

    `route` is the (family, address) that a socket's constructor and `connect` take, None while the
    name is not looked up; `over` says why the session is over, None while it is not.
    """

    def __init__(self, issued: IssuedSession, endpoint: Endpoint, lock: "Any") -> None:
        self.issued = issued
        self.endpoint = endpoint
        self.route: "Any" = None
        self.connections = 0
        self.expires_on = issued.issued_on + issued.lifetime_seconds
        self.over: "Optional[SessionOver]" = None
        self.refreshing = threading.Lock()
        self.refreshed_on = 0.0
        self.has_answer = False
        self.rechecked_on = elapsed_seconds()
        self._lock = lock

    def release(self) -> None:
        """One connection less."""
        with self._lock:
            self.connections -= 1


class Sessions:
    """Which session a connection gets: issued on demand, renewed, shared, and all revoked in the end.

    `limit` sessions at once (a Node's listener serves one connection at a time); `renew`: one that
    has run out is replaced for the next connection. Every session_id that the control plane ever
    gave is owed a revocation until `keep` or `leave`. `report` takes lines from any thread;
    `on_retired` is told of a lease whose connections must go.
    """

    def __init__(self, plane: ControlPlane, request: SessionRequest, report: "Callable[[str], None]",
                 limit: int = 1, renew: bool = False, wait_seconds: float = 90.0) -> None:
        self.over: "Optional[PlexctlError]" = None
        self.on_retired: "Callable[[Lease], None]" = lambda lease: None
        self._plane = plane
        self._request = request
        self._report = report
        self._limit = limit
        self._renew = renew
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._leases: "List[Lease]" = []
        self._issuing = 0
        self._owed: "Dict[str, bool]" = {}  # by session_id; True: it is being revoked
        self._keep = False
        self._leaving = False
        self._told_of_sharing = False
        self._warned_at = float("inf")

    # What a connection asks for

    def establish(self) -> Lease:
        """Issues a session and waits until its Node reports the listener; PlexctlError if not."""
        with self._changed:
            if self._leaving:
                raise PlexctlError("interrupted")
            self._issuing += 1
        return self._add()

    def take(self) -> "Optional[Lease]":
        """A lease with a known address, at once; None where `connect` has to go and get one."""
        with self._changed:
            lease = self._choose()
            if lease is None or lease.route is None:
                return None
            lease.connections += 1
            return lease

    def connect(self, failed: "Optional[Lease]" = None, route: "Any" = None,
                error: "Optional[OSError]" = None) -> "Tuple[socket.socket, Lease]":
        """A socket connected to a listener endpoint, and its lease, to be released by the caller.

        Blocks for as long as it takes. With `failed`, a lease whose `route` could not be
        connected to (`error` says why), it gives that one back and asks GetSession; a new endpoint
        is tried once. PlexctlError if all fails.
        """
        if failed is None:
            failed, route = self._acquire_route()
            try:
                return connect_socket(*route), failed
            except OSError as refusal:
                error = refusal
        failed.release()
        asked = self._refresh(failed, route)
        if failed.over is None and failed.route == route:
            idle = failed.connections == 0
            if not (asked and idle and self._renew and isinstance(error, ConnectionRefusedError)):
                raise PlexctlError("listener endpoint %s: %s"
                                   % (failed.endpoint, show_error(error or OSError())))
            # the Node's own cap, which the control plane does not know of
            self._end(failed, SessionOver("the Node has closed the session's listener"), renewable=True)
        lease, route = self._acquire_route()
        try:
            return connect_socket(*route), lease
        except OSError as refusal:
            lease.release()
            raise PlexctlError("listener endpoint %s: %s"
                               % (lease.endpoint, show_error(refusal))) from refusal

    # The clock

    def tick(self) -> None:
        """To be called every second or so: expiry, warnings before it, and news from the server."""
        now = elapsed_seconds()
        for lease in tuple(self._leases):
            if now >= lease.expires_on:
                self._end(lease, SessionOver("the session expired"), renewable=True)
            elif now - lease.rechecked_on >= RECHECK_SECONDS:
                lease.rechecked_on = now
                start_thread(self._refresh, lease)
        left = self.seconds_left()
        longest = max((lease.issued.lifetime_seconds for lease in tuple(self._leases)), default=0.0)
        for threshold in reversed(WARN_LEFT_SECONDS):
            if 0 < left <= threshold < min(longest, self._warned_at):
                self._warned_at = threshold
                self._report("warning: %s of the session are left" % show_seconds(left + 0.5))

    def seconds_left(self) -> float:
        """Until the first of the sessions runs out; 0 where there is none."""
        with self._changed:
            ends = [lease.expires_on for lease in self._leases]
        return max(0.0, min(ends, default=0.0) - elapsed_seconds())

    # Leaving

    def keep(self) -> None:
        """The sessions are in the operator's hands from now on: `leave` will not revoke them."""
        self._keep = True

    def leave(self, seconds: float = LEAVE_SECONDS) -> None:
        """Revokes what is owed, also what is just being issued; returns after `seconds` at most."""
        deadline = elapsed_seconds() + seconds
        self._plane.cancel.set()
        with self._changed:
            self._leaving = True
            if self._keep:
                self._owed = {key: True for key, begun in self._owed.items() if begun}
        while elapsed_seconds() < deadline:
            with self._changed:
                for session_id in list(self._owed):
                    self._start_revoking(session_id)
                not_begun = [session_id for session_id, begun in self._owed.items() if not begun]
                self._owed.update(dict.fromkeys(not_begun, True))
                if not not_begun:
                    if not self._owed and not self._issuing:
                        return
                    self._changed.wait(min(0.5, deadline - elapsed_seconds()))
            for session_id in not_begun:  # no more threads
                self._revoke(session_id)

    def left_behind(self) -> "List[str]":
        """What `leave` could not settle, in words."""
        with self._changed:
            if self._issuing and not self._owed:
                return ["a session may have been issued, it will run out by itself"]
            return ["session %s is not revoked, it will run out by itself" % session_id
                    for session_id in self._owed]

    # Below: how

    def _add(self) -> Lease:
        """One session more; the caller has counted it in `_issuing`."""
        session_ids: "List[str]" = []

        def owe(session_id: str) -> None:
            session_ids.append(session_id)
            with self._changed:
                self._owed[session_id] = False
                self._changed.notify_all()  # leave() may be waiting for it

        try:
            issued = self._plane.issue(self._request, owe)
            if issued.session.status != "active" or issued.lifetime_seconds <= 0:
                raise SessionOver("the session was over when it arrived")
            lease = Lease(issued, issued.listener_endpoint or self._await_endpoint(issued), self._changed)
            with self._changed:
                if self._leaving:
                    raise PlexctlError("interrupted")
                self._leases.append(lease)
            return lease
        except PlexctlError as error:
            with self._changed:
                for session_id in session_ids:
                    self._start_revoking(session_id)
            if self._leaving and error.may_exist:  # whoever asked for it does not listen any more
                self._report("warning: %s" % error)
            raise
        finally:
            with self._changed:
                self._issuing -= 1
                self._changed.notify_all()

    def _await_endpoint(self, issued: IssuedSession) -> Endpoint:
        deadline, pause = elapsed_seconds() + self._wait_seconds, POLL_MIN_SECONDS
        if self._wait_seconds:
            self._report("waiting for the Node to report its listener (up to %s)"
                         % show_seconds(self._wait_seconds))
        while True:
            left = deadline - elapsed_seconds()
            if left <= 0:
                raise PlexctlError("the Node reported no listener endpoint within %s; is it up? "
                                   "(--wait-seconds)" % show_seconds(self._wait_seconds))
            try:
                session = self._plane.get(self._request.project_id, issued.session_id,
                                          min(EXCHANGE_SECONDS, max(1.0, left)))
                if session.status != "active":
                    raise describe_end(session)
                if session.listener_endpoint:
                    return session.listener_endpoint
            except (TransportError, ApiError) as error:
                if not error.passing:
                    raise
            if self._plane.cancel.wait(min(pause, deadline - elapsed_seconds())):
                raise PlexctlError("interrupted")
            pause = min(pause * 1.5, POLL_MAX_SECONDS)

    def _choose(self) -> "Optional[Lease]":
        """With the lock held: an idle lease, else the least busy one where no other may be had."""
        now, best = elapsed_seconds(), None
        for lease in self._leases:
            if now < lease.expires_on and (best is None or lease.connections < best.connections):
                best = lease
        if self.over or self._leaving or best is None:
            return None
        if best.connections:
            if not self._is_full():
                return None
            if not self._told_of_sharing:
                self._told_of_sharing = True
                self._report("warning: more connections at once than sessions (%d): the Node serves "
                             "one at a time and may make them wait; see --max-sessions" % self._limit)
        return best

    def _is_full(self) -> bool:
        """With the lock held. The server may still count sessions that are being revoked."""
        return len(self._leases) + self._issuing + sum(self._owed.values()) >= self._limit

    def _acquire(self) -> Lease:
        """A lease for one connection, issued if need be."""
        while True:
            with self._changed:
                if self.over:
                    raise self.over
                if self._leaving:
                    raise PlexctlError("interrupted")
                lease = self._choose()
                if lease is not None:
                    lease.connections += 1
                    return lease
                if self._is_full():
                    self._changed.wait(0.2)  # one is on its way, or tick() has yet to see an end
                    continue
                self._issuing += 1
            try:
                self._add()
            except PlexctlError as error:
                refused = isinstance(error, ApiError) and error.status < 500
                with self._changed:
                    if not self._leases:
                        if refused:  # a renewal that the server refuses ends it
                            self.over = self.over or error
                        raise
                    if refused:
                        self._limit = len(self._leases)
                    lease = min(self._leases, key=lambda each: each.connections)
                    lease.connections += 1
                if not self._leaving:
                    self._report("warning: no further session, connections share what there is: %s" % error)
                return lease

    def _acquire_route(self) -> "Tuple[Lease, Any]":
        """A lease for one connection, and where it leads now: another dial may move it."""
        lease = self._acquire()
        try:
            if lease.route is None:
                self._move(lease, lease.endpoint)
            return lease, lease.route
        except PlexctlError:
            lease.release()
            raise

    def _move(self, lease: Lease, endpoint: Endpoint) -> None:
        """Looks the endpoint's name up once; what it leads to is judged like the endpoint itself."""
        try:
            found = socket.getaddrinfo(endpoint.host, endpoint.port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise PlexctlError("listener endpoint %s: %s" % (endpoint, show_error(error))) from error
        family, _, _, _, address = found[0]
        if not is_dialable(str(address[0]), is_loopback(self._plane.server.host)):
            raise PlexctlError("listener endpoint %s: leads to %s, which is refused"
                               % (endpoint, address[0]))
        lease.endpoint, lease.route = endpoint, (family, address)

    def _refresh(self, lease: Lease, failed_route: "Any" = None) -> bool:
        """Asks GetSession and acts on it; whether there was an answer. Raises nothing.

        One question at a time serves everyone who came before it was asked, or whose
        `failed_route` is not the lease's any more.
        """
        wanted_on = elapsed_seconds()
        with lease.refreshing:
            if lease.over or failed_route not in (None, lease.route):
                return True
            if lease.refreshed_on >= wanted_on:
                return lease.has_answer
            lease.refreshed_on = elapsed_seconds()
            lease.has_answer = True
            try:
                session = self._plane.get(self._request.project_id, lease.issued.session_id)
                if session.status != "active":
                    self._end(lease, describe_end(session), session.status == "expired"
                              or session.revoke_reason in ("ttl_expired", "idle_timeout"))
                elif session.listener_endpoint and session.listener_endpoint != lease.endpoint:
                    self._report("the Node reports a new listener endpoint: %s" % session.listener_endpoint)
                    self._move(lease, session.listener_endpoint)
                return True
            except PlexctlError as error:
                if isinstance(error, ApiError) and error.status in (404, 410):
                    self._end(lease, SessionOver("the session is gone"), renewable=False)
                else:
                    self._report("warning: %s" % error)
                lease.has_answer = False
                return False

    def _end(self, lease: Lease, why: SessionOver, renewable: bool) -> None:
        """One that may be renewed makes room for the next one; any other ends all."""
        with self._changed:
            if lease not in self._leases:
                return
            lease.over = why
            self._changed.notify_all()
            if not (renewable and self._renew):
                self.over = self.over or why
                return
            self._leases.remove(lease)
            self._warned_at = float("inf")
            self._start_revoking(lease.issued.session_id)
        self._report("%s; the next connection gets a new one" % why)
        self.on_retired(lease)

    def _start_revoking(self, session_id: str) -> None:
        """With the lock held. Does nothing if it has begun; where it cannot begin leave() does it."""
        if self._owed.get(session_id) is False:
            self._owed[session_id] = start_thread(self._revoke, session_id)

    def _revoke(self, session_id: str) -> None:
        deadline = elapsed_seconds() + LEAVE_SECONDS
        while True:
            try:
                self._plane.revoke(self._request.project_id, session_id,
                                   max(0.5, deadline - elapsed_seconds()))
                break
            except PlexctlError as error:
                if not error.passing or elapsed_seconds() + POLL_MIN_SECONDS > deadline:
                    self._report("warning: session %s is not revoked, it will run out by itself: %s"
                                 % (session_id, error))
                    break
            time.sleep(POLL_MIN_SECONDS)
        with self._changed:
            self._owed.pop(session_id, None)
            self._changed.notify_all()


def describe_end(session: Session) -> SessionOver:
    """Why a session is no longer active."""
    reason = " (%s)" % session.revoke_reason if session.revoke_reason else ""
    return SessionOver("the session %s%s" % (
        "was revoked" if session.status == "revoked" else "expired", reason))


def connect_socket(family: int, address: "Any") -> "socket.socket":
    """A connected, blocking TCP socket; OSError within CONNECT_SECONDS if there is none."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_SECONDS)
        sock.connect(address)
        sock.settimeout(None)
        set_leg_options(sock)
    except BaseException:
        sock.close()
        raise
    return sock


# ------------------------------------------------------------------------------------- forwarder

BACKLOG_CONNECTIONS = 1024
ACCEPTS_PER_TURN = 64
CONNECTING_THREADS_MAX = 32
RESERVED_DESCRIPTORS = 64
PAUSE_SECONDS = 1.0
SETTLE_SECONDS = 0.05
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
CONNECTING = (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK)


class OwnerCheck:
    """Which user holds the other end of a loopback connection, by the kernel's word.

    sock_diag(7), inet_diag: one netlink request with the exact addresses, about 10 microseconds.
    OSError from the constructor where the host cannot answer.
    """

    def __init__(self, family: int, local: "Tuple[str, int]") -> None:
        self._family = family
        self._local = local
        self._sequence = 0
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
        try:
            self._netlink.connect((0, 0))
            self._netlink.setblocking(False)
            nobody = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104
            if self._ask(local, (nobody, 0)) != os.geteuid():  # our own listener
                raise OSError(errno.EOPNOTSUPP, "no answer")
        except BaseException:
            self.close()
            raise

    def find(self, client: "Tuple[str, int]") -> "Optional[int]":
        """The uid that owns the client's socket, None where it has none any more."""
        try:
            return self._ask(client, self._local)
        except OSError:
            return None

    def _ask(self, source: "Tuple[str, int]", destination: "Tuple[str, int]") -> "Optional[int]":
        # inet_diag_req_v2 with inet_diag_sockid (ports in network order), behind an nlmsghdr
        # of type SOCK_DIAG_BY_FAMILY with NLM_F_REQUEST
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        request = struct.pack(
            "=IHHIIBBBBIHH16s16sIII", 72, 20, 1, self._sequence, 0,
            self._family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF,
            socket.htons(source[1]), socket.htons(destination[1]),
            socket.inet_pton(self._family, source[0]), socket.inet_pton(self._family, destination[0]),
            0, 0xFFFFFFFF, 0xFFFFFFFF)
        self._netlink.send(request)
        sequence = -1
        while sequence != self._sequence:  # a late answer to an earlier question is nobody's
            answer = self._netlink.recv(4096)
            kind, _, sequence = struct.unpack_from("=HHI", answer, 4)
        if kind != 20 or len(answer) < 88:
            return None  # NLMSG_ERROR: there is no such socket
        uid, inode = struct.unpack_from("=II", answer, 80)  # inet_diag_msg after nlmsghdr
        # a socket that its process has closed has no inode, and uid 0 whoever it was
        return int(uid) if inode else None

    def close(self) -> None:
        """Closes the netlink socket."""
        self._netlink.close()


def create_listener(local: LocalAddress, forwarder: "Forwarder") -> "Any":
    """A socketserver that binds and listens now; `forwarder` serves what it accepts, in its loop."""
    class Listener(socketserver.TCPServer):
        request_queue_size = BACKLOG_CONNECTIONS  # the default of 5 makes bursts wait a second
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

        def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
            forwarder.relay.run()

        def verify_request(self, request: "Any", client_address: "Any") -> bool:
            return forwarder.may_serve(client_address)

        def process_request(self, request: "Any", client_address: "Any") -> None:
            forwarder.carry(request, client_address)

        def server_close(self) -> None:
            super().server_close()
            mine, self.identity = self.identity, None
            if mine and os.path.lexists(local.path) and os.path.samestat(mine, os.lstat(local.path)):
                os.unlink(local.path)

    address = local.path or (local.host, local.port)
    try:
        return Listener(address, None)  # type: ignore[arg-type]
    except (OSError, OverflowError) as error:
        raise PlexctlError("--local-addr %s: cannot listen: %s"
                           % (escape(str(local)), show_error(error))) from error


class Counts(Record):
    """Totals of a forwarder: connections `open` and `served`, bytes `up` and `down`."""

    open: int = 0
    served: int = 0
    up: int = 0
    down: int = 0


class Forwarder:
    """Listens on a local address and carries every connection to where `connect` leads.

    `connect(failed, route)` blocks, and returns a connected socket and a lease, or raises
    PlexctlError; `take()`, where given, returns at once a lease whose `route`, (family, address), the
    loop may connect to by itself, or None. A lease's `release()` is called when its connection is
    over; one whose `over` has been set meanwhile is not used. `Sessions` has both. Without
    sessions: `lambda *failed: (socket, lease)` will do.

    The address is bound when the object is made (PlexctlError if that fails) and served between
    `start` and `stop`. `report` takes lines, from the loop's thread.
    """

    def __init__(self, local: LocalAddress, connect: "Callable[..., Tuple[Any, Any]]",
                 take: "Optional[Callable[[], Any]]" = None,
                 report: "Callable[[str], None]" = lambda line: None,
                 allow_other_users: bool = False, verbose: bool = False,
                 poller: "Any" = None) -> None:
        self._connect = connect
        self._take = take
        self._report = report
        self._verbose = verbose
        self.unidentified = 0  # connections not served, since their clients had gone already
        self._told: "Set[str]" = set()
        self._connecting: "Dict[int, Any]" = {}
        self._dialled_for: "Set[Any]" = set()
        self._waiting: "Any" = collections.deque()
        self._connecting_threads = 0
        self._leases: "Dict[Pair, Any]" = {}
        self._ended = Counts()
        self._thread: "Optional[threading.Thread]" = None
        self._stopped = False
        self._moved = -1
        self._moved_on = self._owed_on = 0.0
        self._resume_on = 0.0
        self._capacity = count_capacity()
        self._server = create_listener(local, self)
        self.local = local
        if not local.path:
            self.local = LocalAddress(local.host, self._server.server_address[1])
        self._owners: "Optional[OwnerCheck]" = None
        try:
            self.relay = Relay(report, poller)
            if not allow_other_users:
                self._owners = self._create_owner_check()
        except OSError as error:
            self._server.server_close()
            raise PlexctlError("cannot carry connections: %s" % show_error(error)) from error
        self.relay.on_tick = self._tick

    def __enter__(self) -> "Forwarder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves from now on, in a thread."""
        if not self.local.path:
            set_leg_options(self._server.socket)  # Linux hands them on to what is accepted
        self.relay.handlers[self._server.fileno()] = self._accept
        self.relay.poller.register(self._server.fileno(), READABLE)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Takes the connections that wait already, and no more."""
        stopped = threading.Event()

        def finish() -> None:
            while self._server.fileno() >= 0 and self._accept():
                pass
            self._stop_listening()
            stopped.set()

        self.relay.post(finish)
        stopped.wait(CLOSE_SECONDS)
        self._owed_on = elapsed_seconds()

    def delivering(self) -> bool:
        """After `finish`: whether bytes of clients that have ended are still on their way, and move."""
        now, pairs = elapsed_seconds(), tuple(self._leases)
        owed = [pair for pair in pairs if pair.up.state != READING]
        moved = sum(pair.up.moved + pair.down.moved for pair in owed) + self._ended.up + self._ended.down
        if moved != self._moved:
            self._moved, self._moved_on = moved, now
        if owed or self._connecting or self._dialled_for:
            self._owed_on = now
        settled = SETTLE_SECONDS * (5 if pairs else 1)  # an end that the loop has not seen yet
        return now - self._moved_on < CLOSE_SECONDS and now - self._owed_on < settled

    def stop(self) -> None:
        """Stops listening and ends every connection, within CLOSE_SECONDS or so."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self.relay.post(self._stop_listening)
            self.relay.post(self._stop_dialling)
            self.relay.stop()
            thread.join(CLOSE_SECONDS + TICK_SECONDS)
        elif not self._stopped:
            self.relay.close()
        self._stopped = True
        self._server.server_close()
        if self._owners is not None:
            self._owners.close()

    def raise_limit(self) -> None:
        """Raises the process's limit of descriptors, and takes as many connections as that allows."""
        self._capacity = count_capacity(raise_limit=True)

    def reset_lease(self, lease: "Any") -> None:
        """Ends the connections that use `lease`; from any thread."""
        def reset() -> None:
            for pair, its in list(self._leases.items()):
                if its is lease:
                    pair.reset()
        self.relay.post(reset)

    def count(self) -> Counts:
        """The totals so far; from any thread."""
        pairs, ended = tuple(self._leases), self._ended
        return Counts(len(pairs), ended.served + len(pairs),
                      ended.up + sum(pair.up.moved for pair in pairs),
                      ended.down + sum(pair.down.moved for pair in pairs))

    # What the listener asks, in the loop's thread

    def may_serve(self, client_address: "Any") -> bool:
        """Whether the user behind this connection may use the port (section 7 of the design)."""
        if self._owners is None:
            return True
        uid = self._owners.find(client_address[:2])
        if uid in (0, os.geteuid()):
            return True
        if uid is None:
            self.unidentified += 1
            self._warn_once("a client had closed its connection before its owner could be asked for: not "
                            "served (clients that send and close at once want unix: or "
                            "--allow-other-users)")
        else:
            self._warn_once("turned away connections of uid %d (--allow-other-users lets other users "
                            "in)" % uid)
        return False

    def carry(self, client: "socket.socket", client_address: "Any") -> None:
        """Takes over an accepted connection."""
        if 2 * (len(self._leases) + len(self._connecting) + len(self._dialled_for)) >= self._capacity:
            self._warn_once("no more descriptors (ulimit -n): connections are refused")
            reset_on_close(client)
            client.close()
            return
        lease = self._take() if self._take else None
        if lease is None:
            self._connect_in_thread(client, client_address)
            return
        family, address = route = lease.route
        try:
            remote = socket.socket(family, socket.SOCK_STREAM)
        except OSError as failure:
            self._fail(client, lease, failure)
            return
        remote.setblocking(False)
        error = remote.connect_ex(address)
        if error in CONNECTING:  # on loopback it often is over a moment later
            error = remote.connect_ex(address)
        self._go_on((client, client_address, remote, lease, route), error)

    # Below: how

    def _create_owner_check(self) -> "Optional[OwnerCheck]":
        if self.local.path:
            return None
        if not is_loopback(self.local.host):
            self._report("warning: %s is not a loopback address: any user, here and elsewhere, can "
                         "use the port" % self.local)
            return None
        try:
            return OwnerCheck(self._server.address_family, (self.local.host, self.local.port))
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) in EXHAUSTED:
                self.relay.close()
                raise
            self._report("warning: this host cannot tell whose a connection is: any local user can "
                         "use the port")
            return None

    def _accept(self, events: int = READABLE) -> bool:
        """Up to ACCEPTS_PER_TURN connections; whether more may wait."""
        server = self._server
        for _ in range(ACCEPTS_PER_TURN):
            try:
                client, client_address = server.get_request()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in EXHAUSTED:  # do not spin
                    self._warn_once("cannot accept connections for now: %s" % show_error(error))
                    self.relay.poller.modify(server.fileno(), 0)
                    self._resume_on = elapsed_seconds() + PAUSE_SECONDS
                    return False
                continue  # that connection is gone already
            if server.verify_request(client, client_address):
                server.process_request(client, client_address)
            else:
                client.close()
        return True

    def _tick(self) -> None:
        now = elapsed_seconds()
        if self._resume_on and now >= self._resume_on:
            self._resume_on = 0.0
            self.relay.poller.modify(self._server.fileno(), READABLE)
        self._start_connecting()
        for attempt, deadline in list(self._connecting.values()):
            if now >= deadline:
                self._go_on(attempt, errno.ETIMEDOUT)

    def _go_on(self, attempt: "Any", error: int) -> None:
        """`attempt`: client, its address, remote, lease and route; `error`: what connect() said."""
        client, client_address, remote, lease, route = attempt
        fd = remote.fileno()
        try:
            if error in CONNECTING:
                if fd not in self._connecting:
                    self.relay.poller.register(fd, WRITABLE)
                    # connect() again tells how it stands
                    self.relay.handlers[fd] = lambda events: self._go_on(attempt, remote.connect_ex(route[1]))
                    self._connecting[fd] = attempt, elapsed_seconds() + CONNECT_SECONDS
                return
            self._forget_attempt(fd)
            if error not in (0, errno.EISCONN):
                raise OSError(error, os.strerror(error))
            set_leg_options(remote)
        except OSError as failure:
            remote.close()
            self._connect_in_thread(client, client_address, lease, route, failure)
        else:
            self._begin(client, client_address, remote, lease)

    def _forget_attempt(self, fd: int) -> None:
        if self._connecting.pop(fd, None):
            self.relay.poller.unregister(fd)
            del self.relay.handlers[fd]

    def _connect_in_thread(self, *job: "Any") -> None:
        """`job`: client, its address, and where a first attempt failed the lease, its route and the error."""
        self._dialled_for.add(job[0])
        self._waiting.append(job)
        self._start_connecting()

    def _start_connecting(self) -> None:
        while self._waiting and self._connecting_threads < CONNECTING_THREADS_MAX:
            if not start_thread(self._connect_one, *self._waiting[0]):  # _tick tries again
                return
            self._connecting_threads += 1
            self._waiting.popleft()

    def _connect_one(self, client: "socket.socket", client_address: "Any", *failed: "Any") -> None:
        try:
            remote, lease = self._connect(*failed)
        except Exception as error:
            self.relay.post(self._fail, client, None, error)
        else:
            self.relay.post(self._begin, client, client_address, remote, lease)
        self.relay.post(self._end_connecting)

    def _end_connecting(self) -> None:
        self._connecting_threads -= 1
        self._start_connecting()

    def _begin(self, client: "socket.socket", client_address: "Any", remote: "socket.socket",
               lease: "Any") -> None:
        self._dialled_for.discard(client)
        over = getattr(lease, "over", None)
        if over is not None:  # meanwhile; reset_lease did not see this connection
            remote.close()
            self._fail(client, lease, over)
            return
        try:
            self._leases[self.relay.add(client, remote, self._end)] = lease
        except OSError as error:  # stopped meanwhile, or the poller takes no more
            remote.close()
            self._fail(client, lease, error)
            return
        if self._verbose:
            self._report("connection %d from %s to %s" % (
                self._ended.served + len(self._leases),
                "%s:%d" % client_address[:2] if isinstance(client_address, tuple) else "a local process",
                join_host_port(*lease.route[1][:2])))

    def _end(self, pair: Pair) -> None:
        lease = self._leases.pop(pair)
        ended = self._ended
        ended.served += 1
        ended.up += pair.up.moved
        ended.down += pair.down.moved
        lease.release()
        if self._verbose:
            self._report("connection closed%s: %s up, %s down" % (
                " by a reset" if pair.broken else "", show_bytes(pair.up.moved),
                show_bytes(pair.down.moved)))

    def _fail(self, client: "socket.socket", lease: "Any", error: Exception) -> None:
        """A connection that could not be served is reset."""
        self._dialled_for.discard(client)
        if client.fileno() >= 0:  # not stopped meanwhile
            self._report("warning: a connection was not served: %s" % (
                error if isinstance(error, PlexctlError) else show_error(error)))
        if lease is not None:
            lease.release()
        reset_on_close(client)
        client.close()

    def _warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._report("warning: " + text)

    def _stop_listening(self) -> None:
        fd = self._server.fileno()
        if self.relay.handlers.pop(fd, None):
            self.relay.poller.unregister(fd)
            self._resume_on = 0.0
            self._server.server_close()

    def _stop_dialling(self) -> None:
        for (client, _, remote, lease, _), _ in list(self._connecting.values()):
            self._forget_attempt(remote.fileno())
            remote.close()
            lease.release()
            self._dialled_for.add(client)
        while self._waiting:
            _, _, *failed = self._waiting.popleft()
            if failed:
                failed[0].release()
        for client in self._dialled_for:
            reset_on_close(client)
            client.close()


def count_capacity(raise_limit: bool = False) -> int:
    """How many descriptors connections may take, so that some are left for everything else.

    `raise_limit` first raises the soft limit of the process to the hard one.
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except ImportError:  # Windows, where select() takes 512
        return 500
    if raise_limit:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS has a lower limit of its own
            pass
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(2, soft - RESERVED_DESCRIPTORS)


class StdioRelay:
    """One connection between descriptors 0 and 1 and a remote socket, with blocking threads.

    The file status flags of the descriptors are left alone: they may be somebody's terminal.
    `on_end` is called once it is over, from one of the threads; then `error` says why it failed
    (PlexctlError) or is None. `up` and `down` count bytes.
    """

    def __init__(self, remote: "socket.socket", on_end: "Callable[[], None]") -> None:
        self.error: "Optional[PlexctlError]" = None
        self.up = self.down = 0
        self.over = False
        self._half_closed = False
        self._remote = remote
        self._on_end = on_end
        self._ended: "List[Any]" = []

    def start(self) -> None:
        """Starts both directions."""
        for copy in (self._copy_up, self._copy_down):
            threading.Thread(target=self._run, args=(copy,), daemon=True).start()

    def _run(self, copy: "Callable[[], None]") -> None:
        try:
            copy()
        except PlexctlError as error:
            self.error = error
        except Exception as error:
            self.error = PlexctlError("the connection ended: %s" % show_error(error))
        self._ended.append(copy)
        # a terminal would wait for a key that nobody needs any more
        if self.error or len(self._ended) == 2 or copy == self._copy_down and os.isatty(0):
            self.over = True
            self._on_end()

    def _copy_up(self) -> None:
        while True:
            try:
                piece = os.read(0, CHUNK_BYTES)
            except BlockingIOError:
                wait_for(0, READABLE)
                continue
            except OSError:  # EIO: the terminal is gone
                piece = b""
            try:
                if not piece:
                    self._half_closed = True
                    self._remote.shutdown(socket.SHUT_WR)
                    return
                self._remote.sendall(piece)
                self.up += len(piece)
            except OSError:  # what the other side sent before is still delivered
                return

    def _copy_down(self) -> None:
        view = memoryview(bytearray(BULK_BESIDE_OTHERS_BYTES))
        while True:
            try:
                count = self._remote.recv_into(view)
                if not count and not self._half_closed:  # after a reset whose error sendall consumed
                    self._remote.getpeername()
            except OSError as error:
                raise PlexctlError("the connection ended: %s" % show_error(error)) from error
            if not count:  # the reader sees the end; the descriptor's number stays taken
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.close(nowhere)
                return
            piece = view[:count]
            while piece:
                try:
                    written = os.write(1, piece)
                except BlockingIOError:
                    wait_for(1, WRITABLE)
                    continue
                except OSError as error:
                    reset_on_close(self._remote)
                    raise PlexctlError("cannot write to standard output: %s"
                                       % show_error(error)) from error
                self.down += written
                piece = piece[written:]


def wait_for(fd: int, mask: int, seconds: "Optional[float]" = None) -> bool:
    """Waits until a descriptor is ready, for ever or for so long; whether it is."""
    if sys.platform.startswith("linux"):  # where poll() takes terminals as well, and any number
        poller = select.poll()
        poller.register(fd, mask)
        return bool(poller.poll(None if seconds is None else seconds * 1000))
    ready = select.select([fd] if mask == READABLE else [], [fd] if mask == WRITABLE else [], [], seconds)
    return bool(ready[0] or ready[1])


def notify_systemd(state: str, environ: "Mapping[str, str]") -> None:
    """sd_notify(3), for units of Type=notify."""
    path = environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@") or not hasattr(socket, "AF_UNIX"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1.0)
            sock.sendto(state.encode("ascii"), "\0" + path[1:] if path[0] == "@" else path)
    except OSError:
        pass


def is_executable(path: str) -> bool:
    """False for a script that names no interpreter, or one that is not there."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:  # may be executed, though not read
        return True
    if head[:2] == b"#!":
        return os.path.exists((head[2:].split() or [b""])[0])
    return os.name != "posix" or b"\0" in head


def find_command(name: str, environ: "Mapping[str, str]") -> str:
    """The program a COMMAND names; exit 127 or 126 as a shell would, before anything is issued."""
    path = environ.get("PATH", os.defpath)
    found = shutil.which(name, path=path)
    if found and is_executable(found):
        return found
    if shutil.which(name, os.F_OK, path) or os.path.dirname(name) and os.path.exists(name):
        raise PlexctlError("%s: cannot be executed" % escape(name), EXIT_NOT_EXECUTABLE)
    raise PlexctlError("%s: command not found" % escape(name), EXIT_NOT_FOUND)


# ---------------------------------------------------------------------------------------- output


def format_text(document: "Dict[str, Any]") -> str:
    """A header line and a row, columns aligned."""
    cells = dict(document, target=join_host_port(**document["target"]))
    header = row = ""
    for name in ("local_addr", "listener_endpoint", "target", "session_id", "expires_at"):
        cell = escape(cells[name])
        width = max(len(name), len(cell)) + 2
        header += name.upper().ljust(width)
        row += cell.ljust(width)
    return "%s\n%s\n" % (header.rstrip(), row.rstrip())


def format_json(document: "Dict[str, Any]") -> str:
    """One line of JSON, ASCII only."""
    return json.dumps(document) + "\n"


def format_yaml(document: "Dict[str, Any]", indent: str = "") -> str:
    """The same keys; every string quoted as JSON quotes it, which YAML 1.2 reads the same way."""
    text = ""
    for key, value in document.items():
        is_nested = isinstance(value, dict)
        shown = "\n" + format_yaml(value, indent + "  ") if is_nested else " %s\n" % json.dumps(value)
        text += "%s%s:%s" % (indent, key, shown)
    return text


FORMATS = {"text": format_text, "json": format_json, "yaml": format_yaml}


def write_all(stream: "Optional[IO[str]]", text: str) -> None:
    """Writes ASCII text past Python's buffer, so that nothing is left to fail at exit; OSError."""
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


def is_writable(stream: "Optional[IO[str]]", seconds: float) -> bool:
    """Whether a line can be written without blocking; waits for that so long."""
    try:
        return wait_for(stream.fileno(), WRITABLE, max(0.0, seconds))  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):  # closed, or not a file: writing tells
        return True


class Console:
    """The main thread's place: it writes to stderr, and waits for signals and other threads.

    Any thread may `report` a line; only the main thread writes it, in `wait`, `call` or `flush`.
    A signal is raised as Interrupted by the next wait; `signals` holds all of them, but for the
    `ignored` ones.
    """

    def __init__(self, stream: "Optional[IO[str]]", live: bool) -> None:
        self.stream = stream
        self.signals: "List[int]" = []
        self.ignored: "Tuple[int, ...]" = ()
        self._live = live and stream is not None and stream.isatty()
        self._shown = 0
        self._raised = 0
        self._finishing = False
        self._lines: "Any" = collections.deque()
        self.waker = Waker()

    def report(self, line: str) -> None:
        """One line for stderr; from any thread."""
        self._lines.append(line)
        self.waker.wake()

    def flush(self, seconds: float = 0.0) -> None:
        """Writes what was reported and wipes the live line, as far as stderr takes it in `seconds`.

        A stderr that takes nothing (a full pipe, a terminal stopped by Ctrl-S) is no reason to
        stop, nor to keep a signal waiting.
        """
        deadline = elapsed_seconds() + seconds
        while (self._lines or self._shown) and is_writable(self.stream, deadline - elapsed_seconds()):
            self._redraw("plexctl: %s\n" % self._lines.popleft() if self._lines else "")

    def show(self, line: str) -> None:
        """Draws the live line, cut to the terminal; nothing where there is no terminal."""
        if not self._live or not is_writable(self.stream, 0) or self._in_background():
            return
        line = line[:self._width() - 1]
        self._redraw(line)
        self._shown = len(line)

    def write(self, text: str, stream: "Optional[IO[str]]", name: str) -> None:
        """Writes text to a stream at once; PlexctlError unless all of it was taken."""
        self.flush()
        try:
            self.call(lambda: write_all(stream, text))
        except (OSError, ValueError) as error:
            raise PlexctlError("cannot write to %s: %s" % (name, show_error(error))) from error

    def wait(self, seconds: float) -> None:
        """Until something happens, `seconds` at most. Raises Interrupted for a signal."""
        pending = len(self.signals) > self._raised
        if wait_for(self.waker.fileno(), READABLE, 0 if pending and not self._finishing else seconds):
            self.waker.clear()
        if self._lines:  # or the live line is left alone
            self.flush()
        if len(self.signals) > self._raised and not self._finishing:
            self._raised += 1
            raise Interrupted(self.signals[self._raised - 1])

    def call(self, function: "Callable[[], Any]", status: "Optional[Callable[[], str]]" = None) -> "Any":
        """What `function` returns or raises, run in a thread, so that a signal ends the wait."""
        self.wait(0)  # a signal that is here already: then nothing is begun
        outcome = self._start(function)
        while not outcome:
            self.wait(TICK_SECONDS)
            if status is not None and not outcome:
                self.show(status())
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def finish(self, function: "Callable[[], None]", seconds: float) -> None:
        """Runs what must still be done, for `seconds` at most; a further signal cuts it short."""
        self._finishing = True
        outcome = self._start(function)
        deadline = elapsed_seconds() + seconds
        while not outcome and elapsed_seconds() < deadline:
            if len(self.signals) > self._raised:
                deadline = min(deadline, elapsed_seconds() + HURRY_SECONDS)
            self.wait(max(0.0, deadline - elapsed_seconds()))

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

    def _in_background(self) -> bool:
        """Whether the terminal is another process group's now (`plexctl ... &`)."""
        try:
            return os.tcgetpgrp(self.stream.fileno()) != os.getpgrp()  # type: ignore[union-attr]
        except (OSError, ValueError, AttributeError):
            return False

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80  # type: ignore[union-attr]
        except (OSError, ValueError):
            return 80

    def _redraw(self, text: str) -> None:
        """Writes `text` in place of the live line, as far as stderr takes it."""
        if self._shown:
            rows = (self._shown - 1) // self._width()  # more than one after the window was narrowed
            text = ("\x1b[%dA" % rows if rows else "") + "\r\x1b[J" + text
            self._shown = 0
        try:
            write_all(self.stream, text)
        except (OSError, ValueError):
            pass


# ---------------------------------------------------------------------------------- command line

DESCRIPTION = """\
usage: plexctl [flags] tcp-forward --project-id UUID --resource-id UUID --host HOST --port PORT
               [flags] [--proxy | --stdio | -- COMMAND [ARG ...]]

Issues a one-time mediated session to a TCP target behind a Node, and prints the local address and
the listener endpoint. With --proxy, --stdio or -- COMMAND it also carries the bytes, and revokes
the session at the end.

what to reach:
  --project-id UUID     owning Project (required)
  --resource-id UUID    target Resource (required)
  --host HOST           target host the tunnel forwards to (required)
  --port PORT           target port, 1 to 65535 (required)
  --local-addr ADDR     local address: 127.0.0.1:0 (default), [::1]:0, unix:/path
  --ttl-seconds N       requested lifetime; 0: the server's default
  --reveal-secrets      print the session token to stderr; audit-logged

how:
  --proxy               carry connections until the session ends or a signal comes
  --stdio               carry one connection over stdin and stdout (ssh's ProxyCommand)
  -- COMMAND [ARG ...]  carry connections while COMMAND runs, exit with its status; {host}, {port}
                        and {addr} in its arguments, PLEXCTL_LOCAL_HOST, _PORT and _ADDR in its
                        environment say where
  --wait-seconds N      how long to wait for the Node to report its listener (default 90)
  --max-sessions N      sessions the proxy may hold at once, 1 to 32 (default 1)
  --renew               issue a new session when one has run out, instead of ending
  --keep-session        do not revoke on exit
  --allow-other-users   let other local users use the local port

persistent flags, before or after the command:
  --server URL          control plane (or PLEXSPHERE_URL, or a profile)
  --profile NAME        profile of ~/.config/plexctl/config.json
  --token-file PATH     bearer token, mode 0600; - is stdin (or PLEXSPHERE_TOKEN, or a profile)
  --output FORMAT       text (default), json or yaml
  --ca-file PATH        PEM bundle instead of the system's trust
  --allow-http          permit a plain-http server that is not loopback
  --yes                 accepted, does nothing here
  -v, --verbose         say more on stderr
  --version             print the version
  -h, --help            print this

exit codes: 0 done, 1 failure, 2 usage, 3 credentials, 4 forbidden, 77 ReBAC denial, COMMAND's own
"""

NO_COMMAND = "no such command; the one there is: tcp-forward"


def parse_word(text: str) -> str:
    """Any text but none; a path may hold what is not printable."""
    if not text or "\0" in text:
        raise ValueError("must not be empty")
    return text


def parse_switch(text: str) -> bool:
    """The value of a boolean flag; a bare --flag was made --flag=true before."""
    if text not in ("true", "false"):
        raise ValueError("takes true or false, or nothing")
    return text == "true"


REQUIRED_FLAGS: "Dict[str, Callable[[str], Any]]" = {
    "--project-id": parse_uuid, "--resource-id": parse_uuid, "--host": parse_target_host,
    "--port": parse_port}
PERSISTENT_FLAGS: "Dict[str, Callable[[str], Any]]" = {
    "--server": parse_word, "--profile": parse_word, "--token-file": parse_word,
    "--output": one_of(*FORMATS), "--ca-file": parse_word, "--allow-http": parse_switch,
    "--reveal-secrets": parse_switch, "--yes": parse_switch}
FORWARD_FLAGS: "Dict[str, Callable[[str], Any]]" = dict(
    REQUIRED_FLAGS, **PERSISTENT_FLAGS, **{
        "--local-addr": parse_local_address, "--ttl-seconds": lambda text: parse_int(text, 0, 10 ** 9),
        "--wait-seconds": parse_seconds, "--max-sessions": lambda text: parse_int(text, 1, 32),
        "--proxy": parse_switch, "--stdio": parse_switch, "--renew": parse_switch,
        "--keep-session": parse_switch, "--allow-other-users": parse_switch})
DEFAULTS = {"--output": "text", "--ttl-seconds": 0, "--wait-seconds": 90.0}


def split_arguments(argv: "Sequence[str]") -> "Tuple[List[str], Optional[List[str]], str]":
    """The flags before `--`, each one word; the COMMAND behind it; and what -h or --version prints.

    argparse would take the value of an unknown flag for a command, and show it; and the -h of a
    COMMAND that stands without `--` for ours.
    """
    flags: "List[str]" = []
    end = argv.index("--") if "--" in argv else len(argv)
    known, takes_value = PERSISTENT_FLAGS, False
    for argument in argv[:end]:
        flag, equals, _ = argument.partition("=")
        is_flag = argument[:1] == "-" and not set(argument[1:2]) <= DIGITS
        if argument in ("-h", "--help", "--version"):
            return [], None, "plexctl %s\n" % __version__ if argument == "--version" else DESCRIPTION
        if takes_value and not is_flag:
            flags[-1] += "=" + argument
            takes_value = False
        elif not is_flag:
            if known is FORWARD_FLAGS:
                raise UsageError("unexpected argument after the command: a COMMAND stands behind --")
            if argument != "tcp-forward":
                raise UsageError(NO_COMMAND)
            known = FORWARD_FLAGS
        elif argument == "--verbose" or not argument[1:].strip("v"):
            # 3.6 and 3.7 do not take -vv apart where abbreviations are off
            flags += ["-v"] * (1 if argument == "--verbose" else len(argument) - 1)
            takes_value = False
        elif flag in known:
            if argument == flag + "=--":  # argparse would drop it, up to 3.12
                raise UsageError("%s: must not be --" % flag)
            takes_value = not equals and known[flag] is not parse_switch
            flags.append(argument if equals or takes_value else flag + "=true")
        elif flag == "--verbose" or flag[:2] == "-v":
            raise UsageError("--verbose: takes no value")
        elif flag in FORWARD_FLAGS:
            raise UsageError("%s: goes behind the command, tcp-forward" % flag)
        else:
            raise UsageError("unknown flag %s" % escape(flag if flag[:2] == "--" else flag[:2], 40))
    if known is not FORWARD_FLAGS:
        raise UsageError(NO_COMMAND)
    return flags, list(argv[end + 1:]) if end < len(argv) else None, ""


def create_parser() -> "argparse.ArgumentParser":
    """The parser of what `split_arguments` let through; a persistent flag may stand there twice."""
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":  # no value and no control character in it
            message = message.replace("the following arguments are required", "missing")
            raise UsageError(escape(message.replace("argument ", "", 1)))

    def checked(parse: "Callable[[str], Any]") -> "Callable[[str], Any]":
        def convert(text: str) -> "Any":
            try:
                return parse(text)
            except ValueError as error:  # argparse would show the value that it refuses
                raise argparse.ArgumentTypeError(str(error)) from None
        return convert

    # a width, or each add_argument would import shutil to ask the terminal for one
    parser = Parser(prog="plexctl", add_help=False, allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))
    for flag, parse in FORWARD_FLAGS.items():
        parser.add_argument(flag, type=checked(parse), required=flag in REQUIRED_FLAGS,
                            default=DEFAULTS.get(flag, False if parse is parse_switch else None))
    parser.add_argument("-v", "--verbose", action="count", default=0)
    return parser


def parse_arguments(flags: "Sequence[str]", command: "Optional[List[str]]") -> "argparse.Namespace":
    """The options, from what `split_arguments` returned; UsageError where they are not right."""
    options = create_parser().parse_args(flags)
    options.command = command
    check_together(options)
    return options


def check_together(options: "argparse.Namespace") -> None:
    """Flags that exclude or need one another; fills in `mode` and the default of --local-addr."""
    modes = [name for name, given in (("--proxy", options.proxy), ("--stdio", options.stdio),
                                      ("-- COMMAND", options.command is not None)) if given]
    if len(modes) > 1:
        raise UsageError("%s and %s exclude each other" % tuple(modes[:2]))
    if options.command is not None and not (options.command and options.command[0]):
        raise UsageError("--: a COMMAND must follow")
    for flag, given in (("--renew", options.renew), ("--keep-session", options.keep_session),
                        ("--allow-other-users", options.allow_other_users),
                        ("--max-sessions", options.max_sessions)):
        if given and not modes:
            raise UsageError("%s needs --proxy, --stdio or -- COMMAND" % flag)
    if not modes and options.local_addr and options.local_addr.path:
        raise UsageError("--local-addr unix: needs --proxy or -- COMMAND")
    if options.stdio and options.local_addr:
        raise UsageError("--local-addr does not go with --stdio, which has no local socket")
    if options.stdio and is_standard_input(options.token_file or ""):
        raise UsageError("--token-file - does not go with --stdio: both read standard input")
    if options.server:
        check_server(options.server, "--server", options.allow_http)
    options.mode = modes[0] if modes else "print"
    options.local_addr = options.local_addr or LocalAddress("127.0.0.1", 0)


class Run:
    """One invocation: the options, and what every mode of it needs."""

    def __init__(self, options: "argparse.Namespace", environ: "Mapping[str, str]", console: Console,
                 stdout: "Optional[IO[str]]") -> None:
        self.options = options
        self.environ = environ
        self.console = console
        self.stdout = stdout
        self.request = SessionRequest(options.project_id, options.resource_id, options.host,
                                      options.port, options.ttl_seconds)

    def execute(self) -> int:
        """The exit code. PlexctlError and Interrupted leave no session behind either."""
        options, console = self.options, self.console
        program = find_command(options.command[0], self.environ) if options.command else ""
        server, token = console.call(lambda: resolve_credentials(
            options.server, options.profile, options.token_file, options.allow_http, self.environ))
        self.server = server
        if __name__ == "__main__" and server.scheme == "http":
            sys.modules.setdefault("ssl", None)  # type: ignore  # urllib would load it: 4 ms for nothing
        plane = ControlPlane(server, token, options.ca_file, self.environ,
                             report=console.report if options.verbose else lambda line: None)
        self.audit = AuditLog(self.environ, console.report) if options.reveal_secrets else None
        self.sessions = Sessions(plane, self.request, console.report, options.max_sessions or 1,
                                 options.renew and not options.stdio, options.wait_seconds)
        try:
            if options.mode == "print":
                return self.print_coordinates()
            if __name__ == "__main__":
                gc.enable()
            if options.mode == "--stdio":
                return self.carry_stdio()
            return self.forward(program)
        finally:
            console.finish(self.sessions.leave, LEAVE_SECONDS)
            for words in self.sessions.left_behind():
                console.report("warning: " + words)
            if self.audit is not None:  # not before: an interrupted record may still be on its way
                self.audit.close()

    def establish(self) -> Lease:
        """The first session, and its token where it is to be revealed."""
        began = elapsed_seconds()
        lease = self.console.call(self.sessions.establish, lambda: "waiting for the Node: %s"
                                  % show_seconds(elapsed_seconds() - began))  # type: Lease
        if self.audit is not None:
            audit = self.audit
            self.console.call(lambda: audit.record(self.server, self.request, lease.issued))
            self.console.write("plexctl: warning: the next line is the session token, a secret\n"
                               "PLEXCTL_SESSION_TOKEN=%s\n" % lease.issued.token.reveal(),
                               self.console.stream, "standard error")
        if self.options.keep_session:
            self.sessions.keep()
        return lease

    def print_document(self, local: LocalAddress, lease: Lease) -> None:
        """The one document of stdout; PlexctlError unless all of it was taken."""
        document = {"session_id": lease.issued.session_id, "kind": "tcp", "local_addr": str(local),
                    "listener_endpoint": str(lease.endpoint),
                    "target": {"host": self.request.host, "port": self.request.port},
                    "expires_at": lease.issued.expires_at}
        self.console.write(FORMATS[self.options.output](document), self.stdout, "standard output")

    def print_coordinates(self) -> int:
        """Print mode: nothing is bound for longer than a moment, nothing dialled or revoked."""
        local = self.options.local_addr
        if not local.port:
            local = LocalAddress(local.host, bind_for_a_moment(local))
        lease = self.establish()
        self.print_document(local, lease)
        self.sessions.keep()
        return EXIT_OK

    def carry_stdio(self) -> int:
        """--stdio: one connection over descriptors 0 and 1."""
        self.establish()
        remote, _ = self.console.call(self.sessions.connect)
        relay = StdioRelay(remote, self.console.waker.wake)
        began, reason = elapsed_seconds(), "interrupted"
        relay.start()
        try:
            while not relay.over:
                self.watch_sessions()
            if relay.error is not None:
                raise relay.error
            reason = "connection closed"
        except (PlexctlError, Interrupted) as error:
            reason = str(error)
            raise
        finally:
            self.console.report(describe_total(Counts(0, 1, relay.up, relay.down), began, reason))
            if reason != "connection closed":
                reset_on_close(remote)
            remote.close()
        return EXIT_OK

    def forward(self, program: str) -> int:
        """--proxy and -- COMMAND: the local socket is bound first, an address in use costs nothing."""
        options, console, sessions = self.options, self.console, self.sessions
        began, reason = elapsed_seconds(), "interrupted"
        with Forwarder(options.local_addr, sessions.connect, sessions.take, console.report,
                       options.allow_other_users, options.verbose > 0) as forwarder:
            lease = self.establish()
            sessions.on_retired = forwarder.reset_lease
            try:
                forwarder.start()
                notify_systemd("READY=1", self.environ)
                if program:
                    status = self.run_command(program, forwarder)
                    reason = "COMMAND ended"
                    return status
                forwarder.raise_limit()
                self.print_document(forwarder.local, lease)
                while True:
                    self.watch_sessions()
                    console.show(self.describe_now(forwarder))
            except (PlexctlError, Interrupted) as error:
                reason = str(error)
                raise
            finally:
                console.ignored = ()
                notify_systemd("STOPPING=1", self.environ)
                console.finish(forwarder.stop, CLOSE_SECONDS + 1)
                if forwarder.unidentified:
                    reason += "; %d not served, closed before their owner could be asked for" % (
                        forwarder.unidentified)
                console.report(describe_total(forwarder.count(), began, reason))

    def watch_sessions(self, seconds: float = TICK_SECONDS) -> None:
        """One turn of waiting; raises what ended the sessions."""
        self.console.wait(seconds)
        self.sessions.tick()
        if self.sessions.over is not None:
            raise self.sessions.over

    def describe_now(self, forwarder: Forwarder) -> str:
        """The live line."""
        counts = forwarder.count()
        return "%s -> %s  %d open, %d served  up %s  down %s  %s left" % (
            forwarder.local, escape(join_host_port(self.request.host, self.request.port), 60),
            counts.open, counts.served, show_bytes(counts.up), show_bytes(counts.down),
            show_seconds(self.sessions.seconds_left()))

    def run_command(self, program: str, forwarder: Forwarder) -> int:
        """-- COMMAND: its terminal, Ctrl-C and Ctrl-\\ are its own, other signals are handed on."""
        console = self.console
        console.wait(0)
        console.ignored = (2, 3)  # SIGINT and SIGQUIT
        child = self.start_command(program, forwarder.local)
        forwarder.raise_limit()  # after the start of COMMAND, which keeps the limits it was given
        has_port = True
        while child.poll() is None:
            try:
                if has_port:
                    self.watch_sessions()
                else:
                    console.wait(TICK_SECONDS)
            except Interrupted as interrupted:
                try:
                    child.send_signal(interrupted.signum)
                except ProcessLookupError:  # it ended just now
                    pass
                if len(console.signals) > 1:
                    raise
            except PlexctlError as error:
                console.report("warning: %s; the port is closed, COMMAND goes on" % error)
                forwarder.stop()
                has_port = False
        console.ignored = ()
        if has_port:  # what COMMAND sent right before its end still arrives
            forwarder.finish()
            try:
                while forwarder.delivering():
                    self.watch_sessions(0.02)
            except PlexctlError as error:
                console.report("warning: %s" % error)
        status = int(child.returncode)
        return status if status >= 0 else EXIT_SIGNAL_BASE - status

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
            has_token = is_standard_input(self.options.token_file or "")
            stdin = subprocess.DEVNULL if has_token else None
            child = subprocess.Popen(arguments, executable=program, env=environ, stdin=stdin)
        except (OSError, ValueError) as error:
            raise PlexctlError("%s: cannot be executed: %s" % (escape(arguments[0]), show_error(error)),
                               EXIT_NOT_EXECUTABLE) from error

        def await_end() -> None:
            child.wait()
            self.console.waker.wake()

        start_thread(await_end)  # else run_command sees it at its next turn
        return child


def bind_for_a_moment(local: LocalAddress) -> int:
    """A port that is free now."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in local.host else socket.AF_INET) as sock:
            sock.bind((local.host, 0))
            return int(sock.getsockname()[1])
    except OSError as error:
        raise PlexctlError("--local-addr %s: cannot be bound: %s" % (local, show_error(error))) from error


def describe_total(counts: Counts, began: float, reason: str) -> str:
    """The line at the end."""
    return "%d connection%s, %s up, %s down, %s: %s" % (
        counts.served, "" if counts.served == 1 else "s", show_bytes(counts.up),
        show_bytes(counts.down), show_seconds(elapsed_seconds() - began), reason)


# ------------------------------------------------------------------------------------------ main


def reserve_standard_descriptors() -> None:
    """Nothing that is opened later may become descriptor 0, 1 or 2 and be written to by mistake."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number; writing to it fails


def handle_signals(console: Console) -> "Callable[[], None]":
    """What would end the process goes to the console, the third of them ends the process at once.

    Of the rarer ones only those that nobody else in the process has a handler for. Returns what
    puts the handlers back that were there before.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handle(signum: int, frame: object) -> None:
        if signum not in console.ignored:
            console.signals.append(signum)
            if len(console.signals) > 2:
                end_by_signal(signum)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM"):
        signum = getattr(signal, name, None)
        if signum is None:
            continue
        current = signal.getsignal(signum)
        if current == signal.SIG_DFL or name in ("SIGINT", "SIGTERM", "SIGHUP") \
                and current != signal.SIG_IGN:  # nohup, &
            before[signum] = signal.signal(signum, handle)
    quiet: "Dict[str, Any]" = {"warn_on_full_buffer": False} if sys.version_info >= (3, 7) else {}
    wakeup = signal.set_wakeup_fd(console.waker.written_fd(), **quiet)

    def restore() -> None:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)

    return restore


def end_by_signal(signum: int) -> None:
    """Ends the process as the signal would have: a shell sees 128 + n and stops its loops."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def perform(argv: "Optional[Sequence[str]]" = None,
            environ: "Optional[Mapping[str, str]]" = None) -> "Tuple[int, int]":
    """The command, as an exit code and the number of the signal that ended it (0: none)."""
    prints = ""
    try:
        flags, command, prints = split_arguments(sys.argv[1:] if argv is None else argv)
        if prints:
            write_all(sys.stdout, prints)
            return EXIT_OK, 0
        options = parse_arguments(flags, command)
        console = Console(sys.stderr, options.mode in ("print", "--proxy"))
        restore_handlers = handle_signals(console)
    except PlexctlError as error:
        return fail(str(error), error.exit_code), 0
    except (OSError, ImportError) as error:  # no descriptors to load a module with
        return fail("cannot %s: %s" % ("write to standard output" if prints else "start",
                                       show_error(error)), EXIT_FAILURE), 0
    status, signum = EXIT_FAILURE, 0
    try:
        status = Run(options, os.environ if environ is None else environ, console, sys.stdout).execute()
    except Interrupted as interrupted:
        signum = interrupted.signum
        status = EXIT_SIGNAL_BASE + signum
    except PlexctlError as error:
        status = error.exit_code
        console.report("error: %s" % error)
    except Exception as error:  # a defect; its text may hold what it was given
        console.report("error: internal error: %s" % show_error(error))
    finally:
        console.flush(HURRY_SECONDS)
        restore_handlers()
        console.waker.close()
    return status, signum


def fail(message: str, status: int) -> int:
    """The one line of an error."""
    try:
        write_all(sys.stderr, "plexctl: error: %s\n" % message)
    except (OSError, ValueError):
        pass
    return status


def main(argv: "Optional[Sequence[str]]" = None,
         environ: "Optional[Mapping[str, str]]" = None) -> int:
    """The command. Returns the exit code, 128 + n where signal n ended it; raises nothing."""
    return perform(argv, environ)[0]


def run() -> None:
    """The process: the command, then its end.

    os._exit, since what Python does at exit could still change the status: a flush that fails
    (120), a thread that was given up on and wakes up. Everything is written and closed by then.
    """
    reserve_standard_descriptors()
    try:
        status, signum = perform()
        if signum:
            end_by_signal(signum)
        os._exit(status)
    except KeyboardInterrupt:  # before the handlers were there, or after
        end_by_signal(2)


if __name__ == "__main__":
    run()
