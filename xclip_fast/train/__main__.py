import sys

from .loop import command_line

sys.exit(command_line())
