"""Fixtures for all tests."""

import signal

pytest_plugins = ["tests.fixtures_demo"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As where a shell runs the tests in the background. What they start would inherit that, and miss their Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
