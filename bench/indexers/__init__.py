"""Indexers over pools and options of indexers together: what they cost and keep in a trained model."""
