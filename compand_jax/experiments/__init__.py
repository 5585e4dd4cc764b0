"""The research harness: runs, calibration without training, studies, benchmark."""
