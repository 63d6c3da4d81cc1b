"""Stages that tune blocks, or layers, by gradients."""
