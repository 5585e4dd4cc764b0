"""The equation: companding, its codebooks, the quantizers and their gradients."""
