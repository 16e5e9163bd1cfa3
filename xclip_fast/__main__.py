"""The entry point of ``xclip-fast`` and of ``python -m xclip_fast``."""

import gc
import signal
import sys


def main() -> None:
    """Runs the command line. Ctrl-C during its import ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import main as run

    signal.signal(signal.SIGINT, before)
    try:
        run()
    finally:
        if "triton" not in sys.modules:  # Triton writes of leaks if its objects stay
            gc.freeze()  # at its end, Python would look for garbage in all that was imported


if __name__ == "__main__":
    main()
