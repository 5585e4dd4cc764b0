"""Networks as packed codes and level tables, and their file."""
