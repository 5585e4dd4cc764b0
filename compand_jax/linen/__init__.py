"""Linen models, quantized by interception."""
