"""Running models with ONNX Runtime."""
