"""Pixels in and out of files: images, videos, and where results may be written."""
