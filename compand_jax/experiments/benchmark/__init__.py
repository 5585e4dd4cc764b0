"""Time and memory of quantized networks against full precision."""
