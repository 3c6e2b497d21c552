"""Adapters to other people's programs, a file a host. Each imports its host only where it is used."""
