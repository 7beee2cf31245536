"""ONNX knowledge: reading, finding, probing and patching models."""
