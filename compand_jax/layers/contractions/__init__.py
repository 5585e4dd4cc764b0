"""Contractions of parameters, found in the program that a function is traced to, and quantized."""
