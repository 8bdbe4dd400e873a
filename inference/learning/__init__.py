"""Learning: the training loop, and what it trains besides guides: twists and policies."""
