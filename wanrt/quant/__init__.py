"""Number formats of the models' layers, and which layer gets which."""
