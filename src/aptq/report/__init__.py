"""What a run did, read from its folder; imports nothing else of aptq."""
