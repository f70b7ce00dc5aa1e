"""What a request holds where, planned beforehand, kept while it runs."""
