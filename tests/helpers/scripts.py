"""What a script begins with that a test starts in a process of its own."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
# a shell's background jobs ignore Ctrl-C, and pass that on: a test's script begins with this
HEARS_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
