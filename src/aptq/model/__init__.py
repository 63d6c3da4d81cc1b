"""transformers models, opened block by block, with every weight an ordinary nn.Linear."""
