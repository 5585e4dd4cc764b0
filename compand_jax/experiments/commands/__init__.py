"""Command lines: each module is the command of its name, of `compand` and of `scripts/`."""
