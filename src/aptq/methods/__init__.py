"""Compression methods: one a file, grouped by family; found by `aptq.engine.stage.methods`."""
