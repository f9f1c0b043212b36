"""The same network, faster: packed for a CPU, or as an ONNX file."""
