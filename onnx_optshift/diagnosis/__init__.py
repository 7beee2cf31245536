"""Figures about a model and its data: flatness, neural collapse, and whether the conditions hold."""
