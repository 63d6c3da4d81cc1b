"""Methods that keep single weights in 16 bits beside the codes."""
