"""The console's entry point, and ``python -m xclip_fast``."""

import signal


def main() -> None:
    """Runs the command line. Ctrl-C while it is still being imported ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
