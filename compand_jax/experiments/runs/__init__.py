"""One training run: its configuration, stages, directory and report."""
