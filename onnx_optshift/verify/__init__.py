"""Proof that the outputs stayed."""
