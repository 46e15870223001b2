"""`vlmbuild` and `python -m vlmbuild`: the command line."""

import os
import signal
import sys


def run() -> int:
    """Run the command line, and return its exit code. SIGINT during imports ends it at once, without a traceback."""

    def stop(*_: object) -> None:
        os.write(2, b"error: interrupted.\n")
        os._exit(130)  # an exception would be lost in the middle of an import, and there is nothing to clean up

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)

    from vlmbuild.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
