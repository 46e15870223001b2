"""Linear layers on blocks of 4-bit integers (ONNX Runtime)."""
