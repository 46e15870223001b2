"""Models that run ONNX files."""
