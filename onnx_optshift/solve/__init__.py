"""Solvers for the equation A W = A V."""
