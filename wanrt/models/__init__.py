"""The networks of a Wan model: transformer, video VAE, text and image encoders; the tokenizer."""
