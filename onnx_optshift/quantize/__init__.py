"""Quantization simulated on matrices: what a quantizer would make of a weight, and what that does to the outputs."""
