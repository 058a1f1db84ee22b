"""Checks of a machine before a run; `command.py` begins it, and every check is a function in one of its lists."""
