"""What a quantized layer is, whatever framework the model is of."""
