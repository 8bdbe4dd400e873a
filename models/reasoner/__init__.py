"""The reasoner: a small transformer that plays the Game of 24, its task, training and evaluation."""
