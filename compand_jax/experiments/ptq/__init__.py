"""A trained network quantized without training, over many settings."""
