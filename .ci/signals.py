#!/usr/bin/env python3
"""Sends SIGINT, SIGTERM and SIGHUP, once and twice, at random instants from exec to end, in every mode.

    python3 .ci/signals.py                          200 instants for each of them: 6,000 runs, half an hour
    python3 .ci/signals.py --sample 0.02 --seed 7   four instants for each
    python3 .ci/signals.py --seed 7 --case proxy:SIGTERM:2:17

After each: it has ended by that signal (or, where it had come to its own end first, with its own status; in
COMMAND mode with COMMAND's), each session that was issued is revoked once (print mode that ended with 0
keeps its own), nothing hangs, and nothing but plexctl's own lines is on stderr.

A traceback that Python writes while it starts, or compiles the script, is Python's own: it is counted and
is no failure. It is known by having no frame of plexctl.py beyond the statement that gives SIGINT its default
action, the first of the file that does anything; and the process must not have asked for a session, unless
its traceback is that of a KeyboardInterrupt which Python lost ("Exception ignored", "Failed checking if
argv[0] is an import path entry"), and Python's handler stood when the signal was sent.
"""

import functools
import random
import re
import signal
import sys
import threading
import time

import modes

INSTANTS = 200
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
DEADLINE_SECONDS = 60  # niced beside a load, a start alone may take 20
STARTING = re.compile("Traceback|lost sys.stderr|Fatal Python error: init_")
FRAME = re.compile(r'File "([^"]*)", line (\d+), in (\S+)')


def measure(plexctl):
    """When the script's first statement runs, and when each mode is over, in seconds from exec."""
    times = {}
    for mode in ("start",) + modes.MODES:
        taken = []
        for _ in range(3):
            with modes.Invocation("print" if mode == "start" else mode, plexctl) as run:
                if mode == "start":
                    run.command = lambda: [sys.executable, "-I", plexctl, "--help"]
                run.start()
                run.use()
                if mode == "proxy":
                    run.process.send_signal(signal.SIGTERM)
                run.finish(60)
                taken.append(time.monotonic() - run.began)
        times[mode] = sorted(taken)[1]
    return times


def first_act(plexctl):
    """The line of the script up to which SIGINT is Python's own business."""
    with open(plexctl, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if "SIG_DFL" in line:
                return number
    return 1


def is_starting(process):
    """Whether SIGINT is caught and SIGTERM is not: by Python's handler, then."""
    try:
        with open("/proc/%d/status" % process.pid) as stream:
            caught = int(re.search(r"SigCgt:\s+(\w+)", stream.read()).group(1), 16)
    except (OSError, AttributeError):
        return False
    return [bool(caught >> number - 1 & 1) for number in (signal.SIGINT, signal.SIGTERM)] == [True, False]


def is_pythons_own(run, first_line):
    """Whether a traceback is from before the script could do anything about it."""
    frames = [(int(line), where) for path, line, where in FRAME.findall(run.process.err)
              if path == run.plexctl]
    early = all(where == "<module>" and line <= min(first_line, 60) for line, where in frames)
    return early and (not run.plane.requests or is_lost(run))


def is_lost(run):
    """Whether Python has lost a KeyboardInterrupt of its start."""
    return run.hit_start and "KeyboardInterrupt" in run.process.err


def run_case(plexctl, times, first_line, seed, case):
    """(None or what is wrong, the kind of instant, what is to be known)."""
    mode, name, count, index = case
    rng = random.Random("%d:%s:%s:%d:%d" % (seed, mode, name, count, index))
    number = getattr(signal, name)
    start, end = times["start"], times[mode]
    since, instant = rng.choice((("exec", rng.uniform(0, start)),
                                 ("exec", rng.uniform(start * 0.8, end + 0.1)),
                                 ("first request", rng.uniform(0, end - start * 0.8)),
                                 ("first request", rng.uniform(0, 0.03))))
    pause = rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)))
    with modes.Invocation(mode, plexctl) as run:
        run.hit_start = False
        run.start()
        user = threading.Thread(target=run.use, daemon=True)
        user.start()
        if since == "first request":
            run.await_request(end + 1)
            wait = instant
        else:
            wait = run.began + instant - time.monotonic()
        for wait in [wait] + [pause] * (count - 1):
            time.sleep(max(0.0, wait))
            if run.process.poll() is None:
                run.hit_start |= is_starting(run.process)
                run.process.send_signal(number)
        run.finish(DEADLINE_SECONDS)
        user.join(modes.CLIENT_SECONDS + 1)
        run.check(not user.is_alive() and run.client_end != "hung", "its client hangs")
        kind = judge(run, number, first_line)
        story = "%s x %d, %.3f s after %s, %.3f s apart\n%s" % (
            name, count, instant, since, pause, run.story())
        return "; ".join(run.wrong) or None, kind, story


def judge(run, number, first_line):
    """Notes what is wrong with a run; returns when it was hit."""
    err = run.process.err
    if STARTING.search(err) and is_pythons_own(run, first_line):
        run.wrong = [words for words in run.wrong if words == "hangs" and not is_lost(run)]
        run.check(run.status == -number or "Fatal Python error: init_" in err or is_lost(run),
                  "status %s", run.status)
        return "Python's own traceback"
    own_end = {"print": {0}, "reveal": {0}, "proxy": set(), "command": {modes.COMMAND_OK, 128 + number},
               "stdio": {0}}[run.mode]
    run.check(run.status in own_end | {-number}, "status %s", run.status)
    if run.status == 0 and run.mode != "stdio":
        run.check(run.process.out.endswith("\n"), "no document, and status 0")
    if run.status == 0 and run.mode == "stdio":
        run.check(run.answer == modes.WORD, "status 0 without the answer")
    errors = run.judge_streams()
    run.check(not errors, "an error line: %s", errors[:1])
    run.judge_document()
    run.judge_sessions()
    if not run.plane.requests:
        return "before the first request"
    return "came to its own end" if run.status in own_end else "with a session"


def main():
    options = modes.create_parser(__doc__, "MODE:SIGNAL:COUNT:INDEX").parse_args()
    modes.default_signals()
    plexctl = options.plexctl
    times = measure(plexctl)
    work = functools.partial(run_case, plexctl, times, first_act(plexctl), options.seed)
    if options.case:
        return modes.run_one(work, options.case)
    print("seed %d; first statement after %.3f s, end: %s" % (options.seed, times["start"], ", ".join(
        "%s %.3f s" % (mode, times[mode]) for mode in modes.MODES)), flush=True)
    cases = [(mode, name, count, index) for mode in options.mode or modes.MODES for name in SIGNALS
             for count in (1, 2) for index in range(max(1, round(INSTANTS * options.sample)))]
    random.Random(options.seed).shuffle(cases)
    kinds, has_failed = modes.run_all(cases, work, options, "python3 .ci/signals.py --seed %d" % options.seed)
    print(", ".join("%s: %d" % item for item in sorted(kinds.items())))
    return has_failed


if __name__ == "__main__":
    sys.exit(main())
