"""Engines and how they travel: the bundle, a signed set of files, checked before it is used."""
