#!/usr/bin/env python3
"""Every system call that plexctl makes after its first statement fails once, with each error it can give.

    python3 .ci/torture.py                           all of them, in every mode: some 10,000, an hour
    python3 .ci/torture.py --sample 0.05 --seed 7    every twentieth, drawn by the seed
    python3 .ci/torture.py --case proxy:poll:9:ENOMEM
    python3 .ci/torture.py --list --mode stdio       what there is

strace records an undisturbed run of each mode; what stands behind the reading of the script is plexctl's.
Then each call is let fail, in a run of its own: the n-th call of that name since the script's first
statement, counted over all threads. strace's own injection counts each thread by itself: `when=3` would hit
the third call of every one of them, the main thread's while Python starts. So the fault is put in through a
seccomp filter that asks this program about the calls of one name (user notification, seccomp(2)). The order
of calls varies between runs; what is reported is what was hit.

After each: an exit code that the mode allows; one clear line on stderr if it failed, and none or warnings if
it survived; no traceback, no secret, no session left without a word, no hang. Linux 5.5, Python 3.9 or later.
"""

import ctypes
import errno
import fcntl
import functools
import os
import platform
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import modes

DEADLINE_SECONDS = 60  # niced beside a load, a start alone may take 20
NO_DESCRIPTORS = ("EMFILE", "ENFILE", "ENOMEM")
NO_MEMORY, FILE_ERRORS = ("EAGAIN", "ENOMEM"), ("EMFILE", "ENOMEM", "EACCES", "EIO")
CAN_FAIL = {
    "openat": FILE_ERRORS, "open": FILE_ERRORS, "read": ("EIO",), "readv": ("EIO",),
    "write": ("EIO", "ENOSPC", "EPIPE"),
    "newfstatat": ("EIO",), "fstat": ("EIO", "ENOMEM"), "stat": ("EIO", "ENOMEM"), "lstat": ("EIO", "ENOMEM"),
    "statx": ("EIO", "ENOMEM"), "lseek": ("EIO",), "close": ("EIO",), "getdents64": ("EIO", "ENOMEM"),
    "readlink": ("EIO",), "access": ("EACCES",), "fsync": ("EIO", "ENOSPC"), "ioctl": ("EIO",),
    "mkdir": ("EACCES", "ENOSPC", "EROFS"), "mkdirat": ("EACCES", "ENOSPC", "EROFS"),
    "chmod": ("EPERM", "EROFS"), "fchmod": ("EPERM", "EROFS"), "fchmodat": ("EPERM", "EROFS"),
    "unlink": ("EACCES", "EROFS"), "fcntl": ("EMFILE",), "dup": ("EMFILE",), "dup2": ("EMFILE",),
    "dup3": ("EMFILE",), "pipe2": NO_DESCRIPTORS[:2], "eventfd2": NO_DESCRIPTORS,
    "epoll_create1": NO_DESCRIPTORS, "epoll_ctl": ("ENOMEM", "ENOSPC"), "epoll_wait": ("EINTR", "ENOMEM"),
    "epoll_pwait": ("EINTR", "ENOMEM"), "poll": ("EINTR", "ENOMEM"), "ppoll": ("EINTR", "ENOMEM"),
    "socket": NO_DESCRIPTORS + ("ENOBUFS", "EAFNOSUPPORT"), "socketpair": NO_DESCRIPTORS,
    "bind": ("EADDRINUSE", "EACCES", "EADDRNOTAVAIL"), "listen": ("EADDRINUSE",),
    "accept4": NO_DESCRIPTORS + ("ENOBUFS", "ECONNABORTED"), "accept": NO_DESCRIPTORS + ("ENOBUFS",),
    "connect": ("ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "EADDRNOTAVAIL"), "getsockname": ("ENOBUFS",),
    "getpeername": ("ENOTCONN",), "setsockopt": ("ENOBUFS", "ENOMEM"), "getsockopt": ("ENOBUFS",),
    "shutdown": ("ENOTCONN",), "recvfrom": ("ECONNRESET", "ENOMEM", "ETIMEDOUT"),
    "sendto": ("ECONNRESET", "EPIPE", "ENOBUFS", "ENOMEM"), "recvmsg": ("ECONNRESET", "ENOMEM"),
    "sendmsg": ("ECONNRESET", "ENOBUFS"), "prlimit64": ("EPERM",), "mmap": ("ENOMEM",),
    "mprotect": ("ENOMEM",), "mremap": ("ENOMEM",), "clone": NO_MEMORY, "clone3": NO_MEMORY,
    "vfork": NO_MEMORY, "fork": NO_MEMORY, "execve": ("ENOENT", "EACCES", "ENOMEM", "ETXTBSY")}
CANNOT_FAIL = set((  # with valid arguments; or it is not plexctl's, and nobody looks at its result
    "exit exit_group kill rt_sigaction rt_sigprocmask rt_sigreturn restart_syscall sigaltstack sched_yield "
    "set_tid_address gettid getpid getuid geteuid getgid getegid getpgrp getppid uname sysinfo umask "
    "clock_gettime set_robust_list rseq sched_getaffinity arch_prctl prctl pread64 fadvise64 madvise munmap "
    "brk "  # malloc takes mmap instead
    "futex "  # an error that glibc and Python do not know ends the process (abort)
    "getrandom clock_nanosleep "  # Python retries EINTR
    "getcwd "  # Python's own
    "close_range setsid wait4 waitid").split())  # of a child that is new, or ours alone
LOST = ("ECONNRESET", "EPIPE", "ETIMEDOUT", "ENOTCONN")  # what a TCP socket has once its peer is lost
FIONBIO, FIOCLEX, F_DUPFD, F_DUPFD_CLOEXEC = 0x5421, 0x5451, 0, 1030
FRAMES_BYTES, MAP_PRIVATE_ANONYMOUS = 16384, 0x22
SECCOMP_NUMBER = {"x86_64": 317, "aarch64": 277}.get(platform.machine())
PR_SET_NO_NEW_PRIVS, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 38, 1, 8
SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, USER_NOTIF_FLAG_CONTINUE = 0x7FFF0000, 0x7FC00000, 1
PIDFD_GETFD = 438
STATS = ("newfstatat", "fstat", "stat", "lstat", "statx")
PATHS = ("open", "mkdir", "chmod", "readlink", "execve")  # have a path as the first argument
PATHS_AT = ("openat", "newfstatat", "statx", "mkdirat")  # as the second
TRANSFERS = ("sendto", "sendmsg", "recvfrom", "recvmsg", "getpeername")
NOTIF_RECV, NOTIF_SEND, NOTIF_BYTES = 0xC0502100, 0xC0182101, 80
ENTRY = re.compile(r"(\d+) +\[ *(\d+)\] (\w+)\((.*)")
MEMORY = ("brk", "mmap", "munmap", "mremap", "madvise", "mprotect")


# ---- what there is to fail --------------------------------------------------------------------------------

class Recording:
    """An undisturbed run: how often each call was made `before` the first statement and `after` it.

    `numbers` are the kernel's for them; `wrong` says what was not as it should be, None if nothing.
    """

    def __init__(self, mode, plexctl):
        self.before, self.after, self.numbers = {}, {}, {}
        with tempfile.TemporaryDirectory() as scratch, modes.Invocation(mode, plexctl) as run:
            log = os.path.join(scratch, "strace")
            run.start(("strace", "-f", "-qq", "-n", "-y", "-s", "300", "-o", log))
            run.use()
            if mode == "proxy":
                with open("/proc/%d/task/%d/children" % (run.process.pid, run.process.pid)) as stream:
                    os.kill(int(stream.read().split()[0]), signal.SIGTERM)
            run.finish(60)
            self.wrong = judge(run, None)
            with open(log, encoding="utf-8", errors="replace") as stream:
                self._read(stream.read().splitlines(), os.path.basename(plexctl))

    def _read(self, lines, script):
        opened = max(at for at, line in enumerate(lines) if "openat(" in line
                     and "/%s\", O_" % script in line)
        descriptor = lines[opened].partition(" = ")[2].partition("<")[0]
        at = opened
        while "close(%s<" % descriptor not in lines[at]:
            at += 1
        at += 1
        while ENTRY.match(lines[at]).group(3) in MEMORY:  # it is compiled
            at += 1
        children, main = set(), ENTRY.match(lines[0]).group(1)
        for number, line in enumerate(lines):
            found = ENTRY.match(line)
            if not found or found.group(1) in children:
                continue
            name, rest = found.group(3), found.group(4)
            self.numbers[name] = int(found.group(2))
            if counts(name, rest):
                where = self.before if number < at else self.after
                where[name] = where.get(name, 0) + 1
            if name == "execve" and found.group(1) != main:
                children.add(found.group(1))


def counts(name, rest):
    """Whether a call, as strace shows it, is one that can fail."""
    if name == "close":  # of a file, which may tell of an earlier write that failed
        return re.match(r"\d+</(?!dev/)", rest) is not None
    if name == "write":  # not at the socketpair by which Python's handler wakes the main thread
        return re.match(r"([3-9]|\d\d+)<socket:", rest) is None
    if name == "ioctl":  # these two set a bit of the descriptor
        return not re.search(r"FIONBIO|FIOCLEX", rest)
    if name == "fcntl":  # so do all others
        return "F_DUPFD" in rest
    if name == "mmap":  # not of a new thread's first frames: CPython drops the error, and waits for ever
        return "NULL, 16384, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS," not in rest
    return name in CAN_FAIL


# ---- how it is let fail -----------------------------------------------------------------------------------

class Filter(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]


class Injector:
    """Lets one system call fail: number `nr`, the `ordinal`-th since exec of those that can.

    `preexec` goes to Popen; `hit` says afterwards what it was that failed, None if it was not reached.
    """

    def __init__(self, name, nr, execve, ordinal, error):
        self.name, self.ordinal, self.error, self.hit, self.descriptor = name, ordinal, error, None, None
        self.is_lost = errno.errorcode[error] in LOST
        self._nr, self._execve, self._seen, self._root, self._gone = nr, execve, 0, None, {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        numbers = sorted({nr, execve})
        steps = [Filter(0x20, 0, 0, 0)]  # the number
        steps += [Filter(0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
        steps += [Filter(6, 0, 0, SECCOMP_RET_ALLOW), Filter(6, 0, 0, SECCOMP_RET_USER_NOTIF)]
        self._steps = (Filter * len(steps))(*steps)
        self._program = Program(len(steps), self._steps)
        self._ours, self._childs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def preexec(self):
        """In the child: the filter, and its descriptor to the parent."""
        self._libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        descriptor = self._libc.syscall(SECCOMP_NUMBER, SECCOMP_SET_MODE_FILTER,
                                        SECCOMP_FILTER_FLAG_NEW_LISTENER, ctypes.byref(self._program))
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        socket.send_fds(self._childs, [b"x"], [descriptor])
        os.close(descriptor)

    def close(self):
        """To be called when the process has ended."""
        self._childs.close()
        self._thread.join(5)
        self._ours.close()

    def is_of_import(self):
        """Whether it was importlib that asked for a source file: it takes any error for 'not there'."""
        return self.name in STATS and self.hit is not None and ".py)" in self.hit

    def _serve(self):
        try:
            descriptors = socket.recv_fds(self._ours, 1, 1)[1]
        except OSError:
            return
        if not descriptors:
            return
        listener = descriptors[0]
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        while not poller.poll()[0][1] & select.POLLHUP:
            notice = bytearray(NOTIF_BYTES)
            try:
                fcntl.ioctl(listener, NOTIF_RECV, notice)
                answer = self._decide(*struct.unpack_from("=QIIiIQ6Q", notice))
                fcntl.ioctl(listener, NOTIF_SEND, answer)
            except OSError:  # it was interrupted by a signal, or is gone
                pass
        os.close(listener)

    def _decide(self, notice, tid, _flags, nr, _arch, _pointer, *args):
        go_on = bytearray(struct.pack("=QqiI", notice, 0, 0, USER_NOTIF_FLAG_CONTINUE))
        if self._root is None:
            if nr == self._execve:
                self._root = tid
                if self._nr == nr:
                    self._seen += 1  # strace's first line
            return go_on
        process = self._process_of(tid)
        if self._gone.get(process):
            return go_on
        if nr == self._nr and self._can_fail(tid, args):
            self._seen += 1
            if self._seen == self.ordinal:
                self.hit = self._describe(tid, args)
                self.descriptor = args[0] if self.name in ("write", "read", "readv", "close") else None
                if self.name in TRANSFERS and self.is_lost and not self._lose_peer(process, args[0]):
                    self.hit += ", which is no TCP socket's: let be"
                    return go_on
                return bytearray(struct.pack("=QqiI", notice, 0, -self.error, 0))
        if nr == self._execve:
            self._gone[process] = True
        return go_on

    def _lose_peer(self, process, descriptor):
        """Such an error is told of a connection that is gone: it goes now, with a reset for its peer.

        False for other sockets: both ends are plexctl's own, or one is the kernel's."""
        pidfd = os.pidfd_open(process)
        copy = self._libc.syscall(PIDFD_GETFD, pidfd, int(descriptor), 0)
        os.close(pidfd)
        if copy < 0:  # a container may forbid it
            return False
        with socket.socket(fileno=copy) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return False
            self._libc.connect(copy, bytes(16), 16)  # AF_UNSPEC, connect(2)
            return True

    def _process_of(self, tid):
        try:
            with open("/proc/%d/status" % tid) as stream:
                return int(re.search(r"Tgid:\s+(\d+)", stream.read()).group(1))
        except OSError:
            return self._root

    def _can_fail(self, tid, args):
        """As counts(), for a call as the kernel shows it."""
        if self.name == "close":
            link = self._link(tid, args[0])
            return link.startswith("/") and not link.startswith("/dev/")
        if self.name == "write":
            return args[0] < 3 or not self._link(tid, args[0]).startswith("socket:")
        return not (self.name == "ioctl" and args[1] in (FIONBIO, FIOCLEX)
                    or self.name == "fcntl" and args[1] not in (F_DUPFD, F_DUPFD_CLOEXEC)
                    or self.name == "mmap" and (args[1], args[3]) == (FRAMES_BYTES, MAP_PRIVATE_ANONYMOUS))

    def _link(self, tid, descriptor):
        try:
            return os.readlink("/proc/%d/fd/%d" % (tid, descriptor))
        except OSError:
            return "?"

    def _describe(self, tid, args):
        words = []
        if self.name in PATHS + PATHS_AT:
            words.append(self._text(tid, args[self.name in PATHS_AT]))
        elif self.name in ("mmap", "mprotect", "prlimit64", "clone3", "socket"):
            words.append(", ".join("%#x" % each for each in args[:6]))
        elif self.name not in ("epoll_create1", "poll", "vfork", "mremap") and args[0] < 1 << 31:
            words.append("descriptor %d %s" % (args[0], self._link(tid, args[0])))
        thread = "the main thread" if tid == self._root else "thread %d" % (tid - self._root)
        return "%s(%s) of %s" % (self.name, ", ".join(words), thread)

    def _text(self, tid, address):
        try:
            with open("/proc/%d/mem" % tid, "rb", 0) as memory:
                memory.seek(address)
                return memory.read(200).partition(b"\0")[0].decode("utf-8", "replace")
        except OSError:
            return "?"


# ---- one fault --------------------------------------------------------------------------------------------

SURVIVED = {"print": {0}, "reveal": {0}, "proxy": {-signal.SIGTERM}, "command": {modes.COMMAND_OK},
            "stdio": {0}}
FAILED = {"print": {1, 3}, "reveal": {1, 3}, "proxy": {1, 3}, "command": {1, 3, 126, 127}, "stdio": {1, 3}}
UNSERVED = {modes.COMMAND_FAILED, modes.COMMAND_RESET}  # COMMAND ran


def run_case(plexctl, recordings, case):
    """(None or what is wrong, what was hit, what is to be known)."""
    mode, name, ordinal, error = case
    recording = recordings[mode]
    injector = Injector(name, recording.numbers[name], recording.numbers["execve"],
                        recording.before.get(name, 0) + ordinal, getattr(errno, error))
    with modes.Invocation(mode, plexctl) as run:
        run.revocations = 3
        try:
            run.start(preexec_fn=injector.preexec)
            run.use()
            if mode == "proxy" and run.process.poll() is None:
                run.process.send_signal(signal.SIGTERM)
            run.finish(run.began + DEADLINE_SECONDS - time.monotonic())
            wrong = judge(run, injector)
            story = "%s, %s, %.1f s\n%s" % (injector.hit, error, time.monotonic() - run.began, run.story())
        finally:
            run.process.close()
            injector.close()
    return wrong, injector.hit, story


def judge(run, injector):
    """What is wrong with a run, None if nothing is. Without an injector it must have succeeded."""
    errors = run.judge_streams()
    survived, took = run.status in SURVIVED[run.mode], time.monotonic() - run.began
    unserved = injector is not None and run.mode == "command" and run.status in UNSERVED
    unheard = injector is not None and injector.name == "write" and injector.descriptor == 2
    lost = injector is not None and injector.is_lost and (
        "reset" in run.client_end or run.status == modes.COMMAND_RESET)
    told = unheard or lost or "warning" in run.process.err or "could be checked" in run.process.err
    if "hangs" not in run.wrong:
        run.check(survived or unserved or injector is not None and run.status in FAILED[run.mode],
                  "status %s", run.status)
        if survived:
            run.check(not errors, "status %s and an error line: %s", run.status, errors[:1])
        elif not unserved:
            run.check(len(errors) == 1 or unheard and not errors, "%d error lines and status %s", len(errors),
                      run.status)
    run.check(run.client_end != "hung", "a connection hangs")
    run.check(run.mode != "command" or took < modes.CLIENT_SECONDS, "COMMAND's connection hangs")
    if unserved or survived and run.mode in ("proxy", "stdio") and run.answer != modes.WORD:
        run.check(told and run.mode != "stdio", "not served, and not a word of it")
    if survived and run.mode in ("print", "reveal"):
        run.check(run.process.out.endswith("\n"), "status 0 without a document")
    run.judge_document()
    run.judge_sessions()
    if injector is not None and injector.is_of_import():
        run.wrong = [words for words in run.wrong if not words.startswith(("internal error", "an unclear"))]
    return "; ".join(run.wrong) or None


def usable():
    """Why this host cannot do it, empty if it can."""
    if SECCOMP_NUMBER is None or not hasattr(socket, "send_fds"):
        return "no number of seccomp() for %s, or a Python before 3.9" % platform.machine()
    try:
        subprocess.run(["strace", "-f", "-qq", "-n", "-o", os.devnull, "true"], check=True, timeout=20,
                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except (OSError, subprocess.SubprocessError) as error:
        return "strace does not work here: %s" % error
    injector = Injector("uname", 0xFFFF, 0xFFFF, 1, errno.EIO)
    try:
        subprocess.run(["true"], preexec_fn=injector.preexec, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return "seccomp's user notification does not work here: %s" % error
    finally:
        injector.close()
    return ""


def main():
    parser = modes.create_parser(__doc__, "MODE:SYSCALL:N:ERRNO")
    parser.add_argument("--syscall", action="append")
    parser.add_argument("--list", action="store_true", help="print the cases, run none")
    options = parser.parse_args()
    modes.default_signals()
    reason = usable()
    if reason:
        print("skipped: %s" % reason)
        return 0
    plexctl = options.plexctl
    wanted = [options.case.split(":")[0]] if options.case else options.mode or modes.MODES
    recordings = {}
    for mode in wanted:
        recordings[mode] = Recording(mode, plexctl)
        if recordings[mode].wrong:
            print("%s fails undisturbed: %s" % (mode, recordings[mode].wrong))
            return 1
    work = functools.partial(run_case, plexctl, recordings)
    if options.case:
        return modes.run_one(work, options.case)
    cases = [(mode, name, ordinal, error) for mode, recording in recordings.items()
             for name, count in sorted(recording.after.items()) for ordinal in range(1, count + 1)
             for error in CAN_FAIL[name] if not options.syscall or name in options.syscall]
    unknown = sorted({name for recording in recordings.values() for name in recording.numbers}
                     - set(CAN_FAIL) - CANNOT_FAIL)
    if unknown:
        print("neither in the table nor excepted: %s" % ", ".join(unknown))
    if options.list:
        for case in cases:
            print("%s:%s:%d:%s" % case)
        print("%d faults" % len(cases))
        return 0
    rng = random.Random(options.seed)
    chosen = rng.sample(cases, round(len(cases) * options.sample) or min(1, len(cases)))
    print("seed %d: %d of %d faults" % (options.seed, len(chosen), len(cases)), flush=True)
    hits, has_failed = modes.run_all(chosen, work, options, "python3 .ci/torture.py")
    print("%d not reached" % hits[None])
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
