"""Methods that add a product of two factors to a compressed weight."""
