"""Measures: how much a model suffers from every candidate at every layer."""
