"""Statistics of layer inputs that stages ask for."""
