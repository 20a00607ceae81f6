"""Null training as a Flower app."""
