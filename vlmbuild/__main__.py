"""`vlmbuild` and `python -m vlmbuild`: the command line."""

import os
import signal
import sys


def run() -> int:
    """Run the command line, and return its exit code. A signal during imports ends it at once, without a traceback."""

    def stop(number: int, _: object) -> None:
        os.write(2, b"error: interrupted.\n")
        # An exception would be lost in the middle of an import, and there is nothing to clean up.
        os._exit(128 + number)

    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:
            signal.signal(number, stop)

    from vlmbuild.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
