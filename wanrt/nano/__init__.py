"""The embedded model nano: its language, procedural training data, scorer, training and weights."""
