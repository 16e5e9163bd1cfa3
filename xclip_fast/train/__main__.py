"""``python -m xclip_fast.train``, for torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..schema import ConfigError
from .loop import main


def command_line(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xclip_fast.train", description="Train or fine-tune an X-CLIP.")
    parser.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-5")
    parser.add_argument("--fresh", action="store_true", help="start over in a new folder")
    given = parser.parse_args(arguments)
    try:
        main(given.config, given.overrides, fresh=given.fresh)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
