"""The command `flowscale`. It says what it does before it imports PyTorch, which takes seconds."""

import signal
import sys


def main() -> None:
    """Run `flowscale_lite.cli.main`; being told to end (SIGTERM) is an interruption, as Ctrl-C is."""
    print("flowscale: loading PyTorch", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from flowscale_lite import cli

        cli.main()
    except KeyboardInterrupt:
        print("flowscale: interrupted before anything was searched", file=sys.stderr)
        sys.exit(130)
