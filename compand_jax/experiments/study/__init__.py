"""Many fine-tunings compared: grid, records, tables, plots, report."""
