"""Putting files in place: patched models, their external data, reports; whole or not at all."""
