"""Compressed models ready to run, through transformers."""
