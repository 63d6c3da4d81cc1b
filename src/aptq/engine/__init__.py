"""The loop over blocks and its pieces: token batches, streams, layers, statistics, stages."""
