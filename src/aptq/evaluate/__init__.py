"""What compression cost: perplexity and divergence of any transformers model on given token ids."""
