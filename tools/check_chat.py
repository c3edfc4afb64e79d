#!/usr/bin/env python3
"""Drives `lacuna chat` through a pseudo-terminal: Ctrl-C stops the answer and not the program, /regen, a full context.

    python3 tools/check_chat.py target/release/lacuna

What a pipe can test is in crates/cli/tests/cli.rs; this needs a terminal and a clock, so it is run by hand.
"""

import os
import pty
import select
import sys
import time


class Terminal:
    def __init__(self, args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(args[0], args)

    def read(self, seconds, until=None):
        seen, end = b"", time.time() + seconds
        while time.time() < end and (until is None or until not in seen):
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    part = os.read(self.fd, 65536)
                except OSError:
                    break
                if not part:
                    break
                seen += part
        return seen

    def say(self, data, seconds=5, until=None):
        os.write(self.fd, data)
        return self.read(seconds, until)


def main():
    program = sys.argv[1] if len(sys.argv) > 1 else "target/release/lacuna"
    t = Terminal([program, "chat", "-c", "256", "-n", "4000", "-s", "1", "--ignore-eos"])
    prompt = b"> "

    def expect(what, seen, *parts):
        missing = [p for p in parts if p not in seen]
        print("ok  " if not missing else "FAIL", what)
        if missing:
            sys.exit(f"{missing} not in: {seen.decode(errors='replace')}")

    expect("starts", t.read(20, prompt), b"/help", prompt)
    t.say(b"Tell me a story\r", 0.3)
    expect("Ctrl-C stops the answer", t.say(b"\x03", 5, prompt), b"(stopped)", prompt)
    expect("Ctrl-C at the prompt stays", t.say(b"\x03", 5, prompt), b"Ctrl-D leaves", prompt)
    expect("/regen until the context is full", t.say(b"/regen\r", 60, b"more room"), b"the context is full")
    t.read(2, prompt)
    expect("a question too many is refused", t.say(b"And then?\r", 5, b"more room"), b"the context holds 256")
    t.read(2, prompt)
    t.say(b"/clear\r", 2, prompt)
    expect("after /clear it answers again", t.say(b"Hello\r", 60, b"more room"), b"the context is full")
    t.read(2, prompt)
    expect("unknown commands are told", t.say(b"/nothing\r", 5, b"lists them"), b"no command `/nothing`")
    t.read(2, prompt)
    t.say(b"\x04", 3)
    status = os.waitpid(t.pid, 0)[1]
    expect("Ctrl-D leaves with exit code 0", b"%d" % status, b"0")


main()
