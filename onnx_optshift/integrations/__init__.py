"""Doors into other tools, each imported only where its tool is: Olive, ONNX Runtime's quantizers, Polygraphy."""
